"""Settle what rows found in other clusters than their own (``n_probe > 1``).

Within its own cluster, each row was compared with the rows that stay there. Now a row that stays may be a copy of one
that stays in another cluster. It falls, unless rows that fell to it would be left without a kept twin: each of those
must have a kept twin in another cluster too. Rows are settled in the order in which they are judged, so that the result
depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import schema
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.clusters.solve import VISIT
from nemo_image.dedup.exchange.gather import found_url
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.exchange.runs import read_batches, write_batches
from nemo_image.shards import files

FIXES = "settled.arrow"
CROSS = "cross"

_VERDICT = [schema.MAX_SIMILARITY, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD]


@dataclass
class Settling:
    """Decides which rows fall to rows of other clusters.

    Parameters
    ----------
    home : dict of int to (bool, int)
        Of rows with a twin in another cluster: whether they fell in their own, and to which row.
    cross : dict of int to int
        Their twin in another cluster.
    dependants : dict of int to list of int
        The rows that fell to each in its own cluster.
    """

    home: Mapping[int, tuple[bool, int]]
    cross: Mapping[int, int]
    dependants: Mapping[int, Sequence[int]]
    fallen: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)

    def run(self, ordered: Sequence[int]) -> None:
        """Settle rows in their order."""
        for row in ordered:
            if not self.home[row][0] and self._may_fall(row):
                self.fallen.add(row)
                # These are twins now: they stay.
                self.pinned |= {self.cross[one] for one in (row, *self.dependants.get(row, ()))}

    def _may_fall(self, row: int) -> bool:
        others = [self.cross.get(one) for one in self.dependants.get(row, ())]
        return (
            row not in self.pinned
            and self.cross[row] not in self.fallen
            and all(other is not None and other not in self.fallen for other in others)
        )


class SelectCross:
    """Collects a bucket's rows that have a twin in a cluster that they visit."""

    def __init__(self, folder: str, storage_options: Any) -> None:
        self.folder = folder
        self.storage_options = storage_options

    def __call__(self, number: int) -> str:
        """Write one bucket's; return the file."""
        parts = []
        for table in read_batches(found_url(self.folder, number), None, self.storage_options):
            chosen = pc.and_(pc.greater(table[VISIT], 0), table[schema.IS_DUPLICATE])
            parts.append(table.filter(chosen))
        made = pa.concat_tables(parts).combine_chunks()
        url = files.join(self.folder, CROSS, f"{number:04d}.arrow")
        write_batches(url, made, np.array([len(made)]), self.storage_options)
        return url


class SelectHome:
    """Collects what became of rows, and of those that fell to them, in their own cluster."""

    def __init__(self, folder: str, rows_url: str, storage_options: Any) -> None:
        self.folder = folder
        self.rows_url = rows_url
        self.storage_options = storage_options

    def __call__(self, number: int) -> pa.Table:
        """Return one bucket's."""
        rows = next(read_batches(self.rows_url, None, self.storage_options))["row"].combine_chunks()
        parts = []
        for table in read_batches(
            found_url(self.folder, number), ["row", "twin", VISIT, schema.IS_DUPLICATE], self.storage_options
        ):
            named = pc.or_(pc.is_in(table["row"], rows), pc.is_in(table["twin"], rows))
            parts.append(table.filter(pc.and_(pc.equal(table[VISIT], 0), named)))
        return pa.concat_tables(parts).select(["row", "twin", schema.IS_DUPLICATE])


def settle(folder: str, buckets: int, order: Order, storage_options: Any) -> None:
    """Settle all rows; write what changes to a file."""
    urls = run_all("compare across clusters", SelectCross(folder, storage_options), range(buckets), buckets)
    tables = [table for url in urls for table in read_batches(url, None, storage_options)]
    cross = _best(pa.concat_tables(tables).combine_chunks(), order)
    rows_url = files.join(folder, CROSS, "rows.arrow")
    write_batches(rows_url, cross.select(["row"]), np.array([len(cross)]), storage_options)
    found = pa.concat_tables(
        run_all("look at twins", SelectHome(folder, rows_url, storage_options), range(buckets), buckets)
    )
    rows, twins = cross["row"].to_pylist(), cross["twin"].to_pylist()
    home: dict[int, tuple[bool, int]] = {}
    dependants: dict[int, list[int]] = {}
    for row, twin, fell in zip(*(found[name].to_pylist() for name in found.column_names), strict=True):
        home[row] = (fell, twin)
        if fell:
            dependants.setdefault(twin, []).append(row)
    settling = Settling(home, dict(zip(rows, twins, strict=True)), dependants)
    settling.run(rows)
    changed = settling.fallen | {one for row in settling.fallen for one in dependants.get(row, ())}
    fixes = cross.filter(pa.array([row in changed for row in rows], pa.bool_())).select(["row", *_VERDICT])
    fixes = fixes.take(pc.sort_indices(fixes, sort_keys=[("row", "ascending")]))
    write_batches(files.join(folder, FIXES), fixes, np.array([len(fixes)]), storage_options)


def _best(cross: pa.Table, order: Order) -> pa.Table:
    """Return the nearest twin of each row, in the order in which rows are judged."""
    keys = [("row", "ascending"), (schema.MAX_SIMILARITY, "descending"), (VISIT, "ascending")]
    cross = cross.take(pc.sort_indices(cross, sort_keys=keys))
    first = np.flatnonzero(np.diff(cross["row"].to_numpy(), prepend=-1))
    cross = cross.take(pa.array(first))
    return cross.take(pc.sort_indices(cross, sort_keys=order.sort_keys()))


class ApplyFixes:
    """Makes one result a row of what was found in the rows' own clusters, and of what was settled later."""

    def __init__(self, folder: str, storage_options: Any) -> None:
        self.folder = folder
        self.storage_options = storage_options

    def __call__(self, found: pa.Table) -> pa.Table:
        """Return the results."""
        found = found.filter(pc.equal(found[VISIT], 0))
        fixes = next(read_batches(files.join(self.folder, FIXES), None, self.storage_options))
        places = pc.index_in(found["row"].combine_chunks(), value_set=fixes["row"].combine_chunks())
        fixed = places.is_valid()
        for name in _VERDICT:
            column = pc.if_else(fixed, fixes[name].take(places).combine_chunks(), found[name].combine_chunks())
            found = found.set_column(found.column_names.index(name), name, column)
        duplicate = pc.or_(found[schema.IS_DUPLICATE], fixed)
        return found.set_column(found.column_names.index(schema.IS_DUPLICATE), schema.IS_DUPLICATE, duplicate)


def best_of_visits(found: pa.Table) -> pa.Table:
    """Return, for each row, what it found in the cluster where its nearest earlier row lies."""
    keys = [("row", "ascending"), (schema.MAX_SIMILARITY, "descending"), (VISIT, "ascending")]
    best = found.take(pc.sort_indices(found, sort_keys=keys))
    best = best.take(pa.array(np.flatnonzero(np.diff(best["row"].to_numpy(), prepend=-1))))
    own = found.filter(pc.equal(found[VISIT], 0))
    own = own.take(pc.sort_indices(own, sort_keys=[("row", "ascending")]))
    # The cluster is the row's own, wherever its twin was found.
    for name in (schema.CLUSTER, "rank", VISIT):
        best = best.set_column(best.column_names.index(name), name, own[name])
    return best
