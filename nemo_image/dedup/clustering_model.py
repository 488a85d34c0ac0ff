"""The first step of semantic deduplication on its own, with files behind it."""

from __future__ import annotations

import os
from typing import Any

from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup.clusters.clustering import ClusterSettings, cluster
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.exchange.work import begin
from nemo_image.dedup.result import ResultColumns, add_columns
from nemo_image.dedup.semantic_run import work_of
from nemo_image.engine.run_lock import run_lock
from nemo_image.shards import files


class ClusteringModel:
    """Clusters embeddings by k-means, and writes the rows by cluster to files.

    :class:`SemanticClusterLevelDedup` works on those files. :class:`SemanticDedup` does both steps.

    Parameters
    ----------
    id_column : str, optional
        The column that names rows in results; the dataset's ``id_col`` by default.
    max_iter : int, default 100
        Iterations of k-means at most.
    n_clusters : int, default 1000
    clustering_output_dir : str, default "./clustering_results"
        The folder of the files: ``kmeans_centroids.npy`` (float32, one row a cluster) and the rows.
    embedding_column : str, default "image_embedding"
    random_state : int, default 1234
    fit_rows : int, optional
        Rows that k-means is fitted on, chosen by a hash of (shard, id); 256 for each cluster by default.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    def __init__(
        self,
        id_column: str | None = None,
        max_iter: int = 100,
        n_clusters: int = 1000,
        clustering_output_dir: str | os.PathLike[str] = "./clustering_results",
        embedding_column: str = schema.IMAGE_EMBEDDING,
        random_state: int = 1234,
        fit_rows: int | None = None,
    ) -> None:
        self.id_column = id_column
        self.max_iter = max_iter
        self.n_clusters = n_clusters
        self.clustering_output_dir = files.folder(clustering_output_dir)
        self.embedding_column = embedding_column
        self.random_state = random_state
        self.fit_rows = fit_rows
        self._settings("").check()

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Cluster now; return the dataset with ``cluster``, ``cosine_dist_to_cent`` and ``image_error``.

        Raises
        ------
        MissingColumnError, ArgumentError, EmbeddingError, DatasetError, RunError
            As :class:`SemanticDedup` does.
        """
        settings = self._settings(dataset.id_col)
        work = work_of(dataset, settings)
        token = str(tokenize(work.token(), settings.token()))
        folder = self.clustering_output_dir
        options = work.source.storage_options
        kinds = {schema.CLUSTER: "int32", schema.CENTROID_DISTANCE: "float32"}
        with run_lock(folder, "clustering", options):
            begin(folder, {"operator": "ClusteringModel", "token": token}, options, named_by_user=True)
            cluster(work, folder, settings, list(kinds))
        made_by: dict[str, Any] = {
            "operator": "ClusteringModel",
            "rows": token,
            "parents": {self.embedding_column: work.dataset.provenance.get(self.embedding_column)},
        }
        return add_columns(work.dataset, ResultColumns(work.source, folder, kinds, token), made_by)

    def _settings(self, id_col: str) -> ClusterSettings:
        return ClusterSettings(
            embedding_column=self.embedding_column,
            id_column=self.id_column or id_col,
            order=Order.of("hard"),
            n_clusters=self.n_clusters,
            max_iter=self.max_iter,
            random_state=self.random_state,
            fit_rows=self.fit_rows,
        )
