"""k-means: scikit-learn's start and Lloyd's iterations on the CPU, cuML on GPUs.

Lloyd's iterations are our own because scikit-learn adds up each cluster in an order that its threads settle: its
centroids differ in their last bits with the number of threads, and from three threads on from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nemo_image import backend
from nemo_image.dedup.clusters.nearest import Doubles, Floats, Integers, Scores, row_products
from nemo_image.engine.in_order import map_in_order
from nemo_image.engine.threads import set_own_torch_threads, task_share, torch_threads
from nemo_image.errors import ArgumentError, MissingDependencyError

START_ROWS = 16
"""Rows a cluster that k-means++ chooses from: from all rows takes several times as long as the iterations."""

TOLERANCE = 1e-4
"""scikit-learn's: iterations end when the centroids' squared shifts add up to this part of a column's mean variance."""

# The rows that one thread adds up, and those of them that it multiplies at once. They set the order of all sums.
_CHUNK = 4096
_BLOCK = 512

Labels = npt.NDArray[np.int32]


class _Moves(NamedTuple):
    """What a chunk of rows gives: each row's cluster, and what rows that changed it add to clusters' sums."""

    labels: Labels
    clusters: Integers
    sums: Doubles


def fit_kmeans(
    sample: Floats,
    n_clusters: int,
    *,
    max_iter: int = 100,
    random_state: int = 1234,
    device: str = "cpu",
    client: Any = None,
) -> Floats:
    """Return the centroids of k-means (Lloyd, Least squares quantization in PCM, 1982).

    Parameters
    ----------
    sample : ndarray of float32, shape (n, size)
        Unit vectors in a random order: on the CPU, k-means++ chooses from the first ``16 * n_clusters``.
    n_clusters : int
        From 1 to n.
    max_iter : int
        The most iterations.
    random_state : int
        Sets the start.
    device : str
        ``"cpu"``: the same bits for any number of threads. ``"cuda"``: cuML's own start and iterations, on this
        process's GPU; rounding differs between its runs.
    client : distributed.Client, optional
        With ``"cuda"``: a cluster of GPU workers. With more than one, the rows are spread over them (``cuml.dask``).

    Returns
    -------
    ndarray of float32, shape (n_clusters, size)
        Means of unit vectors, not scaled themselves.

    Raises
    ------
    ArgumentError
        If there are more clusters than rows, or an argument is not usable.
    MissingDependencyError
        If scikit-learn (CPU) or cuML (GPU) is not installed.
    """
    rows = len(sample)
    if not 1 <= n_clusters <= rows:
        raise ArgumentError(f"n_clusters={n_clusters}: must be from 1 to the number of rows to fit, {rows}")
    if max_iter < 1:
        raise ArgumentError(f"max_iter={max_iter}: must be at least 1")
    if device.split(":", maxsplit=1)[0] == "cuda":
        variance = _mean_variance(sample.mean(axis=0, dtype=np.float64))
        return backend.fit_cuml_kmeans(
            sample, n_clusters, max_iter=max_iter, tol=TOLERANCE * variance, random_state=random_state, client=client
        )
    if device != "cpu" or client is not None:
        raise ArgumentError(f"device={device!r}: must be 'cpu', without a client, or 'cuda'")
    start = kmeans_start(sample[: START_ROWS * n_clusters], n_clusters, random_state)
    return lloyd(sample, start, max_iter)


