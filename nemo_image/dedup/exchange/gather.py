"""Gather: bring what was found in the buckets back to the rows, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import schema
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.exchange.rows import HASH, ORDER
from nemo_image.dedup.exchange.runs import MAX_BUCKETS, read_batch, write_batches
from nemo_image.dedup.exchange.scatter import GROUP_SHIFT, ROWS, Scattered, members_url
from nemo_image.dedup.exchange.usable import BAD_VALUE, JUDGED
from nemo_image.errors import DatasetError
from nemo_image.shards import files, parquet

FOUND, DUPLICATES = "found", "duplicate_ids.parquet"
RANGE_ROWS = 2_000_000
"""Rows whose results are in memory at once."""

INTERNAL = ("row", "id", schema.SHARD, "twin", "visit", HASH, ORDER)
"""Columns of found files that no user sees."""


def range_of_groups(groups: Sequence[Scattered]) -> list[list[Scattered]]:
    """Cut groups into at most `MAX_BUCKETS` ranges of about `RANGE_ROWS` rows."""
    total = sum(one.rows for one in groups)
    wanted = max(RANGE_ROWS, -(-total // MAX_BUCKETS))
    ranges: list[list[Scattered]] = [[]]
    held = 0
    for one in groups:
        if held + one.rows > wanted and ranges[-1] and len(ranges) < MAX_BUCKETS:
            ranges.append([])
            held = 0
        ranges[-1].append(one)
        held += one.rows
    return ranges


def found_url(folder: str, bucket: int) -> str:
    """Return the file of what was found in a bucket."""
    return files.join(folder, FOUND, f"{bucket:04d}.arrow")


class WriteFound:
    """Writes what was found in a bucket, by the range of groups in which its rows lie.

    Parameters
    ----------
    folder : str
    ranges : sequence of list of Scattered
    """

    def __init__(self, folder: str, ranges: Sequence[list[Scattered]], storage_options: Any) -> None:
        self.folder = folder
        self.starts = np.array([groups[0].number for groups in ranges])
        self.storage_options = storage_options

    def __call__(self, number: int, table: pa.Table) -> None:
        """Write one bucket's; `table` has the column ``row``, the rows' numbers."""
        ranges = np.searchsorted(self.starts, table["row"].to_numpy() >> GROUP_SHIFT, side="right") - 1
        counts = np.bincount(ranges, minlength=len(self.starts))
        ordered = table.take(pa.array(np.argsort(ranges, kind="stable")))
        write_batches(found_url(self.folder, number), ordered, counts, self.storage_options)


def as_found(found: pa.Table) -> pa.Table:
    """Return what was found: one result a row already."""
    return found


@dataclass(frozen=True)
class Gathered:
    """Rows of a range of groups: those kept, and those removed."""

    kept: int
    removed: int


class GatherRange:
    """Writes the results of the rows of a range of groups: one file a shard, and the duplicates' ids.

    Parameters
    ----------
    scattered : str
        The folder with the groups.
    folder : str
        The folder with what was found, and for the results.
    settled : callable, optional
        Makes one result a row of what was found, where rows were judged in several buckets.
    """

    def __init__(
        self,
        scattered: str,
        folder: str,
        id_col: str,
        buckets: int,
        tier: str,
        storage_options: Any,
        settled: Callable[[pa.Table], pa.Table] = as_found,
    ) -> None:
        self.settled = settled
        self.id_col = id_col
        self.storage_options = storage_options
        self.scattered = scattered
        self.folder = folder
        self.buckets = buckets
        self.tier = tier

    def __call__(self, item: tuple[int, list[Scattered]]) -> Gathered:
        """Gather one range."""
        number, groups = item
        options = self.storage_options
        parts = [read_batch(found_url(self.folder, one), number, None, options) for one in range(self.buckets)]
        found = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
        found = self.settled(found)
        found = found.take(pc.sort_indices(found, sort_keys=[("row", "ascending")]))
        numbers = found["row"].to_numpy()
        removed = []
        for group in groups:
            start, stop = np.searchsorted(numbers, [group.number << GROUP_SHIFT, (group.number + 1) << GROUP_SHIFT])
            for shard, table in self._shards(group, found.slice(start, stop - start)):
                parquet.write_table(files.join(self.folder, ROWS, shard + ".parquet"), table, None, options)
                removed.append(self._removed(shard, table))
        if not removed:  # no row at all: the columns still tell what there would be
            members = parquet.read_table(members_url(self.scattered, groups[0].number), None, options)
            removed = [self._removed("", self._table(members, found, np.zeros(0, np.int64)))]
        duplicates = pa.concat_tables(removed)
        url = files.join(self.folder, DUPLICATES, f"part-{number:05d}.parquet")
        parquet.write_table(url, duplicates.unify_dictionaries(), None, options)
        return Gathered(len(found) - len(duplicates), len(duplicates))

    def _shards(self, group: Scattered, found: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        """Yield the results of each shard of a group, with reasons for the rows that could not be judged."""
        members = parquet.read_table(members_url(self.scattered, group.number), None, self.storage_options)
        states = members["state"].to_numpy()
        places = found["row"].to_numpy() - (group.number << GROUP_SHIFT)
        if not np.array_equal(places, np.flatnonzero(states == JUDGED)):
            raise DatasetError(
                f"group {group.number}: {len(places)} results for {(states == JUDGED).sum()} rows: please report this"
            )
        origin = np.full(len(members), -1, np.int64)
        origin[places] = np.arange(len(places))
        names = members.select([schema.SHARD]).unify_dictionaries()[schema.SHARD].combine_chunks()
        codes = names.indices.to_numpy()
        wanted = (states == JUDGED) | (states == BAD_VALUE)
        for code, shard in enumerate(names.dictionary.to_pylist()):
            rows = np.flatnonzero((codes == code) & wanted)
            yield shard, self._table(members.take(pa.array(rows)), found, origin[rows])

    def _table(self, members: pa.Table, found: pa.Table, origin: Any) -> pa.Table:
        take = pa.array(origin, mask=origin < 0)
        table = pa.table({self.id_col: members[self.id_col]})
        for name in found.column_names:
            if name not in INTERNAL:
                column = found[name].take(take)
                kind = schema.plain_type(column.type)
                table = table.append_column(name, column.cast(kind))
        duplicate = pc.fill_null(table[schema.IS_DUPLICATE], False)
        tiers = pc.if_else(duplicate, pa.scalar(self.tier), pa.scalar(None, pa.string()))
        return table.append_column(schema.DUPLICATE_TIER, tiers).append_column("reason", members["reason"])

    def _removed(self, shard: str, table: pa.Table) -> pa.Table:
        rows = table.filter(pc.fill_null(table[schema.IS_DUPLICATE], False))
        names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows), np.int32)), pa.array([shard], pa.string()))
        kept = [schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD, schema.DUPLICATE_TIER]
        columns = {schema.SHARD: names, self.id_col: rows[self.id_col]}
        return pa.table({**columns, **{name: rows[name] for name in kept}})


def gather(gathering: GatherRange, ranges: Sequence[list[Scattered]]) -> list[Gathered]:
    """Gather all ranges.

    Raises
    ------
    RunError
        If results could not be written.
    """
    return run_all(
        "write results",
        gathering,
        enumerate(ranges),
        len(ranges),
        name_of=lambda item: f"groups {item[1][0].number} to {item[1][-1].number}",
        rows_of=lambda one: one.kept + one.removed,
    )
