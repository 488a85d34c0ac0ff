"""The workflow over embeddings: images that are nearly the same."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets.parquet_folder import ParquetFolder, open_parquet_folder
from nemo_image.dedup import DedupResult
from nemo_image.dedup.clusters.clustering import ClusterSettings
from nemo_image.dedup.exchange.gather import FOUND
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.exchange.work import begin, remove
from nemo_image.dedup.result import RESULT, SUMMARY, write_summary
from nemo_image.dedup.semantic_run import JudgeSettings, SemanticRun
from nemo_image.dedup.sweep import USUAL_EPS, is_eps
from nemo_image.engine.ledger import FOLDER as OWN
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.pipeline.workflows.base import DeduplicationResult, DeduplicationWorkflow, storage_options
from nemo_image.pipeline.workflows.duplicates import check_folder, clear
from nemo_image.pipeline.workflows.listing import Listing, check_fields
from nemo_image.pipeline.workflows.ranking import ranked
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

WORK = "semantic_dedup"
"""The folder, below ``cache_path``, of what a workflow keeps for reruns."""

CURVE_HEADER = b"eps,kept,removed,total"
EXTRAS = (schema.MAX_SIMILARITY, schema.CLUSTER)

_LEFT_OUT: dict[str, tuple[Any, str]] = {
    "embedding_dim": (None, "the length of the embeddings is read from the files"),
    "input_filetype": ("parquet", "only Parquet is read: convert the files"),
    "tol": (1e-4, "k-means ends when no row changes its cluster much, or after max_iter"),
    "init": ("k-means||", "k-means is started by k-means++; nemo_image.dedup.SemanticDedup takes centroids"),
    "n_init": (1, "k-means is started once"),
    "oversampling_factor": (2.0, "k-means is started by k-means++, which has no such factor"),
    "max_samples_per_batch": (1 << 15, "the rows of a batch are chosen by their size"),
    "_duplicates_num_row_groups_hint": (None, "row groups have 10,000 rows"),
}
"""Arguments that NeMo Curator's workflow has and that have no meaning here: their defaults, and why."""


