"""Judge the rows of one bucket, cluster by cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from nemo_image import schema
from nemo_image.dedup.clusters.bucket import OLD_RANK, Bucket, open_bucket
from nemo_image.dedup.clusters.missed import Counts, Probe
from nemo_image.dedup.exchange.rows import HASH, ORDER, Order
from nemo_image.dedup.pairs.judge import judge
from nemo_image.engine import threads

VISIT = "visit"
"""0 in the row's own cluster; the number of the probe where it is only compared with that cluster's rows."""

SAMPLED_CLUSTER_ROWS = 50_000
"""A larger cluster is not judged for a sample."""


@dataclass(frozen=True)
class Solved:
    """What a bucket gave.

    Attributes
    ----------
    judged : int
        Rows of the bucket that were judged.
    kept : list of int
        Of them, for each threshold.
    missed : ndarray of int64, shape (2, n_sampled), or None
        Neighbours of the sampled rows.
    """

    judged: int
    kept: list[int]
    missed: Counts | None


class Sink(Protocol):
    """Takes what was found in a bucket."""

    def __call__(self, number: int, table: pa.Table) -> None:
        """Write it."""


class SolveBucket:
    """Judges a bucket's rows.

    Parameters
    ----------
    sink : Sink or None
        Writes what is found; None to count only.
    urls : sequence of str
        The run files.
    thresholds : sequence of float
        Cosines; results are those of the first.
    only : frozenset of int, optional
        Judge these clusters alone, and of them those of at most `SAMPLED_CLUSTER_ROWS` rows.
    """

    def __init__(
        self,
        sink: Sink | None,
        urls: Sequence[str],
        thresholds: Sequence[float],
        representative: bool,
        order: Order,
        block_rows: int,
        probe: Probe | None,
        storage_options: Any,
        only: frozenset[int] | None = None,
        device: str = "cpu",
    ) -> None:
        self.sink = sink
        self.urls = list(urls)
        self.thresholds = list(thresholds)
        self.representative = representative
        self.order = order
        self.block_rows = block_rows
        self.probe = probe
        self.storage_options = storage_options
        self.only = only
        self.device = device

    def __call__(self, number: int) -> Solved:
        """Judge one bucket."""
        keys = self.order.sort_keys(schema.CLUSTER, OLD_RANK)
        with (
            threads.torch_threads(threads.task_share()),
            open_bucket(self.urls, number, keys, self.storage_options) as bucket,
        ):
            solved, table = self._solve(bucket)
        if self.sink is not None:
            self.sink(number, table)
        return solved

    def _solve(self, bucket: Bucket) -> tuple[Solved, pa.Table]:
        table = bucket.table
        rows = len(table)
        similarity = np.zeros(rows, np.float32)
        twin = np.full(rows, -1, np.int64)
        fell = np.zeros((len(self.thresholds), rows), bool)
        rank = np.zeros(rows, np.int64)
        looked_at = np.zeros(rows, bool)
        new = np.asarray(table[OLD_RANK].is_null())
        visits = table[VISIT].to_numpy() > 0
        hashes = table[HASH].to_numpy()
        missed = None if self.probe is None else np.zeros((2, len(self.probe.hashes)), np.int64)
        for cluster, start, stop in bucket.clusters():
            if self.only is not None and (cluster not in self.only or stop - start > SAMPLED_CLUSTER_ROWS):
                continue
            vectors = bucket.vectors(start, stop)
            inside = slice(start, stop)
            looked_at[inside] = True
            fixed = int((~new[inside]).sum())
            found = judge(
                vectors,
                self.thresholds,
                representative=self.representative,
                fixed=fixed,
                silent=visits[inside] if visits[inside].any() else None,
                block_rows=self.block_rows,
                device=self.device,
            )
            similarity[inside] = found.similarity[0]
            twin[inside] = np.where(found.twin[0] < 0, -1, found.twin[0] + start)
            limits = np.array(self.thresholds)[:, None]
            fell[:, inside] = (found.similarity.astype(np.float64) >= limits) & (found.twin >= 0)
            rank[inside] = np.arange(stop - start)
            if self.probe is not None and missed is not None:
                home = np.flatnonzero(~visits[inside])
                missed += self.probe.count(cluster, vectors, home, hashes[inside])
        judged = new & ~visits & looked_at
        kept = (~fell[:, judged]).sum(axis=1).tolist()
        return Solved(int(judged.sum()), kept, missed), self._found(table, similarity, twin, fell[0], rank, new)

    def _found(self, table: pa.Table, similarity: Any, twin: Any, removed: Any, rank: Any, new: Any) -> pa.Table:
        """Return the results of the rows that are new."""
        take = pa.array(twin, mask=~removed)
        made = pa.table(
            {
                **{name: table[name] for name in (HASH, ORDER) if name in table.column_names},
                "row": table["row"],
                "id": table["id"],
                schema.SHARD: table[schema.SHARD],
                "twin": table["row"].take(take),
                VISIT: table[VISIT],
                schema.IS_DUPLICATE: pa.array(removed),
                schema.DUPLICATE_OF: table["id"].take(take),
                schema.DUPLICATE_OF_SHARD: table[schema.SHARD].take(take),
                schema.CLUSTER: table[schema.CLUSTER],
                schema.CENTROID_DISTANCE: table[schema.CENTROID_DISTANCE],
                schema.MAX_SIMILARITY: pa.array(similarity),
                "rank": pa.array(rank),
            }
        )
        return made.filter(pa.array(new))
