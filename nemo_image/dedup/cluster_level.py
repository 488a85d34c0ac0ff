"""The second step of semantic deduplication on its own, as published."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.clusters.clustering import Clustered
from nemo_image.dedup.clusters.solve import SolveBucket
from nemo_image.dedup.exchange.gather import DUPLICATES
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.exchange.work import begin, remove
from nemo_image.dedup.result import write_summary
from nemo_image.dedup.sweep import is_eps
from nemo_image.engine.device import worker_device
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.shards import files, parquet

MATCHES = "matches"
EVERY = 0.0
"""A cosine that every row reaches that has a row before it at all: similarities are never below 0."""


class SemanticClusterLevelDedup:
    """Compares the rows of each cluster of a :class:`ClusteringModel` with those judged before them.

    As published (SemDeDup, Abbas et al., arXiv 2303.09540), chains included: a row may fall to a row that falls itself.
    :class:`SemanticDedup` with ``representative=True`` does not do that.

    Parameters
    ----------
    n_clusters : int
        As the clustering's.
    emb_by_clust_dir : str
        The clustering's ``clustering_output_dir``.
    id_column : str, optional
        As the clustering's; None takes that.
    which_to_keep : {"hard", "easy", "random"}, default "hard"
    sim_metric : {"cosine", "l2"}, default "cosine"
        By which distance from the centroid rows are ordered. Within a cluster both give one order, because the vectors
        are of length 1: ``|x - c|^2 = 1 + |c|^2 - 2 x.c``.
    output_dir : str, default "./deduplication_results"
    embedding_column : str, default "image_embedding"
        As the clustering's.
    batched_cosine_similarity : int, default 1024
        Rows compared at once. Changes memory and speed, never the result.
    storage_options : dict, optional
        Passed to fsspec.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    def __init__(
        self,
        n_clusters: int,
        emb_by_clust_dir: str | os.PathLike[str],
        id_column: str | None = None,
        which_to_keep: Literal["hard", "easy", "random"] = "hard",
        sim_metric: Literal["cosine", "l2"] = "cosine",
        output_dir: str | os.PathLike[str] = "./deduplication_results",
        embedding_column: str = schema.IMAGE_EMBEDDING,
        batched_cosine_similarity: int = 1024,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if sim_metric not in ("cosine", "l2"):
            raise ArgumentError(f"sim_metric must be 'cosine' or 'l2', not {sim_metric!r}")
        if not isinstance(batched_cosine_similarity, int) or batched_cosine_similarity < 1:
            raise ArgumentError(
                f"batched_cosine_similarity must be a whole number, at least 1, not {batched_cosine_similarity!r}"
            )
        if Order.of(which_to_keep).column:
            raise ArgumentError(
                "which_to_keep: the files of a ClusteringModel hold no columns to keep by; SemanticDedup can"
            )
        self.n_clusters = n_clusters
        self.emb_by_clust_dir = files.folder(emb_by_clust_dir)
        self.id_column = id_column
        self.which_to_keep = which_to_keep
        self.sim_metric = sim_metric
        self.output_dir = files.folder(output_dir)
        self.embedding_column = embedding_column
        self.batched_cosine_similarity = batched_cosine_similarity
        self.storage_options = dict(storage_options or {})

    def compute_semantic_match_dfs(self) -> None:
        """Find each row's nearest row among those judged before it; write that to ``matches/`` in `output_dir`.

        One Parquet file a range of clusters: ``shard``, the id, ``cluster``, ``cosine_dist_to_cent``,
        ``max_similarity``, ``duplicate_of`` and ``duplicate_of_shard`` (of that nearest row, whatever its similarity).

        Raises
        ------
        DatasetError
            If there is no finished clustering, or `output_dir` holds something else.
        ArgumentError
            If the clustering is another than the arguments say.
        RunError
            If files could not be read or written.
        """
        clustered = self._clustered()
        plan = {
            "operator": "SemanticClusterLevelDedup",
            "token": str(tokenize(clustered.centroids.digest, clustered.urls, self.which_to_keep)),
        }
        options = self.storage_options
        with run_lock(self.output_dir, "dedup", options):
            begin(self.output_dir, plan, options, named_by_user=True)
            solving = SolveBucket(
                WriteMatches(self.output_dir, clustered.id_column, options),
                clustered.urls,
                [EVERY],
                False,
                Order.of(self.which_to_keep),
                self.batched_cosine_similarity,
                None,
                options,
                device=worker_device(),
            )
            run_all(
                "compare rows",
                solving,
                range(clustered.buckets),
                clustered.buckets,
                name_of=lambda number: f"bucket {number}",
                rows_of=lambda one: one.judged,
            )

    def extract_dedup_data(self, eps_to_extract: float) -> Any:
        """Write which rows a threshold removes: ``duplicate_ids.parquet`` and ``dedup_summary.csv``.

        Parameters
        ----------
        eps_to_extract : float
            A row is removed if its similarity to a row judged before it is at least ``1 - eps_to_extract``.

        Returns
        -------
        dask.dataframe.DataFrame
            The rows to remove: ``shard``, the id, ``duplicate_of``, ``duplicate_of_shard``, ``duplicate_tier``.

        Raises
        ------
        ArgumentError
            If the threshold is out of range.
        DatasetError
            If :meth:`compute_semantic_match_dfs` is not done.
        """
        if not is_eps(eps_to_extract):
            raise ArgumentError(f"eps_to_extract must lie in [0, 1], not {eps_to_extract!r}")
        clustered, options = self._clustered(), self.storage_options
        missing = [number for number in range(clustered.buckets) if not self._has_matches(number)]
        if missing:
            raise DatasetError(
                f"{self.output_dir} lacks the matches of {len(missing)} of {clustered.buckets} ranges of clusters: "
                "call compute_semantic_match_dfs() first"
            )
        with run_lock(self.output_dir, "dedup", options):
            remove(files.join(self.output_dir, DUPLICATES), options)
            extracting = ExtractDuplicates(self.output_dir, 1.0 - eps_to_extract, options)
            counts = run_all("extract duplicates", extracting, range(clustered.buckets), clustered.buckets)
            removed = sum(counts)
            write_summary(self.output_dir, [(eps_to_extract, clustered.judged - removed, removed)], options)
        urls = [duplicates_url(self.output_dir, number) for number in range(clustered.buckets)]
        reading = ReadTable(options)
        return dd.from_map(reading, urls, meta=reading(urls[0]).iloc[:0])

    def _clustered(self) -> Clustered:
        found = Clustered.read(self.emb_by_clust_dir, self.storage_options)
        if found is None:
            raise DatasetError(
                f"{self.emb_by_clust_dir} holds no finished clustering: give the clustering_output_dir of a "
                "ClusteringModel"
            )
        wanted = {
            "n_clusters": (self.n_clusters, found.centroids.shape[0]),
            "id_column": (self.id_column or found.id_column, found.id_column),
            "embedding_column": (self.embedding_column, found.embedding_column),
        }
        for name, (mine, theirs) in wanted.items():
            if mine != theirs:
                raise ArgumentError(f"{name} is {mine!r}, but the clustering in {self.emb_by_clust_dir} has {theirs!r}")
        return replace(found, order=Order.of(self.which_to_keep))

    def _has_matches(self, number: int) -> bool:
        return files.exists(matches_url(self.output_dir, number), self.storage_options)


class WriteMatches:
    """Writes each row's nearest earlier row, bucket by bucket."""

    def __init__(self, folder: str, id_column: str, storage_options: Any) -> None:
        self.folder = folder
        self.id_column = id_column
        self.storage_options = storage_options

    def __call__(self, number: int, table: pa.Table) -> None:
        """Write one bucket's."""
        names = [
            schema.SHARD,
            "id",
            schema.CLUSTER,
            schema.CENTROID_DISTANCE,
            schema.MAX_SIMILARITY,
            schema.DUPLICATE_OF,
            schema.DUPLICATE_OF_SHARD,
        ]
        made = table.select(names).rename_columns([self.id_column if name == "id" else name for name in names])
        parquet.write_table(matches_url(self.folder, number), made, None, self.storage_options)


class ExtractDuplicates:
    """Writes which rows of a bucket fall at a threshold."""

    def __init__(self, folder: str, threshold: float, storage_options: Any) -> None:
        self.folder = folder
        self.threshold = threshold
        self.storage_options = storage_options

    def __call__(self, number: int) -> int:
        """Write one bucket's; return how many there are."""
        table = parquet.read_table(matches_url(self.folder, number), None, self.storage_options)
        near = pc.greater_equal(table[schema.MAX_SIMILARITY].cast(pa.float64()), self.threshold)
        removed = table.filter(pc.and_(near, table[schema.DUPLICATE_OF].is_valid()))
        names = [table.column_names[0], table.column_names[1], schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD]
        made = removed.select(names).append_column(
            schema.DUPLICATE_TIER, pa.array(["semantic"] * len(removed), pa.string())
        )
        parquet.write_table(duplicates_url(self.folder, number), made, None, self.storage_options)
        return len(removed)


class ReadTable:
    """Reads a Parquet file as a frame of Arrow columns."""

    def __init__(self, storage_options: Any) -> None:
        self.storage_options = storage_options

    def __call__(self, url: str) -> pd.DataFrame:
        """Return the rows."""
        table = parquet.read_table(url, None, self.storage_options)
        index = pd.RangeIndex(len(table))
        return pd.DataFrame({name: backend.series_of(table[name], index) for name in table.column_names}, index=index)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ReadTable",)


def matches_url(folder: str, number: int) -> str:
    """Return the file of a bucket's matches."""
    return files.join(folder, MATCHES, f"{number:04d}.parquet")


def duplicates_url(folder: str, number: int) -> str:
    """Return the file of a bucket's rows to remove."""
    return files.join(folder, DUPLICATES, f"part-{number:05d}.parquet")
