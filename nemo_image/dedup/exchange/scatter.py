"""Scatter: read shards, and write their rows by bucket, each row with its number.

A row's number says its group of shards (the higher bits) and its place in the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.partitions import PartitionTask, ShardTasks
from nemo_image.datasets.passes import run_all
from nemo_image.datasets.row_windows import frames
from nemo_image.datasets.source import DatasetSource
from nemo_image.dedup.exchange.rows import Hashes, row_hashes
from nemo_image.dedup.exchange.runs import RUN_BYTES, RunWriter
from nemo_image.dedup.exchange.survey import ShardCount
from nemo_image.dedup.exchange.usable import BAD_VALUE, JUDGED, NO_VALUE, PASSED_BY
from nemo_image.dedup.exchange.work import read_json, write_json
from nemo_image.shards import files, parquet

GROUP_SHIFT = 40
"""Bits of a row's number that say its place in its group."""

MAX_GROUPS = 8192
MAX_GROUP_BYTES = 2**30

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Keyed:
    """Rows of a frame with what brings them to their bucket.

    Attributes
    ----------
    table : pyarrow.Table
        One row for each of `rows`.
    rows : ndarray of int64
        Positions in the frame; they may repeat.
    buckets : ndarray of int
        Of each of `rows`.
    states : ndarray of int8
        Of all rows of the frame.
    reasons : dict of int to str
        Values of ``image_error``, by position.
    """

    table: pa.Table
    rows: Positions
    buckets: npt.NDArray[Any]
    states: npt.NDArray[np.int8]
    reasons: dict[int, str]


class Keying(Protocol):
    """Makes rows of a frame ready for their bucket."""

    def __call__(self, frame: pd.DataFrame, hashes: Hashes) -> Keyed:
        """Return the rows to judge, given the frame and its rows' hashes."""


@dataclass(frozen=True)
class Group:
    """Consecutive shards that one task scatters."""

    number: int
    shards: list[tuple[str, PartitionTask]]


