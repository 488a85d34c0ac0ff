"""Bring rows to the bucket of their embedding's cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from nemo_image import backend, schema
from nemo_image.datasets.load import id_positions
from nemo_image.dedup.clusters.bucket import OLD_RANK, VECTOR
from nemo_image.dedup.clusters.centroids import Centroids
from nemo_image.dedup.clusters.nearest import nearest_centroids
from nemo_image.dedup.clusters.sample import vector_column
from nemo_image.dedup.clusters.solve import VISIT
from nemo_image.dedup.exchange.rows import HASH, ORDER, Hashes, Order
from nemo_image.dedup.exchange.scatter import Keyed
from nemo_image.dedup.exchange.usable import usable_vectors
from nemo_image.engine import threads
from nemo_image.shards import files, parquet

GENERATION_SHIFT = 40


def bucket_of(clusters: npt.NDArray[Any], n_clusters: int, buckets: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each cluster: consecutive clusters share one."""
    return clusters.astype(np.int64) * buckets // n_clusters


class AssignClusters:
    """Finds the nearest centroids of each row to judge.

    Parameters
    ----------
    centroids : Centroids
    n_probe : int
        Each row goes to its own cluster and, to be compared only, to the ``n_probe - 1`` next nearest.
    device : str
        Where torch looks for them.
    """

    def __init__(
        self, column: str, centroids: Centroids, n_probe: int, buckets: int, order: Order, device: str = "cpu"
    ) -> None:
        self.column = column
        self.centroids = centroids
        self.n_probe = n_probe
        self.buckets = buckets
        self.order = order
        self.device = device

    def __call__(self, frame: pd.DataFrame, hashes: Hashes) -> Keyed:
        """Return the rows to judge, once for each of their clusters."""
        centroids = self.centroids.load()
        matrix, rows, states, reasons = usable_vectors(frame, self.column, centroids.shape[1])
        matrix = matrix.reshape(-1, centroids.shape[1])
        with threads.torch_threads(threads.task_share()):
            clusters, distance = nearest_centroids(matrix, centroids, self.n_probe, self.device)
        own = np.repeat(np.arange(len(rows)), self.n_probe)
        columns = {
            schema.CLUSTER: pa.array(clusters.reshape(-1)),
            schema.CENTROID_DISTANCE: pa.array(distance[own]),
            VISIT: pa.array(np.tile(np.arange(self.n_probe, dtype=np.int16), len(rows))),
            OLD_RANK: pa.nulls(len(own), pa.int64()),
            HASH: pa.array(hashes[rows][own]),
        }
        if self.order.column:
            values = backend.arrow_values(frame[self.order.name])
            columns[ORDER] = values.take(pa.array(rows[own]))
        columns[VECTOR] = vector_column(matrix[own] if self.n_probe > 1 else matrix)
        buckets = bucket_of(clusters.reshape(-1), len(centroids), self.buckets)
        return Keyed(pa.table(columns), rows[own], buckets, states, reasons)


class TakeSurvivors:
    """Brings the rows that an earlier result kept to their clusters again.

    Parameters
    ----------
    folder : str
        Of the earlier result.
    generation : int
        0 for the oldest.
    order_type : pyarrow.DataType or None
        The type of the order column of the rows to judge; None if there is none.
    """

    def __init__(
        self,
        folder: str,
        id_col: str,
        column: str,
        shape: tuple[int, int],
        buckets: int,
        generation: int,
        order_type: pa.DataType | None,
        storage_options: Any,
    ) -> None:
        self.folder = folder
        self.id_col = id_col
        self.column = column
        self.shape = shape
        self.buckets = buckets
        self.generation = generation
        self.order_type = order_type
        self.storage_options = storage_options

    def __call__(self, frame: pd.DataFrame, hashes: Hashes) -> Keyed:
        """Return the rows that were kept."""
        n_clusters, size = self.shape
        matrix, rows, states, reasons = usable_vectors(frame, self.column, size)
        earlier = self._earlier(frame)
        taken = earlier["kept"].to_numpy(zero_copy_only=False)[rows]
        matrix, rows = matrix[taken].reshape(-1, size), rows[taken]
        found = earlier.take(pa.array(rows))
        clusters = found[schema.CLUSTER].to_numpy()
        columns = {
            schema.CLUSTER: found[schema.CLUSTER].combine_chunks(),
            schema.CENTROID_DISTANCE: found[schema.CENTROID_DISTANCE].combine_chunks(),
            VISIT: pa.array(np.zeros(len(rows), np.int16)),
            OLD_RANK: pa.array(found["rank"].to_numpy() + (self.generation << GENERATION_SHIFT)),
            HASH: pa.array(hashes[rows]),
        }
        if self.order_type is not None:
            columns[ORDER] = pa.nulls(len(rows), self.order_type)
        columns[VECTOR] = vector_column(matrix)
        return Keyed(pa.table(columns), rows, bucket_of(clusters, n_clusters, self.buckets), states, reasons)

    def _earlier(self, frame: pd.DataFrame) -> pa.Table:
        """Return what the earlier result said of each row of a frame of one shard."""
        kinds = {schema.CLUSTER: pa.int32(), schema.CENTROID_DISTANCE: pa.float32(), "rank": pa.int64()}
        shards = frame[schema.SHARD].unique()
        url = files.join(self.folder, "rows", f"{shards[0]}.parquet") if len(shards) else ""
        if not url or not files.exists(url, self.storage_options):
            nothing = {name: pa.nulls(len(frame), kind) for name, kind in kinds.items()}
            return pa.table({**nothing, "kept": pa.array(np.zeros(len(frame), bool))})
        names = [self.id_col, *kinds, schema.IS_DUPLICATE]
        table = parquet.read_table(url, names, self.storage_options)
        positions = id_positions(backend.arrow_values(frame[self.id_col]), table[self.id_col], url)
        found = table.take(pa.array(positions, mask=positions < 0))
        kept = pa.compute.fill_null(pa.compute.invert(found[schema.IS_DUPLICATE]), False)
        return found.select(list(kinds)).append_column("kept", kept)