def kmeans_start(rows: Floats, n_clusters: int, random_state: int) -> Floats:
    """Choose rows by k-means++ (Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007).

    Raises
    ------
    MissingDependencyError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import kmeans_plusplus
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingDependencyError(
            "k-means on the CPU needs scikit-learn: pip install 'nemo-image[image_cpu]'"
        ) from error
    # Its products are small: more threads cost more than they bring, and could change a last bit.
    with threadpool_limits(1, "blas"):
        centroids, _ = kmeans_plusplus(rows, n_clusters, random_state=random_state)
    chosen: Floats = centroids
    return chosen


def lloyd(sample: Floats, start: Floats, max_iter: int, tolerance: float = TOLERANCE) -> Floats:
    """Move centroids to the means of their rows until they stay, or `max_iter` times.

    A row that changes its cluster is added to one sum and taken from another, in float64; in chunks that do not depend
    on the number of threads, each by one thread, and the chunks in their order: so neither do the centroids' bits. A
    cluster that loses all its rows is given the row that lies farthest from its own centroid, as in scikit-learn.

    Parameters
    ----------
    sample : ndarray of float32, shape (n, size)
        Unit vectors.
    start : ndarray of float32, shape (k, size)
    tolerance : float
        See :data:`TOLERANCE`; 0 for all iterations while any row changes its cluster.

    Returns
    -------
    ndarray of float32, shape (k, size)
    """
    workers = task_share()
    centroids = start.astype(np.float64)
    # Before the first iteration all rows are in a cluster of its own, the last.
    labels = np.full(len(sample), len(start), np.int32)
    sums = np.zeros((len(start) + 1, start.shape[1]))
    least_shift = 0.0
    for iteration in range(max_iter):
        labels = _assign_all(sample, centroids, labels, sums, workers)
        if iteration == 0:
            least_shift = tolerance * _mean_variance(sums[:-1].sum(axis=0) / len(sample))
        moved = _means(sample, labels, sums[:-1], centroids)
        shift = float(((moved - centroids) ** 2).sum())
        centroids = moved
        # 0 where no row changed its cluster.
        if shift <= least_shift:
            break
    return centroids.astype(np.float32)


class _MoveChunk:
    """Assigns the rows of a chunk to their centroids, and adds up those that change their cluster."""

    def __init__(self, sample: Floats, centroids: Doubles, before: Labels) -> None:
        self._sample = sample
        self._scores = Scores(centroids, "cpu")
        self._before = before

    def __call__(self, start: int) -> _Moves:
        """Take the chunk that begins at row `start`."""
        rows, before = self._sample[start : start + _CHUNK], self._before[start : start + _CHUNK]
        labels = np.concatenate([self._nearest(part) for part in _blocks(rows)])
        moved = np.flatnonzero(labels != before)
        clusters, places = np.unique(np.concatenate([labels[moved], before[moved]]), return_inverse=True)
        sums = torch.zeros(len(clusters), rows.shape[1], dtype=torch.float64)
        # Fresh memory of this size is mapped anew each time, which takes longer than the sum.
        doubles = np.empty((min(_BLOCK, len(moved)), rows.shape[1]))
        parts = (_blocks(one) for one in (moved, places[: len(moved)], places[len(moved) :]))
        for part, to, gone in zip(*parts, strict=True):
            there = doubles[: len(part)]
            there[:] = rows[part]
            sums.index_add_(0, torch.from_numpy(to), torch.from_numpy(there))
            sums.index_add_(0, torch.from_numpy(gone), torch.from_numpy(there), alpha=-1)
        return _Moves(labels, clusters, sums.numpy())

    def _nearest(self, rows: Floats) -> Labels:
        """Return the best centroid of each row; of equal ones the lowest."""
        best = np.full(len(rows), -np.inf, np.float32)
        labels = np.zeros(len(rows), np.int32)
        for first, scores, _ in self._scores.of(rows):
            table = scores.numpy()
            # numpy's is four times as fast as torch's here.
            places = table.argmax(axis=1)
            values = table[np.arange(len(rows)), places]
            better = values > best
            labels[better] = places[better] + first
            best[better] = values[better]
        return labels


def _assign_all(sample: Floats, centroids: Doubles, before: Labels, sums: Doubles, workers: int) -> Labels:
    """Return each row's cluster, and bring the sums of the clusters up to date."""
    labels = np.empty_like(before)
    starts = range(0, len(sample), _CHUNK)
    with torch_threads(1):
        chunks = map_in_order(_MoveChunk(sample, centroids, before), starts, workers, lambda: set_own_torch_threads(1))
        for start, chunk in zip(starts, chunks, strict=True):
            labels[start : start + _CHUNK] = chunk.labels
            sums[chunk.clusters] += chunk.sums
    return labels


def _means(sample: Floats, labels: Labels, sums: Doubles, centroids: Doubles) -> Doubles:
    """Return the clusters' means; an empty cluster's is a far row, or stays where no row is far."""
    counts = np.bincount(labels, minlength=len(centroids))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        sums = sums.copy()
        distances = _squared_distances(sample, labels, centroids)
        farthest = np.argsort(-distances, kind="stable")[: len(empty)]
        for cluster, row in zip(empty, farthest[distances[farthest] > 0], strict=False):
            far = sample[row].astype(np.float64)
            sums[labels[row]] -= far
            counts[labels[row]] -= 1
            sums[cluster] = far
            counts[cluster] = 1
    there = counts[:, None] > 0
    return np.divide(sums, counts[:, None], out=centroids.copy(), where=there)


def _squared_distances(sample: Floats, labels: Labels, centroids: Doubles) -> Doubles:
    """Return each row's squared distance from its centroid, in float64."""
    distances = np.empty(len(sample))
    for start in range(0, len(sample), _CHUNK):
        rows = slice(start, start + _CHUNK)
        apart = sample[rows].astype(np.float64) - centroids[labels[rows]]
        distances[rows] = row_products(apart, apart)
    return distances


def _mean_variance(mean: Doubles) -> float:
    """Return the mean variance of the columns of unit rows with this mean."""
    return max(0.0, (1.0 - float((mean**2).sum())) / len(mean))


def _blocks(rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Cut a chunk's rows."""
    return [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
