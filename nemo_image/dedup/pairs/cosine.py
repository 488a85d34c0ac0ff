"""The cosine of two rows as a float32 that no tile, thread or device shows in.

The *canonical* cosine of two float32 vectors is float32(a·b / (|a| |b|)) where each of the three sums of products is
rounded once from its exact value (``math.fsum``; products of float32 numbers are exact in float64). Whoever computes
it gets the same bits. It is rarely computed so: any float64 product lies within :func:`double_bound` of it, and where
both ends of that interval round to one float32, that is it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image.dedup.pairs.vectors import Floats, Indices, Vectors

Doubles = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 2048


def single_bound(size: int) -> float:
    """Return how far a float32 product of two unit vectors of `size` numbers may lie from their cosine.

    ``size`` roundings of the sum in any order, and eight of the normalised numbers (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1).
    """
    roundings = (size + 8) * 2.0**-24
    return roundings / (1 - roundings)


def double_bound(size: int) -> float:
    """Return how far a float64 product of two unit vectors of `size` numbers may lie from their canonical cosine.

    ``size`` roundings of the sum and as many of the two norms.
    """
    return (size + 16) * 2.0**-52


def edge(cosine: Any) -> Doubles:
    """Return where rounding begins to give `cosine` (float32): halfway from the float32 below it."""
    value = np.asarray(cosine, np.float32)
    below = np.nextafter(value, np.float32(-np.inf))
    return (value.astype(np.float64) + below.astype(np.float64)) / 2


def exact_cosine(left: Floats, right: Floats) -> np.float32:
    """Return the canonical cosine of two vectors from sums that are rounded once."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    dot, a_square, b_square = (math.fsum((p * q).tolist()) for p, q in ((a, b), (a, a), (b, b)))
    return np.float32(min(1.0, max(-1.0, dot / (math.sqrt(a_square) * math.sqrt(b_square)))))


def inverse_norms(vectors: Vectors) -> Doubles:
    """Return 1 / |row| for each row, shape (count,)."""
    inverse = np.empty(vectors.count)
    for start in range(0, vectors.count, _ROWS_AT_ONCE):
        rows = vectors.rows(start, min(start + _ROWS_AT_ONCE, vectors.count)).astype(np.float64)
        inverse[start : start + len(rows)] = 1 / np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return inverse


def units(rows: Floats, inverse: Doubles, out: npt.NDArray[Any]) -> None:
    """Write the normalised rows into `out`, as float32 or float64."""
    if out.dtype == np.float32 and (not len(inverse) or (inverse.max() < 2.0**100 and inverse.min() > 2.0**-100)):
        np.multiply(rows, inverse.astype(np.float32)[:, None], out=out)
    else:
        np.multiply(rows, inverse[:, None], out=out, dtype=np.float64, casting="same_kind")


def canonical_cosines(
    block: Floats, block_inverse: Doubles, rows: Indices, vectors: Vectors, inverse: Doubles, others: Indices
) -> Floats:
    """Return the canonical cosine of each pair of a row of a block and any row.

    Parameters
    ----------
    block : ndarray of float32, shape (b, size)
        Rows in memory; `block_inverse` has their inverse norms.
    rows : ndarray of int64, shape (n,)
        One row of each pair, as its place in `block`.
    vectors : Vectors
        All rows; `inverse` has their inverse norms.
    others : ndarray of int64, shape (n,)
        The other row of each pair, as its place in `vectors`.

    Returns
    -------
    ndarray of float32, shape (n,)
    """
    result = np.empty(len(rows), np.float32)
    bound = double_bound(vectors.size)
    order = np.argsort(others, kind="stable")
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = order[start : start + _ROWS_AT_ONCE]
        there, place = np.unique(others[part], return_inverse=True)
        left, right = block[rows[part]], vectors.take(there)[place]
        dots = np.einsum("ij,ij->i", left.astype(np.float64), right.astype(np.float64))
        cosines = dots * block_inverse[rows[part]] * inverse[others[part]]
        least = np.clip(cosines - bound, -1, 1).astype(np.float32)
        most = np.clip(cosines + bound, -1, 1).astype(np.float32)
        doubtful = np.flatnonzero(least != most)
        # Sparse rows often have no number in common.
        apart = ~((left[doubtful] != 0) & (right[doubtful] != 0)).any(1)
        least[doubtful[apart]] = 0
        for pair in doubtful[~apart].tolist():
            least[pair] = exact_cosine(left[pair], right[pair])
        result[part] = least
    return result
