"""The nearest centroids of vectors, the same bits whatever the blocks, threads and device.

Nearest means what k-means means by it: at the least Euclidean distance from the unit vector u, which is the largest
*score* u·c - |c|²/2. A float32 product finds the centroids that could be it, sums in float64 decide.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nemo_image.dedup.pairs.cosine import single_bound
from nemo_image.errors import ArgumentError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CENTROIDS_AT_ONCE = 4096
# Numbers gathered at once for sums in float64: 2**20 are 16 MB of pairs.
_NUMBERS_AT_ONCE = 2**20


class _Block(NamedTuple):
    """Some centroids, ready for the product: all weights lie within `margin` of what exact arithmetic gives."""

    first: int
    weights: torch.Tensor
    bias: torch.Tensor
    margin: float


class Scores:
    """Multiplies unit rows with all centroids, a few thousand centroids at a time.

    Scores are less what all centroids of a row have in common: u·c - |c|²/2 is u·(c - m) - (c - m)·(c + m)/2 plus a
    number that knows nothing of c. With m the centroids' mean the differences are small, and so are their errors,
    where all rows are near copies.

    Parameters
    ----------
    centroids : ndarray of float, shape (k, size)
    device : str
        A device of torch.
    """

    def __init__(self, centroids: Floats | Doubles, device: str) -> None:
        self._device = device
        self._dtype = torch.float32 if _products_are_whole() else torch.float64
        self._onednn = device == "cpu" and self._dtype == torch.float32 and _onednn_is_faster()
        mean = centroids.mean(axis=0, dtype=np.float64)
        self._blocks = [
            self._block(centroids[first : first + CENTROIDS_AT_ONCE].astype(np.float64), mean, first)
            for first in range(0, len(centroids), CENTROIDS_AT_ONCE)
        ]

    def of(self, rows: Floats) -> Iterator[tuple[int, torch.Tensor, float]]:
        """Yield the scores of unit rows, a block of centroids after the other.

        Yields
        ------
        first : int
            The number of the block's first centroid.
        scores : tensor of float, shape (n, block)
        margin : float
            How far a score may lie from its exact value.
        """
        # torch warns of memory that it may not write to.
        left = self._laid_out(rows if rows.flags.writeable else rows.copy())
        for block in self._blocks:
            scores = torch.nn.functional.linear(left, block.weights, block.bias)
            yield block.first, scores.to_dense() if self._onednn else scores, block.margin

    def _block(self, centroids: Doubles, mean: Doubles, first: int) -> _Block:
        weights = centroids - mean
        offsets = row_products(weights, centroids + mean) / 2
        size = weights.shape[1]
        largest = np.max(np.sqrt(row_products(weights, weights)) + np.abs(offsets))
        # Of the product, and of the sums in float64 on both sides of it.
        margin = single_bound(size) * largest + (size + 8) * 2.0**-52 * (1 + np.max(row_products(centroids, centroids)))
        return _Block(first, self._laid_out(weights), self._laid_out(-offsets), float(margin))

    def _laid_out(self, values: Floats | Doubles) -> torch.Tensor:
        """Return numbers as a tensor that the product takes."""
        tensor = torch.from_numpy(values).to(self._device, self._dtype)
        return tensor.to_mkldnn() if self._onednn else tensor


@functools.cache
def _onednn_is_faster() -> bool:
    """Return whether oneDNN's float32 product is faster than MKL's, which torch takes for plain tensors.

    MKL's takes no AVX-512 on AMD's processors, where oneDNN's is twice as fast. On Intel's it is 10% slower.
    """
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        is_intel = False
    return torch.backends.mkldnn.is_available() and not (is_intel and torch.backends.mkl.is_available())


class _Pairs(NamedTuple):
    """Pairs of a row and a cluster, with the product of their vectors."""

    rows: Integers
    clusters: Integers
    dots: Doubles
    scores: Doubles

    def take(self, places: Integers) -> _Pairs:
        """Return some of the pairs."""
        return _Pairs(self.rows[places], self.clusters[places], self.dots[places], self.scores[places])

    def best(self, wanted: int) -> _Pairs:
        """Return the best pairs of each row, row by row, the best first; of equal ones the lowest cluster is better."""
        order = np.lexsort((self.clusters, -self.scores, self.rows))
        rows = self.rows[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        return self.take(order[rank < wanted])


def nearest_centroids(
    vectors: Floats, centroids: Floats, n_probe: int = 1, device: str = "cpu", block_rows: int = 1024
) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return the nearest centroids of each vector, and its cosine distance to the nearest.

    Parameters
    ----------
    vectors : ndarray of float32, shape (n, size)
        Of any length but zero, finite.
    centroids : ndarray of float32, shape (k, size)
    n_probe : int
        How many centroids to name for each vector, from 1 to k.
    device : str
        Where torch looks for candidates; the result does not depend on it.
    block_rows : int
        How many vectors to look at at once; the result does not depend on it.

    Returns
    -------
    clusters : ndarray of int32, shape (n, n_probe)
        The nearest first; of equally near ones the lowest number.
    distance : ndarray of float32, shape (n,)
        1 - cosine to the nearest centroid; 1 if that is zero.

    Raises
    ------
    ArgumentError
        If `n_probe` is not from 1 to k, or the vectors' length is not the centroids'.
    """
    count, size = centroids.shape
    if not 1 <= n_probe <= count:
        raise ArgumentError(f"n_probe={n_probe}: must be from 1 to the number of clusters, {count}")
    if vectors.shape[1] != size:
        raise ArgumentError(f"centroids of {size} numbers do not fit vectors of {vectors.shape[1]}")
    scores = Scores(centroids, device)
    squares = _squares(centroids)
    clusters = np.empty((len(vectors), n_probe), np.int32)
    distance = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), block_rows):
        rows = slice(start, start + block_rows)
        clusters[rows], distance[rows] = _nearest(vectors[rows], centroids, squares, scores, n_probe)
    return clusters, distance


