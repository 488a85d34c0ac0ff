"""The rows nearest to each query, exactly: a kernel over one matrix.

float32 products only say which rows may be among the best: all that lie within the error of such products of the k-th.
Their cosines are then computed in float64, each pair summed in an order that depends on the vectors' length alone, so
that the result depends on the rows and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 4096
"""Rows multiplied at once with `QUERIES_AT_ONCE` queries."""

QUERIES_AT_ONCE = 1024
PAIRS_AT_ONCE = 2048

Matrix = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Nearest:
    """For each query, the rows among which its best are (all of equally good ones), with their cosines."""

    rows: list[Indices]
    cosines: list[Doubles]
    unusable: int


def nearest_rows(
    matrix: Matrix, named: npt.NDArray[np.bool_], queries: Doubles, k: int, device: str = "cpu"
) -> Nearest:
    """Return the `k` nearest rows of each query, and those that tie with the last of them.

    Parameters
    ----------
    matrix : ndarray of float, shape (n, size)
        Of any norm. Rows that are zero or not finite, or not `named`, are left out and counted.
    queries : ndarray of float64, shape (q, size)
        Of any norm but zero.
    device : str
        Where torch looks for candidates; the result does not depend on it.
    """
    rows = [np.zeros(0, np.int64) for _ in queries]
    cosines = [np.zeros(0) for _ in queries]
    query_norms = np.sqrt(np.einsum("ij,ij->i", queries, queries))
    query_units = (queries / query_norms[:, None]).astype(np.float32)
    unusable = 0
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS]
        with np.errstate(over="ignore", invalid="ignore"):
            exact = block.astype(np.float64)
            norms = np.sqrt(np.einsum("ij,ij->i", exact, exact))
        good = np.flatnonzero(np.isfinite(norms) & (norms > 0) & named[start : start + len(block)])
        unusable += len(block) - len(good)
        exact, norms = (exact, norms) if len(good) == len(block) else (exact[good], norms[good])
        units = (exact / norms[:, None]).astype(np.float32)
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            floors = np.array([_last(one, k) for one in cosines[part]])
            found, of_query = _candidates(units, query_units[part], floors, k, device)
            of_query = of_query + first
            made = _products(exact, found, queries, of_query) / (norms[found] * query_norms[of_query])
            for query in np.unique(of_query).tolist():
                mine = of_query == query
                both = np.concatenate([rows[query], start + good[found[mine]]])
                values = np.concatenate([cosines[query], np.clip(made[mine], -1, 1)])
                kept = values >= _last(values, k)
                rows[query], cosines[query] = both[kept], values[kept]
    return Nearest(rows, cosines, unusable)


def _last(cosines: Doubles, k: int) -> float:
    """Return the k-th largest cosine; what any other must reach."""
    return float(np.partition(cosines, len(cosines) - k)[len(cosines) - k]) if len(cosines) >= k else -np.inf


def _candidates(units: Floats, queries: Floats, floors: Doubles, k: int, device: str) -> tuple[Indices, Indices]:
    """Return the pairs of a row and a query that may be among the query's best `k`."""
    import torch

    if not len(units):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    kind = torch.float32 if _products_are_whole() else torch.float64
    left, right = (torch.from_numpy(one).to(device, kind) for one in (queries, units))
    products = left @ right.T
    bound = _bound(units.shape[1])
    least = torch.from_numpy(floors - bound).to(device)
    if len(units) > k:
        least = torch.maximum(least, products.topk(k, dim=1).values[:, -1].double() - 2 * bound)
    of_query, rows = (products >= least[:, None]).nonzero(as_tuple=True)
    return rows.cpu().numpy(), of_query.cpu().numpy()


def _bound(size: int) -> float:
    """Return how far a float32 product of two unit vectors may lie from their cosine.

    ``size`` roundings of the sum, in any order, and eight of the normalised numbers (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1).
    """
    roundings = (size + 8) * 2.0**-24
    return roundings / (1 - roundings)


def _products(rows: Doubles, of_row: Indices, queries: Doubles, of_query: Indices) -> Doubles:
    """Return the product of each pair, each summed in an order that depends on the vectors' length alone."""
    made = np.empty(len(of_row))
    for start in range(0, len(of_row), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        made[part] = np.einsum("ij,ij->i", rows[of_row[part]], queries[of_query[part]])
    return made


def _products_are_whole() -> bool:
    """Tell whether torch multiplies float32 numbers whole: a program may have let it cut them to TF32 or bfloat16."""
    import torch

    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Set for one device only, in a way that this question has no answer for.
        return False
