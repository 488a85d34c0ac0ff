"""Semantic deduplication of a dataset: k-means, then comparison within clusters."""

from __future__ import annotations

import logging
import os
from typing import Any

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup.clusters.clustering import ClusterSettings
from nemo_image.dedup.clusters.settle import CROSS, FIXES
from nemo_image.dedup.exchange.gather import FOUND
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.exchange.work import begin, remove
from nemo_image.dedup.result import RESULT, DedupResult, with_columns
from nemo_image.dedup.semantic_run import JudgeSettings, SemanticRun
from nemo_image.dedup.sweep import is_eps
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")


class SemanticDedup:
    """Removes rows whose embedding is nearly another's.

    Rows are clustered by k-means; within a cluster each row is compared with those judged before it
    (SemDeDup, Abbas et al., arXiv 2303.09540).

    Parameters
    ----------
    n_clusters : int, optional
        By default one for each 20,000 rows (at least one, at most 50,000). Pairs in different clusters are not
        compared: fewer clusters miss fewer pairs and take longer.
    eps : float, default 0.01
        A row is removed if its cosine similarity to a row judged before it is at least ``1 - eps``. 0.01 suits CLIP
        embeddings; other models differ widely.
    which_to_keep : {"hard", "easy", "random"} or (str, bool), default "hard"
        Which of similar rows stays: the one farthest from the centroid, the nearest, a seeded choice, or by a column:
        ``("aesthetic_score", False)`` keeps the highest score. Nulls come last; ties go by id.
    representative : bool, default True
        Compare with kept rows only, so that each removed row has a kept twin. With False, as published, a row may fall
        to a row that falls itself.
    target_keep : float, optional
        The share of rows to keep, in (0, 1]: `eps` is then chosen for it.
    id_column : str, optional
        The column of which ``duplicate_of`` names rows; the dataset's ``id_col`` by default.
    embedding_column : str, default "image_embedding"
        Vectors of any length other than zero; compared as float32.
    max_iter : int, default 100
        Iterations of k-means at most.
    random_state : int, default 1234
        Seed of the sample, the start of k-means, and the order ``"random"``.
    fit_rows : int, optional
        Rows that k-means is fitted on, chosen by a hash of (shard, id); 256 for each cluster by default.
    n_probe : int, default 1
        Compare with the rows of so many nearest clusters, the row's own among them (all, if there are fewer). Takes as
        many times longer, and as many times the disk space while it runs.
    centroids : str or ndarray, optional
        An ``.npy`` file or matrix of centroids, one row a cluster, in place of a fit.
    against : str or DedupResult, optional
        An earlier result (its folder) with rows that stay: this dataset's rows are checked against those it kept, with
        its centroids. Its dataset must still be where it was.
    batch_size : int, default 1024
        Rows compared at once. Changes memory and speed, never the result.
    output_dir : str, optional
        The folder of the result's files; by default one below the dataset's ``_nemo_image``.

    Attributes
    ----------
    result_ : DedupResult or None
        Of the last call.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        eps: float = 0.01,
        which_to_keep: str | tuple[str, bool] = "hard",
        representative: bool = True,
        target_keep: float | None = None,
        id_column: str | None = None,
        embedding_column: str = schema.IMAGE_EMBEDDING,
        max_iter: int = 100,
        random_state: int = 1234,
        fit_rows: int | None = None,
        n_probe: int = 1,
        centroids: Any = None,
        against: Any = None,
        batch_size: int = 1024,
        *,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if not is_eps(eps):
            raise ArgumentError(f"eps must lie in [0, 1], not {eps!r}: a pair counts from cosine 1 - eps on")
        if target_keep is not None and not (is_eps(target_keep) and target_keep > 0):
            raise ArgumentError(f"target_keep must lie in (0, 1], not {target_keep!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size must be a whole number, at least 1, not {batch_size!r}")
        if against is not None and centroids is not None:
            raise ArgumentError("against brings its own centroids: leave out centroids")
        self.n_clusters = n_clusters
        self.eps = float(eps)
        self.which_to_keep = which_to_keep
        self.representative = representative
        self.target_keep = target_keep
        self.id_column = id_column
        self.embedding_column = embedding_column
        self.max_iter = max_iter
        self.random_state = random_state
        self.fit_rows = fit_rows
        self.n_probe = n_probe
        self.centroids = centroids
        self.against = against
        self.batch_size = batch_size
        self.output_dir = None if output_dir is None else files.folder(output_dir)
        self.result_: DedupResult | None = None
        self.cluster_settings("").check()

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the result's columns.

        Adds ``is_duplicate``, ``duplicate_of``, ``duplicate_of_shard``, ``duplicate_tier``, ``cluster``,
        ``cosine_dist_to_cent``, ``max_similarity``, and ``image_error``. Computes what is pending of the embeddings,
        clusters and compares at once; the columns themselves are read from the result's files when they are needed.
        Rows that enter with ``is_duplicate`` are passed by, and keep what they say.

        Raises
        ------
        MissingColumnError
            If a column is not there.
        ArgumentError
            If there are more clusters than rows, or an argument does not fit the dataset.
        EmbeddingError
            If the embeddings are none, of different lengths, or other than those of `against`.
        DatasetError
            If `output_dir` holds something else.
        RunError
            If shards could not be read.
        """
        run = SemanticRun.of(dataset, self.cluster_settings(dataset.id_col), self.judge_settings())
        folder = self.output_dir or run.default_folder()
        options = run.work.source.storage_options
        with run_lock(folder, "dedup", options):
            begin(folder, run.plan(), options, named_by_user=self.output_dir is not None)
            if files.exists(files.join(folder, RESULT), options):
                result = DedupResult.read(folder, options)
            else:
                result = run.judge(folder)
                result.write(options)
            for name in (FOUND, CROSS, FIXES):
                remove(files.join(folder, name), options)
            remove(run.clusters_folder(), options)
        logger.info("%s", result)
        self.result_ = result
        return with_columns(run.work.dataset, result, run.token, [self.embedding_column])

    def cluster_settings(self, id_col: str) -> ClusterSettings:
        """Return how rows are clustered."""
        return ClusterSettings(
            embedding_column=self.embedding_column,
            id_column=self.id_column or id_col,
            order=Order.of(self.which_to_keep),
            n_clusters=self.n_clusters,
            max_iter=self.max_iter,
            random_state=self.random_state,
            fit_rows=self.fit_rows,
            n_probe=self.n_probe,
            centroids=self.centroids,
            against=self.against.folder if isinstance(self.against, DedupResult) else self.against,
        )

    def judge_settings(self) -> JudgeSettings:
        """Return how rows of a cluster are judged."""
        return JudgeSettings(self.eps, self.representative, self.target_keep, self.batch_size)