def row_products(left: Doubles, right: Doubles) -> Doubles:
    """Return the dot product of each row of `left` with the same row of `right`.

    Each is summed in an order that depends on the rows' length alone.
    """
    made: Doubles = np.einsum("ij,ij->i", left, right)
    return made


def _squares(rows: Floats) -> Doubles:
    """Return the squared length of each row."""
    parts = (rows[start : start + CENTROIDS_AT_ONCE] for start in range(0, len(rows), CENTROIDS_AT_ONCE))
    return np.concatenate([row_products(part, part) for part in (part.astype(np.float64) for part in parts)])


def _nearest(
    vectors: Floats, centroids: Floats, squares: Doubles, scores: Scores, n_probe: int
) -> tuple[Integers, Doubles]:
    """Find the nearest centroids of a few vectors."""
    exact = vectors.astype(np.float64)
    norms = np.sqrt(row_products(exact, exact))
    units = (exact / norms[:, None]).astype(np.float32)
    parts = []
    for first, found, margin in scores.of(units):
        rows, places = _candidates(found, margin, n_probe)
        clusters = places + first
        dots = _dots(exact, rows, centroids, clusters)
        parts.append(_Pairs(rows, clusters, dots, dots / norms[rows] - squares[clusters] / 2).best(n_probe))
    best = _Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))).best(n_probe)
    nearest = best.clusters.reshape(-1, n_probe)
    lengths = norms * np.sqrt(squares[nearest[:, 0]])
    cosines = np.divide(best.dots[::n_probe], lengths, out=np.zeros(len(lengths)), where=lengths > 0)
    return nearest, 1 - np.clip(cosines, -1, 1)


def _candidates(scores: torch.Tensor, margin: float, n_probe: int) -> tuple[Integers, Integers]:
    """Return each pair of a row and a column that could be among the row's `n_probe` best, and at least so many."""
    wanted = min(n_probe, scores.shape[1])
    last = scores.amax(1) if wanted == 1 else scores.topk(wanted, 1, sorted=True).values[:, -1]
    rows, columns = (scores >= (last - 2 * margin)[:, None]).nonzero(as_tuple=True)
    return rows.cpu().numpy(), columns.cpu().numpy()


def _dots(vectors: Doubles, rows: Integers, centroids: Floats, clusters: Integers) -> Doubles:
    """Return the products of pairs in float64, each summed in an order of its own."""
    dots = np.empty(len(rows))
    step = max(1, _NUMBERS_AT_ONCE // vectors.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        dots[part] = row_products(vectors[rows[part]], centroids[clusters[part]].astype(np.float64))
    return dots


def _products_are_whole() -> bool:
    """Tell whether torch multiplies float32 numbers whole: a program may have let it cut them to TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Set for one device only, in a way that this question has no answer for.
        return False
