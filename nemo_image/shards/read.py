"""Reading a shard's samples: their bytes, captions and JSON, and the samples that the rows' ids mean."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image.errors import IdMismatchError, TarError
from nemo_image.shards.files import StorageOptions, Url
from nemo_image.shards.idx_file import load_index
from nemo_image.shards.index import Member, Sample, TarIndex, unreadable
from nemo_image.shards.keys import match_ids, plain_ids
from nemo_image.shards.sources import ByteSource, merge_ranges, open_source

logger = logging.getLogger("nemo_image")

CHUNK = 2**20
"""Bytes at once of a member that is not read whole."""

_DEPTH = 32  # of nested JSON; Parquet's readers take 100 levels, two for each list
_CHECKED = 8  # samples whose JSON is compared with their ids

_Group = tuple[int, int, Sequence[Member]]  # start and stop of a read, and the members in it


class ShardReader:
    """Reads a tar's members at their offsets. Threads can share one.

    Opened at its first use, closed at the end of a ``with`` block.

    Parameters
    ----------
    tar_url : str or path
    storage_options : mapping, optional
        For fsspec.
    use_index_file : bool
        As in :func:`~nemo_image.shards.idx_file.load_index`.
    """

    def __init__(self, tar_url: Url, storage_options: StorageOptions = None, use_index_file: bool = False) -> None:
        self.tar_url = os.fspath(tar_url)
        self.storage_options = storage_options
        self.use_index_file = use_index_file
        self._lock = threading.RLock()
        self._source: ByteSource | None = None
        self._index: TarIndex | None = None
        self._is_closed = False
        self._has_warned = False

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tar; the index can still be used."""
        with self._lock:
            self._is_closed = True
            if self._source is not None:
                self._source.close()
                self._source = None

    @property
    def index(self) -> TarIndex:
        """The tar's index, read when it is first asked for.

        Raises
        ------
        TarError
            If the tar is missing, truncated, damaged or no tar.
        """
        with self._lock:
            if self._index is None:
                self._index = load_index(self._open(), self.storage_options, self.use_index_file)
            return self._index

    @property
    def is_local(self) -> bool:
        """Whether the tar is a local file: members read one by one then cost no more than together.

        Raises
        ------
        TarError
            If the tar is missing.
        """
        return self._open().ahead == 0

    def fetch_ahead(self, members: Iterable[Member]) -> None:
        """Have the kernel fetch members of a local tar, which will be read one by one; returns at once.

        Raises
        ------
        TarError
            If the tar does not have them.
        """
        source = self._open()
        source.fetch_ahead([self._range(member, source) for member in members])

    def read(self, member: Member) -> bytes:
        """Return a member's bytes.

        Raises
        ------
        TarError
            If the tar does not have them.
        """
        return next(self.read_many([member]))

    def read_many(self, members: Iterable[Member]) -> Iterator[bytes]:
        """Yield the bytes of members in the order given.

        Neighbours are read together. From a remote file at most 16 MiB are fetched ahead, or one member if that is
        larger.

        Raises
        ------
        TarError
            If the tar does not have them.
        """
        source = self._open()
        members = list(members)
        ranges = [self._range(member, source) for member in members]
        groups: list[_Group] = []
        first = size = 0
        for start, stop, count in merge_ranges(ranges, source.gap, source.window):
            if groups and size + stop - start > source.ahead:
                yield from self._fetch(source, groups)
                groups, size = [], 0
            groups.append((start, stop, members[first : first + count]))
            first, size = first + count, size + stop - start
        if groups:
            yield from self._fetch(source, groups)

    def read_chunks(self, member: Member, chunk_size: int = CHUNK) -> Iterator[bytes]:
        """Yield a member's bytes piece by piece, for one that may be larger than memory.

        Raises
        ------
        TarError
            If the tar does not have them.
        """
        source = self._open()
        start, stop = self._range(member, source)
        for offset in range(start, stop, chunk_size):
            part = member._replace(offset=offset, size=min(chunk_size, stop - offset))
            yield from self._fetch(source, [(offset, offset + part.size, [part])])

    def read_caption(self, sample: Sample) -> str | None:
        """Return a sample's caption, None if it has none; bytes that are no UTF-8 become U+FFFD."""
        if sample.caption is None:
            return None
        return self.read(sample.caption).decode("utf-8-sig", "replace")

    def read_json(self, sample: Sample) -> dict[str, Any] | None:
        """Return the object in a sample's JSON, None if it has none or one that cannot be parsed (logged)."""
        return None if sample.json is None else self.parse_json(sample, self.read(sample.json))

    def read_jsons(self, samples: Sequence[Sample]) -> Iterator[dict[str, Any] | None]:
        """Yield what :meth:`read_json` returns for each of several samples; neighbours are read together."""
        blobs = self.read_many([sample.json for sample in samples if sample.json is not None])
        for sample in samples:
            yield None if sample.json is None else self.parse_json(sample, next(blobs))

    def parse_json(self, sample: Sample, data: bytes) -> dict[str, Any] | None:
        """Return the object in the bytes of a sample's JSON, None if they cannot be parsed (logged).

        Parameters
        ----------
        sample : Sample
            Named in the log.
        data : bytes
            What :meth:`read` gave for ``sample.json``.
        """
        try:
            fields = json.loads(data.decode(json.detect_encoding(data), "replace"))
        except (ValueError, RecursionError) as error:
            self._tell(sample, f"cannot be parsed: {error}")
            return None
        if not isinstance(fields, dict):
            self._tell(sample, "is no object")
            return None
        if data.count(b"[") + data.count(b"{") > _DEPTH and _is_deeper(fields, _DEPTH):
            self._tell(sample, f"is nested more than {_DEPTH} deep")
            return None
        return fields

    def _tell(self, sample: Sample, reason: str) -> None:
        # A shard full of bad JSON is worth one line, not one for each sample.
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "%s: sample %r: its JSON %s", self.tar_url, sample.key, reason)

    def _open(self) -> ByteSource:
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.tar_url}: the reader is closed")
            if self._source is None:
                try:
                    self._source = open_source(self.tar_url, self.storage_options)
                except OSError as error:
                    raise unreadable(self.tar_url, error) from error
            return self._source

    def _range(self, member: Member, source: ByteSource) -> tuple[int, int]:
        start, stop = member.offset, member.offset + member.size
        if not 0 <= start <= stop <= source.size:
            raise TarError(
                f"{self.tar_url}: member {member.name!r} would lie at bytes {start} to {stop}, the file has "
                f"{source.size}: read the index of this very file"
            )
        return start, stop

    def _fetch(self, source: ByteSource, groups: Sequence[_Group]) -> Iterator[bytes]:
        try:
            blobs = source.read_ranges([(start, stop) for start, stop, _ in groups])
        except OSError as error:
            raise unreadable(self.tar_url, error) from error
        for (start, _, members), blob in zip(groups, blobs, strict=True):
            for member in members:
                data = blob[member.offset - start : member.offset - start + member.size]
                if len(data) < member.size:
                    raise TarError(
                        f"{self.tar_url}: member {member.name!r} at byte {member.offset} gave {len(data)} of "
                        f"{member.size} bytes: the file was cut off while it was read; copy or download it again"
                    )
                yield data


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)


