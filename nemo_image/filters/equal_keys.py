"""Count equal keys over all rows of a dataset, exactly, in bounded memory: a sort in files, by the keys' first bits.

.. code-block:: text

    <folder>/keys/<group>.bin        a group of shards: (key, key, row) of each row that has a key, sorted
    <folder>/names/<group>.parquet   its rows: number of the shard in the group, id, whether the row has a key
    <folder>/found/<range>.bin       a range of keys: (row, count) of those that stand more than once, by group
    <folder>/rows/<shard>.parquet    what the dataset's new columns read

A key is 128 bits, two unsigned 64-bit integers; all numbers are little-endian unsigned 64-bit integers. A row is the
number of its shard in the group, and its place in the shard. In a count, the last bit says that it is not the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.passes import run_all, tasks_of
from nemo_image.datasets.row_windows import frames
from nemo_image.shards import files, parquet
from nemo_image.shards.sources import open_source

Table = npt.NDArray[np.uint64]
"""One row a line; the columns are as the module says."""

MAX_GROUPS = 1024
SLOT_BITS = 10
"""Keys are located in their files by so many first bits."""

RANGE_ROWS = 2**21
"""Rows whose keys are compared at once, about; more where 1,024 ranges are not enough."""

_PLACE_BITS = 40
ROWS = "rows"


@dataclass(frozen=True)
class _Group:
    """Shards whose keys share a file."""

    number: int
    shards: list[tuple[str, PartitionTask]]


@dataclass(frozen=True)
class _Located:
    """Where the parts of a file begin, in rows; the last number is the file's length."""

    number: int
    starts: npt.NDArray[np.int64]


class EqualKeys:
    """Counts equal keys.

    Parameters
    ----------
    dataset : ImageTextPairDataset
        What `one_task_a_shard` gave for the columns.
    columns : sequence of str
        What `keys_of` looks at, besides ``shard`` and the id.
    folder : str
    keys_of : callable
        From a frame to the keys of its rows, (n, 2) uint64, and which rows have one, (n,) bool.
    count_column, repeated_column : str
        What is written of each row: how many rows have its key (int64; 0 without a key), and whether it is not the
        first of them, in the order of shards and rows (bool).
    """

    def __init__(
        self,
        dataset: ImageTextPairDataset,
        columns: Sequence[str],
        folder: str,
        keys_of: Callable[[pd.DataFrame], tuple[Table, npt.NDArray[np.bool_]]],
        count_column: str,
        repeated_column: str,
    ) -> None:
        self.tasks = tasks_of(dataset, columns)
        self.source = dataset.source
        self.folder = folder
        self.keys_of = keys_of
        self.columns = (count_column, repeated_column)

    def run(self) -> None:
        """Write the counts of all rows below ``rows/`` of the folder."""
        groups = self._groups()
        located = run_all("sort keys", _SortGroup(self), groups, len(groups), _name, rerun="")
        ranges = _ranges(located)
        comparing = _CompareRange(self, located)
        found = run_all("compare keys", comparing, list(enumerate(ranges)), len(ranges), _range_name, rerun="")
        run_all("gather counts", _GatherGroup(self, found), groups, len(groups), _name, rerun="")
        fs, path = files.open_fs(self.folder, self.source.storage_options)
        for name in ("keys", "names", "found"):
            if fs.exists(f"{path}/{name}"):
                fs.rm(f"{path}/{name}", recursive=True)

    def _groups(self) -> list[_Group]:
        tasks = list(self.tasks)
        size = max(1, -(-len(tasks) // MAX_GROUPS))
        starts = range(0, len(tasks), size)
        return [_Group(number, tasks[start : start + size]) for number, start in enumerate(starts)]


def _url(folder: str, kind: str, number: int, suffix: str = ".bin") -> str:
    return files.join(folder, kind, f"{number:05d}{suffix}")


def _name(group: _Group) -> str:
    return f"shards {group.shards[0][0]} to {group.shards[-1][0]}"


def _range_name(item: tuple[int, tuple[int, int]]) -> str:
    return f"range {item[0]} of keys"


def _ranges(groups: Sequence[_Located]) -> list[tuple[int, int]]:
    """Return ranges of slots with about as many rows as are compared at once."""
    rows = np.sum([np.diff(one.starts) for one in groups], axis=0)
    ranges, first, held = [], 0, 0
    for slot, count in enumerate(rows.tolist()):
        if held and held + count > RANGE_ROWS:
            ranges.append((first, slot))
            first, held = slot, 0
        held += count
    return [*ranges, (first, len(rows))]


class _SortGroup:
    """Writes the sorted keys, and the names, of a group's rows."""

    def __init__(self, work: EqualKeys) -> None:
        self.source, self.keys_of, self.folder = work.source, work.keys_of, work.folder

    def __call__(self, group: _Group) -> _Located:
        keys, codes, names = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.uint64)], []
        for number, (shard, rows) in enumerate(group.shards):
            place = 0
            for frame in frames(self.source, shard, rows):
                made, has_key = self.keys_of(frame)
                here = np.flatnonzero(has_key)
                keys.append(made[here])
                codes.append((here + place).astype(np.uint64) + np.uint64(number << _PLACE_BITS))
                ids = backend.arrow_values(frame[self.source.id_col])
                names.append(_names(number, ids, has_key))
                place += len(frame)
        key, code = np.concatenate(keys), np.concatenate(codes)
        order = np.lexsort((code, key[:, 1], key[:, 0]))
        table = np.column_stack([key, code])[order]
        options = self.source.storage_options
        with files.atomic_writer(_url(self.folder, "keys", group.number), options) as out:
            out.write(table.astype("<u8").tobytes())
        if names:
            parquet.write_groups(
                _url(self.folder, "names", group.number, ".parquet"), [pa.concat_tables(names)], options
            )
        edges = np.arange(2**SLOT_BITS, dtype=np.uint64) << np.uint64(64 - SLOT_BITS)
        return _Located(group.number, np.append(np.searchsorted(table[:, 0], edges), len(table)).astype(np.int64))


