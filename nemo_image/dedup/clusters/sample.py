"""A sample of the embeddings, chosen by a hash of each row's shard and id: what k-means is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.passes import run_all
from nemo_image.datasets.row_windows import frames
from nemo_image.datasets.source import DatasetSource
from nemo_image.dedup.clusters.centroids import CENTROIDS, write_centroids
from nemo_image.dedup.clusters.kmeans import fit_kmeans
from nemo_image.dedup.exchange.rows import HASH, Hashes, row_hashes
from nemo_image.dedup.exchange.runs import read_batch, write_batches
from nemo_image.dedup.exchange.survey import state_columns
from nemo_image.dedup.exchange.usable import Matrix, usable_vectors
from nemo_image.dedup.exchange.work import Work
from nemo_image.engine import threads
from nemo_image.errors import EmbeddingError
from nemo_image.shards import files

SEED = 0x5EED
"""Sets the choice apart from the order ``"random"`` of the same seed."""

SAMPLE = "sample"
FIRST_ROWS = 1024
_SPARE = 6.0
"""Standard deviations by which more rows are drawn than wanted, so that enough are found."""


@dataclass(frozen=True)
class SampledShard:
    """What a shard gave: its file (None where no row was chosen), rows, and the embeddings' length."""

    shard: str
    url: str | None
    rows: int
    size: int


class SampleShard:
    """Writes the embeddings of a shard's chosen rows.

    Parameters
    ----------
    first, limit : int
        Rows with a hash up to `limit` are chosen. Those up to `first` go into a record batch of their own.
    """

    def __init__(
        self, source: DatasetSource, folder: str, id_column: str, column: str, first: int, limit: int, seed: int
    ) -> None:
        self.source = source
        self.folder = folder
        self.id_column = id_column
        self.column = column
        self.first = first
        self.limit = limit
        self.seed = seed

    def __call__(self, item: tuple[int, str, PartitionTask]) -> SampledShard:
        """Sample one shard."""
        number, shard, task = item
        hashes: list[Hashes] = []
        names: list[Hashes] = []
        vectors: list[Matrix] = []
        for frame in frames(self.source, shard, task):
            ids = frame[self.id_column].tolist()
            made = row_hashes([shard] * len(frame), ids, self.seed ^ SEED)
            chosen = np.flatnonzero(made <= np.uint64(self.limit))
            matrix, rows, _, _ = usable_vectors(frame.iloc[chosen], self.column, None)
            if len(rows):
                hashes.append(made[chosen][rows])
                names.append(row_hashes([shard] * len(rows), [ids[row] for row in chosen[rows]], self.seed))
                vectors.append(matrix)
        if not hashes:
            return SampledShard(shard, None, 0, 0)
        url = files.join(self.folder, SAMPLE, f"{number:06d}.arrow")
        table = pa.table(
            {
                "choice": np.concatenate(hashes),
                HASH: np.concatenate(names),
                "vector": vector_column(np.concatenate(vectors)),
            }
        )
        table = table.take(pc.sort_indices(table["choice"]))
        first = int((table["choice"].to_numpy() <= np.uint64(self.first)).sum())
        write_batches(url, table, np.array([first, len(table) - first]), self.source.storage_options)
        return SampledShard(shard, url, len(table), vectors[0].shape[1])


def draw_sample(work: Work, folder: str, id_column: str, column: str, wanted: int, judged: int, seed: int) -> list[str]:
    """Write about `wanted` of the `judged` rows to files, those with the smallest hashes; return the files.

    Raises
    ------
    EmbeddingError
        If shards hold embeddings of different lengths, or none at all.
    RunError
        If shards could not be read.
    """
    source = work.source
    tasks = work.tasks([id_column, column, *state_columns(work.columns)])
    items = ((number, shard, task) for number, (shard, task) in enumerate(tasks))
    first, limit = (_limit(rows, judged) for rows in (min(FIRST_ROWS, wanted), wanted))
    sampling = SampleShard(source, folder, id_column, column, first, limit, seed)
    found = run_all(
        "sample rows", sampling, items, len(tasks.shards), name_of=lambda item: item[1], rows_of=lambda one: one.rows
    )
    sizes = {one.size: one.shard for one in found if one.url is not None}
    if len(sizes) > 1:
        named = ", ".join(f"{size} numbers (shard {shard})" for size, shard in sorted(sizes.items()))
        raise EmbeddingError(f"column {column!r} holds embeddings of different lengths: {named}")
    return [one.url for one in found if one.url is not None]


def _limit(wanted: int, judged: int) -> int:
    """Return the hash up to which about `wanted` of the `judged` rows lie, rather more."""
    share = 1.0 if judged == 0 else (wanted + _SPARE * np.sqrt(wanted) + _SPARE**2) / judged
    return int(share * (2**64 - 1)) if share < 1 else 2**64 - 1


def read_sample(urls: Sequence[str], at_most: int, storage_options: Any) -> tuple[Hashes, Matrix]:
    """Return the hashes and vectors of the sampled rows that are chosen first, in the order of choice.

    The hashes are those of run files, by which a row is told. Up to `FIRST_ROWS`, only those rows are read.
    """
    numbers = (0,) if at_most <= FIRST_ROWS else (0, 1)
    tables = [read_batch(url, number, None, storage_options) for url in urls for number in numbers]
    if not tables:
        return np.zeros(0, np.uint64), np.zeros((0, 0), np.float32)
    choice, hashes = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("choice", HASH))
    chosen = np.argsort(choice, kind="stable")[:at_most]
    matrix = np.concatenate([vector_matrix(table["vector"]) for table in tables])
    return hashes[chosen], matrix[chosen]


def vector_column(matrix: Matrix) -> pa.FixedSizeListArray:
    """Return vectors as a column of a run file."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def vector_matrix(column: pa.ChunkedArray) -> Matrix:
    """Return a column of a run file as a matrix; without a copy where it is one chunk."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, width), np.float32), *parts])


def unit_rows(matrix: Matrix) -> Matrix:
    """Return vectors scaled to length 1 in float64, as float32."""
    norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    made: npt.NDArray[np.float32] = (matrix / norms[:, None]).astype(np.float32)
    return made


class FitCentroids:
    """Fits k-means to a sample: in one task or, on several GPUs, from the client."""

    def __init__(
        self,
        folder: str,
        n_clusters: int,
        fit_rows: int,
        max_iter: int,
        seed: int,
        options: Any,
        device: str = "cpu",
    ) -> None:
        self.folder = folder
        self.n_clusters = n_clusters
        self.fit_rows = fit_rows
        self.max_iter = max_iter
        self.seed = seed
        self.options = options
        self.device = device

    def __call__(self, urls: Sequence[str], client: Any = None) -> int:
        """Write the centroids; return the number of rows that they were fitted on.

        With a `client` of GPU workers, the rows are spread over them; this process holds them too.
        """
        _, matrix = read_sample(urls, self.fit_rows, self.options)
        with threads.torch_threads(threads.task_share()):
            centroids = fit_kmeans(
                unit_rows(matrix),
                self.n_clusters,
                max_iter=self.max_iter,
                random_state=self.seed,
                device=self.device,
                client=client,
            )
        write_centroids(files.join(self.folder, CENTROIDS), centroids, self.options)
        return len(matrix)