def match_samples(reader: ShardReader, ids: Iterable[Any], id_col: str) -> npt.NDArray[np.int64]:
    """Find the sample that each id means: the one whose key it names, or else whose JSON has it in the field `id_col`.

    What lives in the JSON may happen to look like the keys of *other* samples (integers like zero-padded keys, above
    all). So the JSON of a few samples that were found by key is read. Where it contradicts, the JSON alone decides for
    the whole shard, unless it finds fewer of the ids than the keys do: then it was left behind when the samples were
    renamed.

    Parameters
    ----------
    reader : ShardReader
    ids : iterable of length n
        As for :func:`~nemo_image.shards.keys.match_ids`.
    id_col : str

    Returns
    -------
    array of int64, shape (n,)
        Positions in ``reader.index.samples``, -1 for none.

    Raises
    ------
    IdMismatchError
        If an id means several samples.
    TarError
        If the tar cannot be read.
    """
    ids = plain_ids(ids)
    everywhere = range(len(reader.index))
    try:
        found = match_ids(ids, reader.index.keys)
    except IdMismatchError as error:
        found = _match_json(reader, ids, id_col, everywhere)
        if (found < 0).all():
            raise IdMismatchError(f"{reader.tar_url}: {error}") from None
        return found
    agrees = _agrees(reader, ids, id_col, found)
    if agrees is False:
        by_json = _match_json(reader, ids, id_col, everywhere)
        by_json_wins = (by_json >= 0).sum() >= (found >= 0).sum()
        winner = "JSON" if by_json_wins else "keys"
        logger.info("%s: keys and JSON name samples differently: the %s count", reader.tar_url, winner)
        return by_json if by_json_wins else found
    missing = [row for row, value in enumerate(ids) if value is not None and found[row] < 0]
    if missing:
        # Only samples that no id has claimed can be meant.
        unclaimed = sorted(set(everywhere) - set(found.tolist()))
        if agrees is None or _say_more_than_keys(reader, unclaimed, id_col):
            found[missing] = _match_json(reader, [ids[row] for row in missing], id_col, unclaimed)
    return found