class SemanticDeduplicationWorkflow(DeduplicationWorkflow):
    """Finds near copies among embeddings in Parquet files, and lists the ids to remove.

    Takes what `ParquetWriter`, ``ImageWriterStage(write_images=False)`` and ``save_metadata`` write, and other Parquet
    files. If the files have a column ``shard`` (each row's tar: its path below the dataset's, without ``.tar``), an id
    needs to be unique only within its shard, and the list says shards too. Each file is read as a shard.

    Rows are clustered by k-means; within a cluster each row is compared with those judged before it (SemDeDup, Abbas et
    al., arXiv 2303.09540). What is finished stays in `cache_path`: a rerun with the same settings takes it over, and
    one with another `eps` takes over the clusters.

    Parameters
    ----------
    input_path : str or list of str
        Folders of Parquet files, searched to any depth.
    output_path : str
        Gets ``duplicates/`` (columns ``id``, ``shard``, ``duplicate_of``, ``duplicate_of_shard``, ``max_similarity``,
        ``cluster`` and `metadata_fields`; those of shards only where the input says them), or, without `eps`,
        ``dedup_summary.csv``.
    n_clusters : int, optional
        By default one for each 20,000 rows.
    cache_path : str, optional
        For the clusters and what was found; `output_path` by default.
    id_field : str, default "id"
        Strings or integers.
    embedding_field : str, default "embeddings"
        Lists of floats, of fixed size or not.
    metadata_fields : list of str, optional
        Columns that are written beside the ids.
    max_iter : int, default 300
        Iterations of k-means at most.
    random_state : int, default 42
    fit_data_fraction : float, optional
        The share of rows that k-means is fitted on, in (0, 1); 256 rows for each cluster by default.
    distance_metric : {"cosine", "l2"}, default "cosine"
        By which distance from the centroid rows are ordered: one order, because vectors are taken with length 1.
    which_to_keep : {"hard", "easy", "random"} or (str, bool), default "hard"
        As for :class:`~nemo_image.dedup.SemanticDedup`.
    ranking_strategy : RankingStrategy, optional
        In place of `which_to_keep`, or any object with its ``metadata_cols`` and ``ascending``.
    pairwise_batch_size : int, default 1024
        Rows compared at once. Changes memory and speed, never the result.
    eps : float, optional
        A row is removed if its cosine similarity to a row judged before it is at least ``1 - eps``. Without it, the
        share of rows that usual thresholds keep is computed, and no list is written.
    read_kwargs, cache_kwargs, write_kwargs : dict, optional
        ``{"storage_options": {...}}`` for fsspec; they must not contradict each other.
    clear_output : bool, default True
        Replace what this workflow wrote with other settings; nothing else is ever removed.
    verbose : bool, default True
        Log what was found.
    representative : bool, default True
        Compare with kept rows only, so that each removed row has a kept twin. With False, as published, a row may fall
        to a row that falls itself.
    embedding_dim, input_filetype, input_file_extensions, tol, init, n_init, oversampling_factor, \
max_samples_per_batch, _duplicates_num_row_groups_hint
        Must be left at their defaults: they have no meaning here.

    Raises
    ------
    ArgumentError
        If an argument is out of range, or would do nothing.
    """

    def __init__(
        self,
        input_path: str | Sequence[str],
        output_path: str | os.PathLike[str],
        n_clusters: int | None = None,
        cache_path: str | os.PathLike[str] | None = None,
        id_field: str = "id",
        embedding_field: str = "embeddings",
        embedding_dim: int | None = None,
        metadata_fields: Sequence[str] | None = None,
        input_filetype: Literal["parquet"] = "parquet",
        input_file_extensions: Sequence[str] | None = None,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 42,
        init: Any = "k-means||",
        n_init: Any = 1,
        oversampling_factor: float = 2.0,
        max_samples_per_batch: int = 1 << 15,
        fit_data_fraction: float | None = None,
        distance_metric: Literal["cosine", "l2"] = "cosine",
        which_to_keep: str | tuple[str, bool] = "hard",
        ranking_strategy: Any = None,
        pairwise_batch_size: int = 1024,
        eps: float | None = None,
        _duplicates_num_row_groups_hint: int | None = None,
        read_kwargs: Mapping[str, Any] | None = None,
        cache_kwargs: Mapping[str, Any] | None = None,
        write_kwargs: Mapping[str, Any] | None = None,
        clear_output: bool = True,
        verbose: bool = True,
        *,
        representative: bool = True,
    ) -> None:
        given = {**locals()}
        _refuse_others(given)
        options = storage_options(read_kwargs=read_kwargs, cache_kwargs=cache_kwargs, write_kwargs=write_kwargs)
        super().__init__(input_path, output_path, id_field, metadata_fields, options, clear_output, verbose)
        self.cache_path = None if cache_path is None else files.folder(cache_path)
        self.fit_data_fraction = fit_data_fraction
        self.eps = eps
        if ranking_strategy is not None:
            which_to_keep = ranked(ranking_strategy, which_to_keep, id_field)
        if distance_metric not in ("cosine", "l2"):
            raise ArgumentError(f"distance_metric must be 'cosine' or 'l2', not {distance_metric!r}")
        if eps is not None and not is_eps(eps):
            raise ArgumentError(f"eps must lie in [0, 1], not {eps!r}: a pair counts from cosine 1 - eps on")
        if fit_data_fraction is not None and not (is_eps(fit_data_fraction) and 0 < fit_data_fraction < 1):
            raise ArgumentError(f"fit_data_fraction must lie in (0, 1), not {fit_data_fraction!r}: None is the default")
        if not isinstance(pairwise_batch_size, int) or pairwise_batch_size < 1:
            raise ArgumentError(f"pairwise_batch_size must be a whole number, at least 1, not {pairwise_batch_size!r}")
        check_fields(self.metadata_fields, EXTRAS)
        order = Order.of(which_to_keep)
        self._clustering = ClusterSettings(embedding_field, id_field, order, n_clusters, max_iter, random_state)
        self._clustering.check()
        self._judging = JudgeSettings(0.0 if eps is None else float(eps), representative, None, pairwise_batch_size)

    def run(self, executor: Any = None, checkpoint_path: str | os.PathLike[str] | None = None) -> DeduplicationResult:
        """Run the workflow.

        Parameters
        ----------
        executor : DaskExecutor, optional
            Whose cluster does the work; by default the current client, or threads of this process.
        checkpoint_path : str, optional
            In place of `cache_path`: the folder of what a rerun takes over.

        Raises
        ------
        ArgumentError
            If there are more clusters than rows, or a folder is unusable.
        DatasetError
            If a folder holds something else, or ids do not say which rows are meant.
        MissingColumnError
            If a file lacks a column.
        EmbeddingError
            If the embeddings are none, or of different lengths.
        RunError
            If files could not be read.
        """
        if checkpoint_path is not None and self.cache_path is not None:
            raise ArgumentError("what a rerun takes over lies in cache_path: leave out checkpoint_path")
        cache = files.folder(checkpoint_path or self.cache_path or self.output_path)
        self._require_apart(cache)
        options = self.storage_options
        work = files.join(cache, WORK)
        with self.running(executor), run_lock(work, "dedup", options):
            columns = [self._clustering.embedding_column, *self._clustering.order.columns, *self.metadata_fields]
            folder = open_parquet_folder(self.input_paths, self.id_field, columns, options)
            run = self._run_of(folder, work)
            if self.clear_output:
                _remove_others(run, keep_result=self.eps is not None)
            if self.eps is None:
                return self._curve(run, folder)
            token = str(tokenize(run.token, folder.naming, self.metadata_fields, self.id_field))
            check_folder(self.duplicates_path, token, self.clear_output, options)
            result = _judged(run)
            return self.list_duplicates(self._listing(run, folder, result, token), result)

    def _require_apart(self, cache: str) -> None:
        """Raise if later runs would take this one's files for input."""
        for path in self.input_paths:
            inside = files.folder(path) + "/"
            for name, other in (("output_path", self.output_path), ("cache_path", cache)):
                if (files.absolute(other) + "/").startswith(inside):
                    raise ArgumentError(f"{name}={other!r} lies in input_path={path!r}: give a folder elsewhere")

    def _run_of(self, folder: ParquetFolder, work: str) -> SemanticRun:
        clustering = self._clustering
        if self.fit_data_fraction is not None:
            clustering = replace(clustering, fit_rows=max(1, round(self.fit_data_fraction * folder.rows)))
        return replace(SemanticRun.of(folder.dataset, clustering, self._judging), path=work)

    def _curve(self, run: SemanticRun, folder: ParquetFolder) -> DeduplicationResult:
        """Tell how many rows usual thresholds keep."""
        options = self.storage_options
        url = files.join(self.output_path, SUMMARY)
        if files.exists(url, options) and not files.read_bytes(url, options).startswith(CURVE_HEADER):
            raise DatasetError(f"{url} is another file: give another output_path, or move it away")
        if self.clear_output:
            clear(self.duplicates_path, None, True, options)
        with run.clustered() as clustered:
            points = run.sweep(clustered, USUAL_EPS)
        rows = [(point.eps, point.kept, point.removed) for point in points]
        write_summary(self.output_path, rows, options)
        frame = pd.DataFrame(rows, columns=["eps", "kept", "removed"])
        frame["total"] = frame["kept"] + frame["removed"]
        made = DeduplicationResult(folder.rows, curve=frame.assign(kept_fraction=[one.share for one in points]))
        if self.verbose:
            logger.info("%s", made)
        return made

    def _listing(self, run: SemanticRun, folder: ParquetFolder, result: DedupResult, token: str) -> Listing:
        source = run.work.source
        kind = schema.plain_type(source.schema.field(self.id_field).type)
        shards = folder.dataset.shards
        return Listing(
            result.folder, source, folder.naming, kind, shards, folder.rows, EXTRAS, self.metadata_fields, token
        )


