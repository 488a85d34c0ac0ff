"""The ledger: what became of each row, shard by shard.

For every shard, and for the run, ``rows_in + rows_joined == rows_out + rows_filtered + sum(losses)``. The sides are
counted apart (source file, user's frame, written file), so that the equation can fail.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, cast

import pyarrow as pa

from nemo_image import schema
from nemo_image.errors import DatasetError, NemoImageError, one_line
from nemo_image.shards import files
from nemo_image.shards.sources import open_file

logger = logging.getLogger("nemo_image")

FOLDER = "_nemo_image"
NAMED_AT_MOST = 20
"""How many ids or members of a kind a shard's record names; the counts are complete."""


_COUNTS = ("rows_in", "rows_joined", "rows_out", "rows_filtered", "samples")
_NAMED = ("rows_without_sample", "samples_without_row", "repeated_members")


class LedgerError(NemoImageError):
    """Rows were gained or lost without a name: a defect of nemo_image, please report it."""


@dataclass(frozen=True, slots=True)
class Named:
    """A count with the first few of what it counts."""

    count: int = 0
    first: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", tuple(self.first))

    @classmethod
    def of(cls, items: Iterable[Any]) -> Named:
        """Count `items` and keep the first few."""
        rest = iter(items)
        # Names in tars may hold bytes that are no UTF-8, which no ledger could be written with.
        first = [str(item).encode("utf-8", "backslashreplace").decode() for item in islice(rest, NAMED_AT_MOST)]
        return cls(len(first) + sum(1 for _ in rest), first)


NOTHING = Named()


@dataclass(slots=True)
class ShardRecord:
    """One shard's account. All counts are of rows unless they say otherwise.

    A run keeps one for each of its shards, perhaps 500,000: so they are small, below 1 kB each once they have come from
    a worker or a file.

    Attributes
    ----------
    status : str
        ``"done"``, ``"skipped"`` (was finished before) or ``"failed"``.
    rows_in : int or None
        Rows of the source's metadata; None where a failure came before they were counted.
    rows_joined : int
        Rows that the user's frame has beyond the source's.
    rows_filtered : int
        Rows of the source that the user's frame leaves out.
    losses : dict of str to int
        Rows lost for any other reason, by its name.
    samples : int or None
        Samples of the tar; None where the run had no need to look.
    results : dict of str to int
        Non-null values of each added column in the written file.
    failures : dict of str to int
        Rows by category of `image_error`.
    rows_without_sample, samples_without_row, repeated_members : Named
        What has no partner, and members whose key and extension came a second time in the tar.
    """

    shard: str
    status: str = "done"
    rows_in: int | None = None
    rows_joined: int = 0
    rows_out: int | None = None
    rows_filtered: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    samples: int | None = None
    results: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    rows_without_sample: Named = NOTHING
    samples_without_row: Named = NOTHING
    repeated_members: Named = NOTHING
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    def balance(self) -> None:
        """Assert that every row is accounted for.

        Raises
        ------
        LedgerError
            If the sides of the equation differ.
        """
        if self.status == "failed" or self.rows_in is None or self.rows_out is None:
            return
        into = self.rows_in + self.rows_joined
        out = self.rows_out + self.rows_filtered + sum(self.losses.values())
        if into != out:
            who = f"shard {self.shard}" if self.shard else "the run"
            raise LedgerError(
                f"{who}: {self.rows_in} rows in + {self.rows_joined} joined, but {self.rows_out} rows out + "
                f"{self.rows_filtered} filtered + losses {self.losses}"
            )

    def note_results(self, table: pa.Table, columns: Iterable[str]) -> None:
        """Count the results of `columns` in a written table, and its failures by their category."""
        self.results = {name: len(table) - table[name].null_count for name in columns if name != schema.IMAGE_ERROR}
        if schema.IMAGE_ERROR in table.column_names:
            self.failures = count_failures(table[schema.IMAGE_ERROR].drop_null().to_pylist())

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShardRecord:
        """Rebuild a record from :meth:`to_dict`; equal names and numbers in it are one object."""
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        for name in _NAMED:
            named = Named(**known.get(name, {}))
            known[name] = named if named.count else NOTHING
        same: dict[int, int] = {}
        for name, value in known.items():
            if isinstance(value, dict):
                known[name] = {sys.intern(key): same.setdefault(one, one) for key, one in value.items()}
            elif type(value) is int:
                known[name] = same.setdefault(value, value)
        if "status" in known:
            known["status"] = sys.intern(known["status"])
        return cls(**known)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send only what says something; :meth:`from_dict` makes the client's copy, which is small."""
        usual = type(self)("").to_dict()
        return type(self).from_dict, ({name: one for name, one in self.to_dict().items() if usual[name] != one},)


def _plain(value: Any) -> Any:
    if isinstance(value, Named):
        return {"count": value.count, "first": list(value.first)}
    return value.copy() if isinstance(value, dict | list) else value


@contextmanager
def accounted(record: ShardRecord) -> Iterator[None]:
    """Time a shard's task, check its account at the end, and make whatever it raises the record's failure."""
    started = time.monotonic()
    try:
        yield
        record.balance()
    except Exception as error:
        record.status, record.error = "failed", one_line(error)
    record.seconds = round(time.monotonic() - started, 3)


def count_failures(reasons: Iterable[str]) -> dict[str, int]:
    """Count `image_error` reasons by their category (the word before the colon)."""
    return dict(sorted(Counter(reason.split(":", 1)[0] for reason in reasons).items()))


