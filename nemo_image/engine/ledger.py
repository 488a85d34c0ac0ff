"""The ledger: what became of each row, shard by shard.

For every shard, and for the run, ``rows_in + rows_joined == rows_out + rows_filtered + sum(losses)``. The sides are
counted apart (source file, user's frame, written file), so that the equation can fail.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from nemo_image import schema
from nemo_image.errors import NemoImageError, one_line
from nemo_image.shards import files

FOLDER = "_nemo_image"
NAMED_AT_MOST = 20
"""How many ids or members of a kind a shard's record names; the counts are complete."""


class LedgerError(NemoImageError):
    """Rows were gained or lost without a name: a defect of nemo_image, please report it."""


@dataclass
class Named:
    """A count with the first few of what it counts."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, items: Iterable[Any]) -> Named:
        """Count `items` and keep the first few."""
        named = cls()
        for item in items:
            if named.count < NAMED_AT_MOST:
                named.first.append(str(item))
            named.count += 1
        return named


@dataclass
class ShardRecord:
    """One shard's account. All counts are of rows unless they say otherwise.

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
    rows_without_sample: Named = field(default_factory=Named)
    samples_without_row: Named = field(default_factory=Named)
    repeated_members: Named = field(default_factory=Named)
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
            raise LedgerError(
                f"shard {self.shard}: {self.rows_in} rows in + {self.rows_joined} joined, but {self.rows_out} rows "
                "out + "
                f"{self.rows_filtered} filtered + losses {self.losses}"
            )

    def note_results(self, table: pa.Table, columns: Iterable[str]) -> None:
        """Count the results of `columns` in a written table, and its failures by their category."""
        self.results = {name: len(table) - table[name].null_count for name in columns if name != schema.IMAGE_ERROR}
        if schema.IMAGE_ERROR in table.column_names:
            self.failures = count_failures(table[schema.IMAGE_ERROR].drop_null().to_pylist())

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShardRecord:
        """Rebuild a record from :meth:`to_dict`."""
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        for name in ("rows_without_sample", "samples_without_row", "repeated_members"):
            known[name] = Named(**known.get(name, {}))
        return cls(**known)


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


def total(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Sum the records of a run and assert that the sums balance too."""
    records = list(records)
    finished = [record for record in records if record.status != "failed"]
    run = ShardRecord(
        shard="",
        rows_in=sum(record.rows_in or 0 for record in finished),
        rows_joined=sum(record.rows_joined for record in finished),
        rows_out=sum(record.rows_out or 0 for record in finished),
        rows_filtered=sum(record.rows_filtered for record in finished),
        losses=_sum_counts(record.losses for record in finished),
    )
    run.balance()
    statuses = Counter(record.status for record in records)
    return {
        "shards": {status: statuses[status] for status in ("done", "skipped", "failed")},
        "rows_in": run.rows_in,
        "rows_joined": run.rows_joined,
        "rows_out": run.rows_out,
        "rows_filtered": run.rows_filtered,
        "losses": run.losses,
        "samples": sum(record.samples or 0 for record in finished),
        "results": _sum_counts(record.results for record in finished),
        "failures": _sum_counts(record.failures for record in finished),
        "rows_without_sample": sum(record.rows_without_sample.count for record in finished),
        "samples_without_row": sum(record.samples_without_row.count for record in finished),
        "repeated_members": sum(record.repeated_members.count for record in finished),
        "failed_shards": {record.shard: record.error for record in records if record.status == "failed"},
    }


def write_ledger(
    root: str,
    kind: str,
    records: Iterable[ShardRecord],
    storage_options: Mapping[str, Any] | None = None,
    made_by: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Write a run's ledger below `root` and return its URL and the run's totals.

    The file has one JSON object a line: each shard's record in the order of their names, then ``{"run": totals}``, with
    the fingerprints of the columns (`made_by`) that the run wrote.
    """
    ordered = sorted(records, key=lambda record: record.shard)
    totals = {**total(ordered), "made_by": dict(made_by or {})}
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    url = files.join(root, FOLDER, f"{kind}-{stamp}-{uuid.uuid4().hex[:8]}.jsonl")
    lines = [*(record.to_dict() for record in ordered), {"run": totals}]
    with files.atomic_writer(url, storage_options) as out:
        for line in lines:
            out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return url, totals


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for one in counts:
        summed.update(one)
    return dict(sorted(summed.items()))