def _judged(run: SemanticRun) -> DedupResult:
    """Judge all rows; take over a result that is there."""
    options = run.work.source.storage_options
    folder = run.default_folder()
    with run_lock(folder, "dedup", options):
        begin(folder, run.plan(), options, named_by_user=False)
        if files.exists(files.join(folder, RESULT), options):
            result = DedupResult.read(folder, options)
        else:
            result = run.judge(folder)
            result.write(options)
        remove(files.join(folder, FOUND), options)
    return result


def _remove_others(run: SemanticRun, keep_result: bool) -> None:
    """Remove what other settings left in a workflow's own folder."""
    options = run.work.source.storage_options
    root = files.join(run.path, OWN)
    kept = [run.clusters_folder(), *([run.default_folder()] if keep_result else [])]
    fs, path = files.open_fs(root, options)
    for found in fs.ls(path, detail=False) if files.exists(root, options) else ():
        name = str(found).rstrip("/").rpartition("/")[2]
        if name.startswith(("dedup-", "clusters-")) and files.join(root, name) not in kept:
            remove(files.join(root, name), options)


def _refuse_others(given: Mapping[str, Any]) -> None:
    """Raise if an argument is given that would do nothing."""
    for name, (default, why) in _LEFT_OUT.items():
        value = given[name]
        if isinstance(value, np.ndarray) or value != default:
            raise ArgumentError(f"{name}={value!r} would do nothing: {why}. Leave it out")
    suffixes = given["input_file_extensions"]
    if suffixes is not None and [one.lstrip(".") for one in suffixes] != ["parquet"]:
        raise ArgumentError(f"input_file_extensions={suffixes!r}: files that end in .parquet are read; leave it out")
