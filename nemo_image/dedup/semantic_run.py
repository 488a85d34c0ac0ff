"""One dataset under semantic deduplication: cluster it, judge its buckets, gather what was found."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.clusters.assign import bucket_of
from nemo_image.dedup.clusters.centroids import CENTROIDS, write_centroids
from nemo_image.dedup.clusters.clustering import Clustered, ClusterSettings, cluster
from nemo_image.dedup.clusters.earlier import describe
from nemo_image.dedup.clusters.missed import SAMPLED_ROWS, Probe, estimate
from nemo_image.dedup.clusters.nearest import nearest_centroids
from nemo_image.dedup.clusters.sample import read_sample, unit_rows
from nemo_image.dedup.clusters.settle import ApplyFixes, best_of_visits, settle
from nemo_image.dedup.clusters.solve import SolveBucket, Solved
from nemo_image.dedup.exchange.gather import Gathered, GatherRange, WriteFound, as_found, gather
from nemo_image.dedup.exchange.survey import state_columns
from nemo_image.dedup.exchange.work import Work, begin
from nemo_image.dedup.result import DedupResult, Missed, SweepPoint, without_own_result
from nemo_image.dedup.sweep import USUAL_EPS, choose_eps, curve_text
from nemo_image.engine.device import worker_device
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

TIER = "semantic"
OPERATOR = "SemanticDedup"
CURVE_ROWS = 100_000
"""Rows that the curve of a model of unknown scale is shown for, about."""

TARGET_MISSED = 0.01
"""Share of the rows by which a target may be missed without a word."""


@dataclass(frozen=True)
class JudgeSettings:
    """How the rows of a cluster are judged; see :class:`~nemo_image.dedup.SemanticDedup`."""

    eps: float
    representative: bool
    target_keep: float | None
    batch_size: int

    def token(self) -> str:
        """Return what tells these settings from others; the batch size changes no result."""
        return str(tokenize([self.eps, self.representative, self.target_keep]))


@dataclass(frozen=True)
class SemanticRun:
    """A run of semantic deduplication.

    Attributes
    ----------
    path : str
        The dataset's folder.
    work : Work
    clustering : ClusterSettings
    judging : JudgeSettings
    """

    path: str
    work: Work
    clustering: ClusterSettings
    judging: JudgeSettings

    @classmethod
    def of(cls, dataset: ImageTextPairDataset, clustering: ClusterSettings, judging: JudgeSettings) -> SemanticRun:
        """Return the run over a dataset, computing what is pending of the columns that it needs.

        Raises
        ------
        MissingColumnError, ArgumentError
            If a column is not there, or holds something else than is needed.
        """
        asked = _asked(clustering, judging)
        fresh = without_own_result(dataset, OPERATOR, asked)
        return cls(dataset.path, work_of(fresh, clustering), clustering, judging)

    @property
    def token(self) -> str:
        """What tells this run from others."""
        return str(tokenize(self.clusters_token, self.judging.token()))

    @cached_property
    def clusters_token(self) -> str:
        """What tells this run's clustering from others."""
        return str(tokenize(self.work.token(), self.clustering.token()))

    def plan(self) -> dict[str, Any]:
        """Return what is said of this run in its folder."""
        return {"operator": TIER, "token": self.token}

    def default_folder(self) -> str:
        """Return where the result lies if the user does not say."""
        return files.join(self.path, FOLDER, f"dedup-{self.token[:16]}")

    def clusters_folder(self) -> str:
        """Return where rows lie by cluster."""
        return files.join(self.path, FOLDER, f"clusters-{self.clusters_token[:16]}")

    @contextmanager
    def clustered(self) -> Iterator[Clustered]:
        """Cluster the rows, if that is not done yet; nobody else uses the files in the ``with`` block."""
        folder = self.clusters_folder()
        options = self.work.source.storage_options
        with run_lock(folder, "dedup", options):
            begin(folder, {"operator": "clustering", "token": self.clusters_token}, options, named_by_user=False)
            yield cluster(self.work, folder, self.clustering)

    def sweep(self, clustered: Clustered, eps: Sequence[float]) -> list[SweepPoint]:
        """Return how many rows thresholds keep; nothing is written."""
        return _points(eps, self._solve(clustered, eps, None, None)) if eps else []

    def judge(self, folder: str) -> DedupResult:
        """Judge all rows, and write what was found of each into `folder`."""
        with self.clustered() as clustered:
            return self._judge(clustered, folder)

    def _judge(self, clustered: Clustered, folder: str) -> DedupResult:
        judging, options = self.judging, self.work.source.storage_options
        eps = judging.eps
        looked_at: list[SweepPoint] = []
        if judging.target_keep is not None:
            eps, looked_at = choose_eps(lambda more: self.sweep(clustered, more), judging.target_keep)
            self._warn_of_target(eps, looked_at)
        probe = self._probe(clustered, eps)
        solved = self._solve(clustered, [eps], folder, probe)
        points = _points([eps], solved)
        settled = self._settle(clustered, folder)
        points += [point for point in looked_at if point.eps != eps]
        id_col = self.work.source.id_col
        gathering = GatherRange(clustered.folder, folder, id_col, clustered.buckets, TIER, options, settled)
        gathered = gather(gathering, clustered.ranges)
        if clustered.n_probe > 1:
            # Buckets count what they see themselves.
            points[0] = SweepPoint(eps, sum(one.kept for one in gathered), sum(one.removed for one in gathered))
        write_centroids(files.join(folder, CENTROIDS), clustered.centroids.load(), options)
        if judging.target_keep is None and not self._scale_is_known():
            self._warn_of_scale(clustered, points[0])
        return self._result(folder, clustered, gathered, points, probe, solved)

    def _settle(self, clustered: Clustered, folder: str) -> Any:
        """Return what makes one result a row, where rows were compared in several clusters."""
        if clustered.n_probe == 1:
            return as_found
        if not self.judging.representative:
            return best_of_visits
        options = self.work.source.storage_options
        settle(folder, clustered.buckets, self.clustering.order, options)
        return ApplyFixes(folder, options)

    def _solve(
        self,
        clustered: Clustered,
        eps: Sequence[float],
        folder: str | None,
        probe: Probe | None,
        only: frozenset[int] | None = None,
    ) -> list[Solved]:
        options = self.work.source.storage_options
        solving = SolveBucket(
            None if folder is None else WriteFound(folder, clustered.ranges, options),
            clustered.urls,
            [1.0 - one for one in eps],
            self.judging.representative,
            self.clustering.order,
            self.judging.batch_size,
            probe,
            options,
            only,
            worker_device(),
        )
        numbers: Sequence[int] = range(clustered.buckets)
        if only is not None:
            wanted = bucket_of(np.array(sorted(only)), clustered.centroids.shape[0], clustered.buckets)
            numbers = np.unique(wanted).tolist()
        return run_all(
            "compare rows" if only is None else "sample the curve",
            solving,
            numbers,
            len(numbers),
            name_of=lambda number: f"bucket {number}",
            rows_of=lambda one: one.judged,
        )

    def _probe(self, clustered: Clustered, eps: float) -> Probe:
        hashes, matrix = read_sample(clustered.sample, SAMPLED_ROWS, self.work.source.storage_options)
        clusters, _ = nearest_centroids(matrix, clustered.centroids.load(), clustered.n_probe)
        return Probe(hashes, unit_rows(matrix), clusters, 1.0 - eps)

    def _scale_is_known(self) -> bool:
        made_by = self.work.dataset.provenance.get(self.clustering.embedding_column)
        return made_by is not None and "clip" in str(made_by.get("model")).lower()

    def _warn_of_target(self, eps: float, looked_at: Sequence[SweepPoint]) -> None:
        share = next(point.share for point in looked_at if point.eps == eps)
        if abs(share - (self.judging.target_keep or 0)) > TARGET_MISSED:
            logger.warning(
                "target_keep=%s cannot be reached: eps=%.4g, the nearest threshold, keeps %.1f%%",
                self.judging.target_keep,
                eps,
                100 * share,
            )

    def _warn_of_scale(self, clustered: Clustered, used: SweepPoint) -> None:
        """Show the curve of some clusters: small thresholds keep most rows, and take longest over all of them."""
        every = max(1, -(-clustered.judged // CURVE_ROWS))
        some = frozenset(range(0, clustered.centroids.shape[0], every))
        points = _points(USUAL_EPS, self._solve(clustered, USUAL_EPS, None, None, some))
        logger.warning(
            "the scale of %r is not known: eps=0.01 suits CLIP embeddings, other models differ widely. eps=%.4g keeps "
            "%.1f%%. In a sample of the clusters (kept_fraction looks at all of them):\n%s",
            self.clustering.embedding_column,
            used.eps,
            100 * used.share,
            curve_text(points) if points[0].total else "  none is small enough to sample",
        )

    def _result(
        self,
        folder: str,
        clustered: Clustered,
        gathered: Sequence[Gathered],
        points: list[SweepPoint],
        probe: Probe,
        solved: Sequence[Solved],
    ) -> DedupResult:
        groups = clustered.groups
        meta = self.work.dataset.metadata._meta
        id_type = schema.plain_type(backend.arrow_type_of(meta[self.clustering.id_column]))
        result = DedupResult(
            folder=folder,
            tier=TIER,
            rows=sum(one.rows for one in groups),
            kept=sum(one.kept for one in gathered),
            removed=sum(one.removed for one in gathered),
            passed_by=sum(one.passed_by for one in groups),
            without_value=sum(one.no_value for one in groups),
            bad_value=sum(one.bad_value for one in groups),
            columns={
                schema.IS_DUPLICATE: "bool",
                schema.DUPLICATE_OF: str(id_type),
                schema.DUPLICATE_OF_SHARD: "string",
                schema.DUPLICATE_TIER: "string",
                schema.CLUSTER: "int32",
                schema.CENTROID_DISTANCE: "float32",
                schema.MAX_SIMILARITY: "float32",
            },
            settings=self._settings(points[0].eps),
            n_clusters=clustered.centroids.shape[0],
            sweep=points,
            missed=_missed(solved, probe),
        )
        result.check()
        return result

    def _settings(self, eps: float) -> dict[str, Any]:
        clustering = self.clustering
        return {
            "operator": OPERATOR,
            "asked": _asked(clustering, self.judging),
            "eps": eps,
            "representative": self.judging.representative,
            "target_keep": self.judging.target_keep,
            "which_to_keep": [clustering.order.name, clustering.order.column, clustering.order.ascending],
            "n_clusters": clustering.n_clusters,
            "max_iter": clustering.max_iter,
            "random_state": clustering.random_state,
            "fit_rows": clustering.fit_rows,
            "n_probe": clustering.n_probe,
            "against": clustering.against,
            "id_column": clustering.id_column,
            "embedding_column": clustering.embedding_column,
            "embedding": self.work.dataset.provenance.get(clustering.embedding_column),
            "dataset": describe(self.work),
        }


def work_of(dataset: ImageTextPairDataset, clustering: ClusterSettings) -> Work:
    """Return the work on a dataset's embeddings, computing what is pending of the columns that it needs.

    Raises
    ------
    MissingColumnError, ArgumentError
        If a column is not there, or holds something else than is needed.
    """
    columns = list(dataset.metadata.columns)
    order = clustering.order
    work = Work.of(
        dataset, [clustering.embedding_column, clustering.id_column, *order.columns, *state_columns(columns)]
    )
    meta = work.dataset.metadata._meta
    kind = meta.dtypes[clustering.embedding_column]
    if kind != np.dtype(object) and not backend.is_embedding_dtype(kind):
        raise ArgumentError(
            f"embedding_column {clustering.embedding_column!r} holds {kind}, not lists of floats: name the column of "
            "embeddings"
        )
    if order.column:
        order.require_sortable(backend.arrow_type_of(meta[order.name]))
    return work


def _asked(clustering: ClusterSettings, judging: JudgeSettings) -> str:
    """Return what tells an operator's settings from others, before the data settles any."""
    return str(tokenize(clustering.token(), judging.token()))


def _points(eps: Sequence[float], solved: Sequence[Solved]) -> list[SweepPoint]:
    judged = sum(one.judged for one in solved)
    kept = [sum(one.kept[number] for one in solved) for number in range(len(eps))]
    return [SweepPoint(value, count, judged - count) for value, count in zip(eps, kept, strict=True)]


def _missed(solved: Sequence[Solved], probe: Probe) -> Missed:
    return estimate([one.missed for one in solved if one.missed is not None], len(probe.hashes))