class Sums:
    """The sums of a run, record by record."""

    def __init__(self) -> None:
        self._statuses: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in ("losses", "results", "failures")}
        self._failed: dict[str, str | None] = {}

    def add(self, record: ShardRecord) -> None:
        """Add a record; of a failed shard only that it failed."""
        self._statuses[record.status] += 1
        if record.status == "failed":
            self._failed[record.shard] = record.error
            return
        for name in _COUNTS:
            self._rows[name] += getattr(record, name) or 0
        for name in _NAMED:
            self._rows[name] += getattr(record, name).count
        for name, counter in self._counts.items():
            counter.update(getattr(record, name))

    def balance(self) -> None:
        """Assert that the run's rows are accounted for.

        Raises
        ------
        LedgerError
            If the sides of the equation differ.
        """
        run = ShardRecord("", losses=dict(self._counts["losses"]))
        for name in _COUNTS:
            setattr(run, name, self._rows[name])
        run.balance()

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as plain values for JSON."""
        return {
            "shards": {status: self._statuses[status] for status in ("done", "skipped", "failed")},
            **{name: self._rows[name] for name in (*_COUNTS, *_NAMED)},
            **{name: dict(sorted(counter.items())) for name, counter in self._counts.items()},
            "failed_shards": dict(self._failed),
        }


def total(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Sum the records of a run and assert that the sums balance too."""
    sums = Sums()
    for record in records:
        sums.add(record)
    sums.balance()
    return sums.to_dict()


def write_ledger(
    root: str,
    kind: str,
    records: Iterable[ShardRecord],
    storage_options: Mapping[str, Any] | None = None,
    made_by: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Iterable[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Write a run's ledger below `root` and return its URL and the run's totals.

    The file has one JSON object a line: each shard's record in the order of their names, then ``{"run": totals}``, with
    the fingerprints of the columns (`made_by`) that the run wrote and its `notes`.
    """
    ordered = sorted(records, key=lambda record: record.shard)
    totals = {**total(ordered), "made_by": dict(made_by or {}), "notes": list(notes)}
    stamp = datetime.datetime.now(datetime.UTC).strftime(_STAMP)
    url = files.join(root, FOLDER, f"{kind}-{stamp}-{uuid.uuid4().hex[:8]}.jsonl")
    with files.atomic_writer(url, storage_options) as out:
        for record in ordered:
            out.write(_line(record.to_dict()))
        out.write(_line({"run": totals}))
    return url, totals


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


_STAMP = "%Y%m%dT%H%M%S%f"
_NAME = re.compile(r"(?P<kind>.+)-(?P<time>[0-9]{8}T[0-9]{6}(?:[0-9]{6})?)-[0-9a-f]{8}\.jsonl")


@dataclass(frozen=True)
class Ledger:
    """A ledger's file.

    Attributes
    ----------
    url : str
    kind : str
        What ran: ``"save_metadata"``, ``"to_webdataset"``, …
    time : datetime.datetime
        When the run ended, in UTC.
    """

    url: str
    kind: str
    time: datetime.datetime
    storage_options: Mapping[str, Any] | None = None

    def lines(self) -> Iterator[ShardRecord | dict[str, Any]]:
        """Yield the shards' records in their order, then the run's totals, as they stand there.

        Raises
        ------
        DatasetError
            If the file is cut off or garbled; after what could be read.
        """
        last: ShardRecord | dict[str, Any] | None = None
        with open_file(self.url, self.storage_options) as raw, io.BufferedReader(cast(io.RawIOBase, raw)) as file:
            for number, text in enumerate(file, 1):
                try:
                    last = _parsed(text)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise DatasetError(f"{self.url}: line {number} is garbled or cut off ({error})") from error
                yield last
        if not isinstance(last, dict):
            raise DatasetError(f"{self.url}: the file is cut off: its last line is not the run's totals")


def _parsed(text: bytes) -> ShardRecord | dict[str, Any]:
    values = json.loads(text)
    if "run" in values:
        return dict(values["run"])
    record = ShardRecord.from_dict(values)
    odd = [name for name in _COUNTS if not isinstance(getattr(record, name), int | None)]
    if odd:
        raise ValueError(f"{odd[0]} is no number of rows")
    return record


def read_ledgers(root: str, storage_options: Mapping[str, Any] | None = None) -> list[Ledger]:
    """Return the ledgers of the runs that wrote below `root`, the oldest first; none where there is no such folder."""
    folder = files.join(root, FOLDER)
    try:
        names = files.list_files(folder, ".jsonl", storage_options)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            stamp = match["time"].ljust(len("20000101T000000000000"), "0")
            moment = datetime.datetime.strptime(stamp, _STAMP).replace(tzinfo=datetime.UTC)
            found.append(Ledger(files.join(folder, name), match["kind"], moment, storage_options))
    return sorted(found, key=lambda one: (one.time, one.url))


def failed_shards(root: str, storage_options: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Return the shards that the ledgers below `root` say failed, in whichever run came last to each."""
    status: dict[str, str] = {}
    for ledger in read_ledgers(root, storage_options):
        try:
            for line in ledger.lines():
                if isinstance(line, ShardRecord):
                    status[line.shard] = line.status
        except DatasetError as error:
            logger.warning("%s; what stands before that counts", error)
    return frozenset(shard for shard, last in status.items() if last == "failed")
