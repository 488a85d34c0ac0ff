"""Read the schemas of many shards: which types each column has, and in which shards."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from nemo_image.datasets.load import metadata_of_tar
from nemo_image.datasets.opening import plain_schema
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.run import current_client, run_tasks
from nemo_image.errors import ShardError
from nemo_image.shards import files, parquet
from nemo_image.shards.read import ShardReader
from nemo_image.shards.sources import open_file

SHARDS_A_TASK = 500
REMOTE_THREADS = 16
"""A remote footer costs waiting; a local one costs time under Python's lock, where threads only hinder."""

EXACT_BITS = 53
"""A double holds every integer of up to so many bits."""

Answer = TypeVar("Answer")

_NO_RECORD = ""
_Key = tuple[bytes, str]


@dataclass
class ColumnKinds:
    """A column as it stands in the shards' files.

    Attributes
    ----------
    name : str
    kinds : dict of pyarrow.DataType to list of str
        The shards that have it in each type, those first that the first shards have.
    absent : list of str
        The readable shards that lack it.
    made_by : list of dict or None
        What made it, as the footers say; None for a file that does not say.
    """

    name: str
    kinds: dict[pa.DataType, list[str]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    made_by: list[Mapping[str, Any] | None] = field(default_factory=list)


def column_kinds(
    source: DatasetSource, root: str, shards: Sequence[str], read_tars: bool = False
) -> dict[str, ColumnKinds]:
    """Read the footers of the shards' files below `root`, on the cluster if there is one; return all their columns.

    Files that are missing or unreadable are passed over. With `read_tars`, a shard without a readable file counts as
    what its tar's own JSON and captions give.
    """
    place = {shard: number for number, shard in enumerate(shards)}
    groups: dict[_Key, list[str]] = defaultdict(list)
    for part in in_chunks(_ReadSchemas(source, root, read_tars), shards, root, source.storage_options):
        for key, some in part.items():
            groups[key] += some
    found: dict[str, ColumnKinds] = {}
    seen: list[str] = []
    for (text, record), some in sorted(groups.items(), key=lambda item: min(place[shard] for shard in item[1])):
        arrow_schema = plain_schema(pa.ipc.read_schema(pa.py_buffer(text)))
        made_by = json.loads(record) if record != _NO_RECORD else {}
        for one in arrow_schema:
            column = found.setdefault(one.name, ColumnKinds(one.name, absent=list(seen)))
            column.kinds.setdefault(one.type, []).extend(some)
            column.made_by.append(made_by.get(one.name))
        for name in found.keys() - set(arrow_schema.names):
            found[name].absent += some
        seen += some
    for column in found.values():
        for names in (column.absent, *column.kinds.values()):
            names.sort(key=place.__getitem__)
    return found


def count_rows(source: DatasetSource, shards: Sequence[str]) -> int:
    """Count the rows of the shards' files by their footers, on the cluster if there is one.

    Raises
    ------
    MetadataFileError
        If a file is missing or is no Parquet.
    """
    return sum(in_chunks(_CountRows(source), shards, source.metadata_root, source.storage_options))


def big_integers(source: DatasetSource, root: str, columns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return, of the columns given with their shards, those with integers that a double cannot hold; each with a shard.

    The footers' statistics say so; a file without them counts as one without such integers.
    """
    found: dict[str, str] = {}
    work = _FindBigIntegers(source, root, frozenset(columns))
    shards = list(dict.fromkeys(shard for some in columns.values() for shard in some))
    for part in in_chunks(work, shards, root, source.storage_options):
        found |= part
    return found


@dataclass(frozen=True)
class _ReadSchemas:
    """Reads the schemas of some shards; returns those that have each, with the record of what made the columns."""

    source: DatasetSource
    root: str
    read_tars: bool
    task_name = "nemo-image-schemas"

    def __call__(self, shards: Sequence[str]) -> dict[_Key, list[str]]:
        found = defaultdict(list)
        for shard, key in zip(shards, each(self._key, shards, self.root, self.source.storage_options), strict=True):
            if key is not None:
                found[key].append(shard)
        return dict(found)

    def _key(self, shard: str) -> _Key | None:
        try:
            summary = parquet.read_summary(files.join(self.root, shard + ".parquet"), self.source.storage_options)
        except ShardError:
            return self._of_tar(shard) if self.read_tars else None
        footer = summary.footer
        return _to_bytes(summary.schema), _NO_RECORD if footer is None else json.dumps(footer.columns, sort_keys=True)

    def _of_tar(self, shard: str) -> _Key | None:
        try:
            with ShardReader(self.source.tar_url(shard), self.source.storage_options) as reader:
                return _to_bytes(metadata_of_tar(reader).schema), _NO_RECORD
        except ShardError:
            return None


@dataclass(frozen=True)
class _CountRows:
    """Counts the rows of some shards."""

    source: DatasetSource
    task_name = "nemo-image-rows"

    def __call__(self, shards: Sequence[str]) -> int:
        return sum(each(self._rows, shards, self.source.metadata_root, self.source.storage_options))

    def _rows(self, shard: str) -> int:
        return parquet.read_summary(self.source.parquet_url(shard), self.source.storage_options).rows


@dataclass(frozen=True)
class _FindBigIntegers:
    """Finds which columns of some shards hold integers that a double cannot hold; returns a shard for each."""

    source: DatasetSource
    root: str
    columns: frozenset[str]
    task_name = "nemo-image-big-integers"

    def __call__(self, shards: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for shard, names in zip(shards, each(self._big, shards, self.root, self.source.storage_options), strict=True):
            found |= dict.fromkeys(names, shard)
        return found

    def _big(self, shard: str) -> set[str]:
        url = files.join(self.root, shard + ".parquet")
        try:
            with open_file(url, self.source.storage_options) as raw, pq.ParquetFile(raw) as file:
                groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        except (OSError, pa.ArrowException):
            return set()
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        return {one.path_in_schema for one in chunks if one.path_in_schema in self.columns and _is_big(one.statistics)}


def _is_big(statistics: Any) -> bool:
    if statistics is None or not statistics.has_min_max or not isinstance(statistics.max, int):
        return False
    return bool(max(abs(statistics.min), abs(statistics.max)) > 2**EXACT_BITS)


def _to_bytes(arrow_schema: pa.Schema) -> bytes:
    return bytes(arrow_schema.remove_metadata().serialize())


def in_chunks(
    work: Callable[[Sequence[str]], Answer], shards: Sequence[str], root: str, storage_options: files.StorageOptions
) -> Iterator[Answer]:
    """Yield ``work(chunk)`` for chunks of shards, in any order, from the cluster if there is one.

    `work` reads little of each shard's file below `root`, such as its footer. What a dead worker leaves is done here.
    """
    chunks = [shards[start : start + SHARDS_A_TASK] for start in range(0, len(shards), SHARDS_A_TASK)]
    if _is_local(root, storage_options) and current_client() is None:
        yield from map(work, chunks)
    else:
        yield from run_tasks(work, chunks, on_error=lambda chunk, _: work(chunk), count=len(chunks))


def each(
    function: Callable[[str], Answer], shards: Sequence[str], root: str, storage_options: files.StorageOptions
) -> list[Answer]:
    """Return ``function(shard)`` for each shard, many at once where the files are remote."""
    if _is_local(root, storage_options):
        return [function(shard) for shard in shards]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(function, shards))


def _is_local(root: str, storage_options: files.StorageOptions) -> bool:
    return isinstance(files.open_fs(root, storage_options)[0], LocalFileSystem)