def _names(number: int, ids: pa.Array, has_key: npt.NDArray[np.bool_]) -> pa.Table:
    return pa.table({"shard": pa.array(np.full(len(ids), number, np.int32)), "id": ids, "has": pa.array(has_key)})


class _CompareRange:
    """Finds the keys of a range that stand more than once."""

    def __init__(self, work: EqualKeys, groups: Sequence[_Located]) -> None:
        self.folder, self.options = work.folder, work.source.storage_options
        self.groups = groups

    def __call__(self, item: tuple[int, tuple[int, int]]) -> _Located:
        number, (first, stop) = item
        parts, owners = [np.zeros((0, 3), np.uint64)], [np.zeros(0, np.int64)]
        for group in self.groups:
            start, end = int(group.starts[first]), int(group.starts[stop])
            if start < end:
                parts.append(_read(_url(self.folder, "keys", group.number), start, end, 3, self.options))
                owners.append(np.full(end - start, group.number))
        table, owner = np.concatenate(parts), np.concatenate(owners)
        order = np.lexsort((table[:, 1], table[:, 0]))  # stable: equal keys stay in the order of groups and rows
        table, owner = table[order], owner[order]
        counts, is_first = _count_runs(table[:, :2])
        many = counts > 1
        found = np.column_stack([table[many, 2], counts[many] << np.uint64(1) | ~is_first[many]])
        owner = owner[many]
        by_owner = np.argsort(owner, kind="stable")
        with files.atomic_writer(_url(self.folder, "found", number), self.options) as out:
            out.write(found[by_owner].astype("<u8").tobytes())
        return _Located(number, np.searchsorted(owner[by_owner], np.arange(len(self.groups) + 1)).astype(np.int64))


def _count_runs(keys: Table) -> tuple[Table, npt.NDArray[np.bool_]]:
    """Return, for each of sorted keys, how many equal it, and whether it is the first of them."""
    is_first = np.ones(len(keys), bool)
    is_first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(starts, len(keys)))
    return np.repeat(lengths, lengths).astype(np.uint64), is_first


class _GatherGroup:
    """Writes what was found of a group's rows, shard by shard."""

    def __init__(self, work: EqualKeys, ranges: Sequence[_Located]) -> None:
        self.source, self.folder, self.columns = work.source, work.folder, work.columns
        self.ranges = ranges

    def __call__(self, group: _Group) -> None:
        options = self.source.storage_options
        parts = [np.zeros((0, 2), np.uint64)]
        for one in self.ranges:
            start, stop = int(one.starts[group.number]), int(one.starts[group.number + 1])
            if start < stop:
                parts.append(_read(_url(self.folder, "found", one.number), start, stop, 2, options))
        found = np.concatenate(parts)
        url = _url(self.folder, "names", group.number, ".parquet")
        names = parquet.read_table(url, ["shard", "id", "has"], options)
        shard_of = names["shard"].to_numpy()
        for number, (shard, _) in enumerate(group.shards):
            here = names.filter(pa.array(shard_of == number))
            mine = found[(found[:, 0] >> np.uint64(_PLACE_BITS)) == number]
            self._write(shard, here, mine)

    def _write(self, shard: str, names: pa.Table, found: Table) -> None:
        counts = names["has"].to_numpy().astype(np.int64)
        repeated = np.zeros(len(names), bool)
        places = (found[:, 0] & np.uint64(2**_PLACE_BITS - 1)).astype(np.int64)
        counts[places] = (found[:, 1] >> np.uint64(1)).astype(np.int64)
        repeated[places] = (found[:, 1] & np.uint64(1)).astype(bool)
        table = pa.table({self.source.id_col: names["id"], self.columns[0]: counts, self.columns[1]: repeated})
        url = files.join(self.folder, ROWS, shard + ".parquet")
        parquet.write_groups(url, [table.combine_chunks()], self.source.storage_options)


def _read(url: str, start: int, stop: int, width: int, options: Any) -> Table:
    """Read rows of a file of numbers."""
    with open_source(url, options) as source:
        size = 8 * width
        blob = source.read_at(start * size, (stop - start) * size)
    return np.frombuffer(blob, "<u8").reshape(stop - start, width).astype(np.uint64, copy=False)