def make_groups(counts: Sequence[ShardCount], tasks: ShardTasks, row_bytes: int, first: int = 0) -> Iterator[Group]:
    """Cut shards into groups of about one run file's size; numbered from `first`."""
    total = sum(one.judged for one in counts) * row_bytes
    wanted = min(max(RUN_BYTES, total // MAX_GROUPS), MAX_GROUP_BYTES)
    rows = {one.shard: one.judged for one in counts}
    number, held = first, 0
    shards: list[tuple[str, PartitionTask]] = []
    for shard, task in tasks:
        shards.append((shard, task))
        held += rows[shard] * row_bytes
        if held >= wanted:
            yield Group(number, shards)
            number, held, shards = number + 1, 0, []
    if shards:
        yield Group(number, shards)


@dataclass(frozen=True)
class Scattered:
    """What a group gave.

    Attributes
    ----------
    rows, passed_by, no_value, bad_value, judged : int
        All rows, and those of each state.
    """

    number: int
    urls: list[str]
    rows: int
    passed_by: int
    no_value: int
    bad_value: int
    judged: int


class ScatterGroup:
    """Scatters a group of shards; takes over what an earlier run finished.

    Parameters
    ----------
    source : DatasetSource
    folder : str
    keying : Keying
    buckets : int
    id_column : str
    seed : int
        Of the rows' hashes.
    rows_columns : sequence of str, optional
        Columns of the keyed rows that are written for each shard too, as results.
    prefix : str
        Set before the shards' names.
    """

    def __init__(
        self,
        source: DatasetSource,
        folder: str,
        keying: Keying,
        buckets: int,
        id_column: str,
        seed: int,
        rows_columns: Sequence[str] = (),
        prefix: str = "",
    ) -> None:
        self.source = source
        self.folder = folder
        self.keying = keying
        self.buckets = buckets
        self.id_column = id_column
        self.seed = seed
        self.rows_columns = list(rows_columns)
        self.prefix = prefix

    def __call__(self, group: Group) -> Scattered:
        """Scatter one group."""
        options = self.source.storage_options
        record = files.join(self.folder, GROUPS, f"{group.number:06d}.json")
        before = read_json(record, options)
        if before is not None:
            return Scattered(**before)
        made = self._scatter(group)
        write_json(record, made.__dict__, options)
        return made

    def _scatter(self, group: Group) -> Scattered:
        options = self.source.storage_options
        runs = RunWriter(files.join(self.folder, RUNS, f"{group.number:06d}"), self.buckets, options)
        counts = np.zeros(4, np.int64)
        members: Any = None
        position = 0
        with ExitStack() as stack:
            for shard, task in group.shards:
                results: list[pa.Table] = []
                for frame in frames(self.source, shard, task):
                    keyed = self.keying(frame, self._hashes(shard, frame))
                    runs.add(self._named(keyed, frame, shard, group.number, position), keyed.buckets)
                    table = self._members(keyed, frame, shard)
                    if members is None:
                        writer = parquet.table_writer(members_url(self.folder, group.number), table.schema, options)
                        members = stack.enter_context(writer)
                    members.write(table)
                    if self.rows_columns:
                        results.append(self._results(keyed, table))
                    counts += np.bincount(keyed.states, minlength=4)
                    position += len(frame)
                if results:
                    url = files.join(self.folder, ROWS, shard + ".parquet")
                    parquet.write_table(url, pa.concat_tables(results), None, options)
            runs.close()
        counted = {"passed_by": PASSED_BY, "no_value": NO_VALUE, "bad_value": BAD_VALUE, "judged": JUDGED}
        return Scattered(
            group.number, runs.urls, position, **{name: int(counts[state]) for name, state in counted.items()}
        )

    def _hashes(self, shard: str, frame: pd.DataFrame) -> Hashes:
        return row_hashes([shard] * len(frame), frame[self.id_column].tolist(), self.seed)

    def _named(self, keyed: Keyed, frame: pd.DataFrame, shard: str, group: int, first: int) -> pa.Table:
        """Return the rows with their numbers, ids and shard."""
        ids = backend.arrow_values(frame[self.id_column]).take(pa.array(keyed.rows))
        numbers = (group << GROUP_SHIFT) + first + keyed.rows
        names = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(len(keyed.rows), np.int32)), pa.array([self.prefix + shard], pa.string())
        )
        table = keyed.table.append_column("row", pa.array(numbers))
        return table.append_column("id", ids).append_column("shard", names)

    def _results(self, keyed: Keyed, members: pa.Table) -> pa.Table:
        """Return what is known by now of the rows that are judged, or cannot be."""
        origin = np.full(len(members), -1, np.int64)
        origin[keyed.rows[::-1]] = np.arange(len(keyed.rows))[::-1]  # the first of those that repeat
        rows = pa.array(np.flatnonzero((keyed.states == JUDGED) | (keyed.states == BAD_VALUE)))
        take = pa.array(origin, mask=origin < 0).take(rows)
        names = [self.source.id_col, "reason"]
        found = {name: keyed.table[name].take(take) for name in self.rows_columns}
        return pa.table({**{name: members[name].take(rows) for name in names}, **found})

    def _members(self, keyed: Keyed, frame: pd.DataFrame, shard: str) -> pa.Table:
        """Return one row for each of the frame's, to bring results back to."""
        reasons = [keyed.reasons.get(row) for row in range(len(frame))]
        names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(frame), np.int32)), pa.array([shard], pa.string()))
        return pa.table(
            {
                schema.SHARD: names,
                self.source.id_col: backend.arrow_values(frame[self.source.id_col]),
                "state": pa.array(keyed.states),
                "reason": pa.array(reasons, pa.string()),
            }
        )


GROUPS, RUNS, ROWS = "groups", "runs", "rows"


def members_url(folder: str, group: int) -> str:
    """Return the file that names the rows of a group."""
    return files.join(folder, GROUPS, f"{group:06d}.parquet")


def scatter(scattering: ScatterGroup, groups: Sequence[Group], label: str = "scatter rows") -> list[Scattered]:
    """Scatter all groups.

    Raises
    ------
    RunError
        Naming the shards of the groups that failed.
    """
    return run_all(
        label,
        scattering,
        groups,
        len(groups),
        name_of=lambda group: f"shards {group.shards[0][0]} to {group.shards[-1][0]}",
        rows_of=lambda one: one.rows,
    )
