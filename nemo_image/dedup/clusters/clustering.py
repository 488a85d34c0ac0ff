"""Cluster a dataset's embeddings, and write its rows by cluster to files: the first step of semantic deduplication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from dask.base import tokenize

from nemo_image import backend
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.clusters.assign import AssignClusters, TakeSurvivors
from nemo_image.dedup.clusters.centroids import CENTROIDS, Centroids, checked, write_centroids
from nemo_image.dedup.clusters.earlier import Generation, generations
from nemo_image.dedup.clusters.missed import SAMPLED_ROWS
from nemo_image.dedup.clusters.sample import FitCentroids, draw_sample
from nemo_image.dedup.exchange.gather import range_of_groups
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.exchange.runs import MAX_BUCKETS
from nemo_image.dedup.exchange.scatter import Scattered, ScatterGroup, make_groups, scatter
from nemo_image.dedup.exchange.survey import ShardCount, count_rows
from nemo_image.dedup.exchange.work import Work, read_json, write_json
from nemo_image.engine.device import worker_device
from nemo_image.engine.run import current_client
from nemo_image.errors import ArgumentError, EmbeddingError
from nemo_image.shards import files

CLUSTERED = "clusters.json"
ROWS_A_CLUSTER = 20_000
MAX_CLUSTERS = 50_000
FIT_ROWS_A_CLUSTER = 256
BUCKET_BYTES = 2**25
"""Bytes of vectors that a bucket has on average: small enough that there are some for each worker."""

ROW_OVERHEAD = 64
"""Bytes that a row of a run file takes besides its vector."""


@dataclass(frozen=True)
class ClusterSettings:
    """How rows are clustered; see :class:`~nemo_image.dedup.SemanticDedup`."""

    embedding_column: str
    id_column: str
    order: Order
    n_clusters: int | None = None
    max_iter: int = 100
    random_state: int = 1234
    fit_rows: int | None = None
    n_probe: int = 1
    centroids: Any = None
    against: str | None = None

    def check(self) -> None:
        """Raise if a setting is out of range.

        Raises
        ------
        ArgumentError
            Naming it.
        """
        for name, least in (("n_clusters", 1), ("max_iter", 1), ("fit_rows", 1), ("n_probe", 1), ("random_state", 0)):
            value = getattr(self, name)
            if value is None and name in ("n_clusters", "fit_rows"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"{name} must be a whole number, at least {least}, not {value!r}")
        if self.random_state >= 2**32:
            raise ArgumentError(f"random_state must be less than 2^32, not {self.random_state}")

    def token(self) -> str:
        """Return what tells these settings from others."""
        given = self.centroids
        if isinstance(given, str) or hasattr(given, "__fspath__"):
            given = Centroids.read(str(given), {}).digest
        return str(tokenize([getattr(self, one) for one in self.__dataclass_fields__ if one != "centroids"], given))


@dataclass(frozen=True)
class Clustered:
    """A clustering on disk.

    Attributes
    ----------
    folder : str
    centroids : Centroids
    urls : list of str
        The run files.
    groups : list of Scattered
        Of the rows to judge.
    buckets : int
    order : Order
        That the run files hold what is needed for.
    id_col, id_column, embedding_column : str
    n_probe : int
    sample : list of str
        Files of sampled rows.
    """

    folder: str
    centroids: Centroids
    urls: list[str]
    groups: list[Scattered]
    buckets: int
    order: Order
    id_col: str
    id_column: str
    embedding_column: str
    n_probe: int
    sample: list[str] = field(default_factory=list)

    @property
    def judged(self) -> int:
        """The number of rows to judge."""
        return sum(one.judged for one in self.groups)

    @property
    def ranges(self) -> list[list[Scattered]]:
        """The groups whose results are gathered together."""
        return range_of_groups(self.groups)

    def write(self, storage_options: Any) -> None:
        """Say in the folder that it is finished."""
        values = asdict(self)
        values["centroids"].pop("storage_options")
        write_json(files.join(self.folder, CLUSTERED), values, storage_options)

    @classmethod
    def read(cls, folder: str, storage_options: Any) -> Clustered | None:
        """Read a finished clustering; None where there is none."""
        values = read_json(files.join(folder, CLUSTERED), storage_options)
        if values is None:
            return None
        centroids = values.pop("centroids")
        return cls(
            **{
                **values,
                "centroids": Centroids(
                    centroids["url"], centroids["digest"], tuple(centroids["shape"]), storage_options or {}
                ),
                "groups": [Scattered(**one) for one in values["groups"]],
                "order": Order(**values["order"]),
            }
        )


def cluster(work: Work, folder: str, settings: ClusterSettings, rows_columns: Sequence[str] = ()) -> Clustered:
    """Cluster a dataset's rows in a folder; takes over what an earlier run of the same plan finished.

    Parameters
    ----------
    rows_columns : sequence of str, optional
        Columns that are written for each row too, one file a shard.

    Raises
    ------
    ArgumentError
        If there are more clusters than rows, or `centroids` do not fit the embeddings.
    EmbeddingError
        If the embeddings are none, or of different lengths.
    RunError
        If shards could not be read.
    """
    options = work.source.storage_options
    finished = Clustered.read(folder, options)
    if finished is not None:
        return finished
    counts = _counts(work, folder, settings)
    judged = sum(one.judged for one in counts)
    earlier = (
        []
        if settings.against is None
        else generations(settings.against, work, settings.embedding_column, settings.id_column)
    )
    centroids = files.join(earlier[-1].folder, CENTROIDS) if earlier else settings.centroids
    given = None if centroids is None else _given(centroids, folder, options)
    n_clusters = _n_clusters(settings, judged, given)
    fit_rows = settings.fit_rows or FIT_ROWS_A_CLUSTER * n_clusters
    sample = _sample(work, folder, settings, max(SAMPLED_ROWS, 0 if given else fit_rows), judged)
    if not sample:
        raise EmbeddingError(
            f"column {settings.embedding_column!r} holds no usable embedding (null, zero, not finite, or in rows that "
            "are passed by): nothing to deduplicate"
        )
    found = given or _fit(folder, sample, n_clusters, fit_rows, settings, options)
    buckets = _buckets(judged, found)
    n_probe = min(settings.n_probe, n_clusters)
    keying = AssignClusters(settings.embedding_column, found, n_probe, buckets, settings.order, worker_device())
    scattering = ScatterGroup(
        work.source, folder, keying, buckets, settings.id_column, settings.random_state, rows_columns
    )
    columns = [settings.id_column, *work.columns]
    row_bytes = (found.shape[1] * 4 + ROW_OVERHEAD) * n_probe
    groups = list(make_groups(counts, work.tasks(columns), row_bytes))
    scattered = scatter(scattering, groups, "assign clusters")
    urls = [url for one in scattered for url in one.urls]
    urls += _survivors(work, folder, settings, found, buckets, earlier, len(groups))
    made = Clustered(
        folder,
        found,
        urls,
        scattered,
        buckets,
        settings.order,
        work.source.id_col,
        settings.id_column,
        settings.embedding_column,
        n_probe,
        sample,
    )
    made.write(options)
    return made


def _counts(work: Work, folder: str, settings: ClusterSettings) -> list[ShardCount]:
    url = files.join(folder, "counts.json")
    before = read_json(url, work.source.storage_options)
    if before is not None:
        return [ShardCount(*one) for one in before]
    counts = count_rows(work, settings.id_column)
    write_json(url, [[one.shard, one.rows, one.judged] for one in counts], work.source.storage_options)
    return counts


def _n_clusters(settings: ClusterSettings, judged: int, given: Centroids | None) -> int:
    if given is not None:
        if settings.n_clusters not in (None, given.shape[0]):
            raise ArgumentError(
                f"n_clusters={settings.n_clusters}, but the centroids given are {given.shape[0]}: leave one of them out"
            )
        return given.shape[0]
    if settings.n_clusters is None:
        return max(1, min(-(-judged // ROWS_A_CLUSTER), MAX_CLUSTERS))
    if judged and settings.n_clusters > judged:
        raise ArgumentError(
            f"n_clusters={settings.n_clusters} is more than the {judged} rows to cluster: give fewer, or None"
        )
    return settings.n_clusters


def _given(centroids: Any, folder: str, storage_options: Any) -> Centroids:
    """Copy the centroids given into the folder, whatever form they have."""
    url = files.join(folder, CENTROIDS)
    if isinstance(centroids, str) or hasattr(centroids, "__fspath__"):
        matrix = Centroids.read(str(centroids), storage_options).load()
    else:
        matrix = checked(centroids, "centroids")
    write_centroids(url, matrix, storage_options)
    return Centroids.read(url, storage_options)


def _sample(work: Work, folder: str, settings: ClusterSettings, wanted: int, judged: int) -> list[str]:
    url = files.join(folder, "sample.json")
    before = read_json(url, work.source.storage_options)
    if before is not None:
        return list(before)
    urls = draw_sample(
        work, folder, settings.id_column, settings.embedding_column, wanted, judged, settings.random_state
    )
    write_json(url, urls, work.source.storage_options)
    return urls


def _fit(
    folder: str, sample: list[str], n_clusters: int, fit_rows: int, settings: ClusterSettings, options: Any
) -> Centroids:
    url = files.join(folder, CENTROIDS)
    if not files.exists(url, options):
        fitting = FitCentroids(
            folder, n_clusters, fit_rows, settings.max_iter, settings.random_state, options, worker_device()
        )
        client = current_client()
        if fitting.device == "cuda" and client is not None and len(client.ncores()) > 1:
            fitting(sample, client)  # all GPUs at once: cuML gives its own tasks to the workers
        else:
            run_all("fit k-means", fitting, [sample], 1, name_of=lambda _: "k-means", rows_of=int)
    return Centroids.read(url, options)


def _buckets(judged: int, centroids: Centroids) -> int:
    """Return how many buckets there are: each some whole clusters."""
    wanted = -(-judged * centroids.shape[1] * 4 // BUCKET_BYTES)
    return max(1, min(wanted, centroids.shape[0], MAX_BUCKETS))


def _survivors(
    work: Work,
    folder: str,
    settings: ClusterSettings,
    centroids: Centroids,
    buckets: int,
    earlier: Sequence[Generation],
    first_group: int,
) -> list[str]:
    """Scatter the rows that earlier results kept; return their run files."""
    source, urls = work.source, []
    order_type: pa.DataType | None = None
    if settings.order.column:
        order_type = backend.arrow_type_of(work.dataset.metadata._meta[settings.order.name])
    for number, generation in enumerate(earlier):
        keying = TakeSurvivors(
            generation.folder,
            generation.source.id_col,
            settings.embedding_column,
            centroids.shape,
            buckets,
            number,
            order_type,
            source.storage_options,
        )
        scattering = ScatterGroup(
            generation.source,
            folder,
            keying,
            buckets,
            generation.id_column,
            settings.random_state,
            prefix=generation.prefix,
        )
        counts = [ShardCount(shard, 0, rows) for shard, rows in generation.rows.items()]
        tasks = generation.tasks([generation.id_column, settings.embedding_column])
        groups = list(make_groups(counts, tasks, centroids.shape[1] * 4 + ROW_OVERHEAD, first_group))
        first_group += len(groups)
        urls += [url for one in scatter(scattering, groups, "read earlier rows") for url in one.urls]
    return urls