def _agrees(
    reader: ShardReader, ids: Sequence[str | int | None], id_col: str, found: npt.NDArray[np.int64]
) -> bool | None:
    """Tell whether the JSON of some samples found by key says the same ids; None if it says none."""
    rows = _spread(np.flatnonzero(found >= 0).tolist())
    agrees = None
    for row, text in zip(rows, _json_ids(reader, found[rows].tolist(), id_col), strict=True):
        if text is not None:
            if not _is_same(ids[row], text):
                return False
            agrees = True
    return agrees


def _say_more_than_keys(reader: ShardReader, places: Sequence[int], id_col: str) -> bool:
    """Tell whether the JSON of some of the samples says ids other than their keys."""
    checked = _spread(places)
    texts = _json_ids(reader, checked, id_col)
    keys = reader.index.keys
    return any(text is not None and not _is_same(keys[place], text) for place, text in zip(checked, texts, strict=True))


def _spread(values: Sequence[int]) -> list[int]:
    """Return the first, the last, and some values between."""
    return [values[int(i)] for i in np.linspace(0, len(values) - 1, min(_CHECKED, len(values))).round()]


def _is_same(value: str | int | None, text: str) -> bool:
    """Tell whether two ways to write an id agree: numbers may be padded, paths be shortened to base names."""
    if match_ids([value], [text])[0] >= 0:
        return True
    return len(text) <= 20 and text.isascii() and text.isdigit() and match_ids([int(text)], [str(value)])[0] >= 0


def _match_json(
    reader: ShardReader, ids: Sequence[str | int | None], id_col: str, places: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Match ids with what the JSON of the samples at some places says."""
    said: dict[str, list[int]] = {}
    for place, text in zip(places, _json_ids(reader, places, id_col), strict=True):
        if text is not None:
            said.setdefault(text, []).append(place)
    texts = list(said)
    try:
        found = match_ids(ids, texts, base_names=False)
    except IdMismatchError as error:
        raise IdMismatchError(f"{reader.tar_url}: in the JSON, {error}") from None
    repeated = [texts[position] for position in set(found.tolist()) - {-1} if len(said[texts[position]]) > 1]
    if repeated:
        keys = ", ".join(repr(reader.index.keys[place]) for place in said[min(repeated)][:5])
        raise IdMismatchError(
            f"{reader.tar_url}: {len(repeated)} ids stand in the JSON of several samples, {min(repeated)!r} for one in "
            f"that of {keys}: give id_col a field that tells the samples apart"
        )
    return np.array([-1 if position < 0 else said[texts[position]][0] for position in found], np.int64)


def _json_ids(reader: ShardReader, places: Iterable[int], id_col: str) -> Iterator[str | None]:
    """Yield the id that each sample's JSON says, numbers in decimal."""
    for fields in reader.read_jsons([reader.index.samples[place] for place in places]):
        value = plain_ids([(fields or {}).get(id_col)])[0]
        yield None if value is None else str(value)
