"""What semantic deduplication must find: plain numpy in float64, row by row, with no code of the product.

The cosine of two rows is computed in float64 from their float32 vectors and then rounded to float32; every decision is
made on that rounded value. Left to chance: a float64 cosine that lies within its own rounding error of the middle
between two float32 numbers may go either way (about one pair in ten million), so compare seeded data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Matrix = npt.NDArray[np.float64]
Order = str | tuple[str, bool]
Rank = Callable[[int, str, Any], int]
Row = tuple[str, Any]
"""A row's name: its shard and its id."""


def expected(
    frame: pd.DataFrame,
    eps: float,
    which_to_keep: Order = "hard",
    representative: bool = True,
    seed: int = 0,
    rank: Rank | None = None,
) -> pd.DataFrame:
    """Return the result of deduplication, a row for each row of `frame`, in its order and with its index.

    Parameters
    ----------
    frame : DataFrame
        ``shard``, ``id``, ``embedding`` (finite and not zero), ``cluster``, ``cosine_dist_to_cent`` as the product has
        them, and the column that `which_to_keep` names.
    eps : float
        Rows fall from a similarity of ``1 - eps`` on.
    which_to_keep : {"hard", "easy", "random"} or (column, ascending)
        The order of judging within a cluster.
    representative : bool
        Compare with earlier rows that are kept, not with any earlier row.
    seed, rank
        For ``"random"``: rows are ordered by ``rank(seed, shard, id)``.

    Returns
    -------
    DataFrame
        ``max_similarity`` float32, ``duplicate_of`` and ``duplicate_of_shard`` (None for kept rows), ``is_duplicate``.
    """
    assert frame["cluster"].notna().all(), "rows without a cluster are no case for the oracle"
    vectors = _vectors(frame)
    lengths = _lengths(vectors)
    names = _names(frame)
    similarity = np.zeros(len(frame), np.float32)
    twins: list[int | None] = [None] * len(frame)
    for members in frame.groupby("cluster").indices.values():
        earlier: list[int] = []
        for row in judging_order(frame, members, which_to_keep, seed, rank):
            similarity[row], twin = _nearest(vectors, lengths, row, earlier)
            if float(similarity[row]) >= 1 - eps:
                twins[row] = twin  # None at eps = 1, for a row that resembles none: it is kept
            if twins[row] is None or not representative:
                earlier.append(row)
    return pd.DataFrame(
        {
            "max_similarity": similarity,
            "duplicate_of": pd.Series([None if t is None else names[t][1] for t in twins], frame.index, object),
            "duplicate_of_shard": pd.Series([None if t is None else names[t][0] for t in twins], frame.index, object),
            "is_duplicate": np.array([t is not None for t in twins], bool),
        },
        frame.index,
    )


def judging_order(
    frame: pd.DataFrame, members: npt.NDArray[np.intp], which_to_keep: Order, seed: int = 0, rank: Rank | None = None
) -> list[int]:
    """Return a cluster's rows (positions in `frame`) in the order of judging; ties go by id, then shard."""
    names = _names(frame)
    rows = sorted((int(row) for row in members), key=lambda row: (names[row][1], names[row][0]))
    if which_to_keep == "random":
        assert rank is not None, "random order needs the product's rank of a row"
        return sorted(rows, key=lambda row: rank(seed, *names[row]))
    by_distance = {"hard": ("cosine_dist_to_cent", False), "easy": ("cosine_dist_to_cent", True)}
    column, ascending = by_distance[which_to_keep] if isinstance(which_to_keep, str) else which_to_keep
    values = list(frame[column])
    unknown = [row for row in rows if pd.isna(values[row])]
    known = [row for row in rows if not pd.isna(values[row])]
    # Python's sort keeps ties in their order, reversed or not.
    return sorted(known, key=lambda row: values[row], reverse=not ascending) + unknown


def all_pairs(frame: pd.DataFrame, eps: float) -> set[frozenset[Row]]:
    """Return every pair of rows whose similarity is ``1 - eps`` or more, whatever their clusters."""
    vectors = _vectors(frame)
    lengths = _lengths(vectors)
    names = _names(frame)
    pairs = set()
    for row in range(len(frame)):
        similarities = _similarities(vectors, lengths, row, list(range(row))).astype(np.float64)
        pairs |= {frozenset((names[row], names[other])) for other in np.flatnonzero(similarities >= 1 - eps)}
    return pairs


def wrong_clusters(frame: pd.DataFrame, centroids: npt.NDArray[np.floating[Any]]) -> dict[Row, str]:
    """Return the rows whose ``cluster`` or ``cosine_dist_to_cent`` is wrong, and why; empty if all are right.

    A row's cluster is the centroid with the least Euclidean distance to its unit vector, of equal centroids the first;
    ``cosine_dist_to_cent`` is one less the cosine to that centroid (1 to a centroid of zeros), in float32.

    Parameters
    ----------
    frame : DataFrame
        ``shard``, ``id``, ``embedding``, ``cluster``, ``cosine_dist_to_cent``.
    centroids : ndarray of float, shape (n_clusters, size)
        The centroids, in the order of their numbers.
    """
    found = zip(_names(frame), _vectors(frame), frame["cluster"], frame["cosine_dist_to_cent"], strict=True)
    wrong = {name: _wrong(vector, centroids, cluster, distance) for name, vector, cluster, distance in found}
    return {name: why for name, why in wrong.items() if why is not None}


def _wrong(vector: Matrix, given: npt.NDArray[np.floating[Any]], cluster: Any, distance: Any) -> str | None:
    centroids = given.astype(np.float64)
    unit = vector / _lengths(vector)
    squared = ((centroids - unit) ** 2).sum(axis=1)
    nearest = int(squared.argmin())
    if pd.isna(cluster) or not 0 <= cluster < len(centroids):
        return f"cluster {cluster} of {len(centroids)}"
    # Another sum of the same numbers may differ in its last bits: centroids so near to each other may both be right.
    if squared[int(cluster)] > squared[nearest] + 1e-12 * (1 + squared[nearest]):
        return f"cluster {cluster}, but {nearest} is nearer"
    centroid = centroids[int(cluster)]
    first = int(np.flatnonzero((centroids == centroid).all(axis=1))[0])
    if first != cluster:
        return f"cluster {cluster}, but {first} has the same centroid"
    length = _lengths(centroid)
    right = 1 - (unit * centroid).sum() / length if length else 1.0
    if pd.isna(distance) or not abs(float(distance) - right) <= np.spacing(np.float32(right)) / 2 + 1e-14:
        return f"cosine_dist_to_cent {distance}, but it is {right}"
    return None


def _nearest(vectors: Matrix, lengths: Matrix, row: int, earlier: list[int]) -> tuple[np.float32, int | None]:
    """Return the largest similarity to the earlier rows and the first row that has it; 0 and None if none reaches 0."""
    if not earlier:
        return np.float32(0), None
    similarities = _similarities(vectors, lengths, row, earlier)
    best = int(similarities.argmax())  # the first of equals
    if similarities[best] < 0:
        return np.float32(0), None
    return similarities[best], earlier[best]


def _similarities(vectors: Matrix, lengths: Matrix, row: int, others: list[int]) -> npt.NDArray[np.float32]:
    # Not a matrix product: BLAS may sum equal rows in different orders.
    dots = (vectors[others] * vectors[row]).sum(axis=1)
    return np.clip((dots / (lengths[others] * lengths[row])).astype(np.float32), -1, 1)


def _lengths(vectors: Matrix) -> Matrix:
    return np.sqrt((vectors * vectors).sum(axis=-1))


def _vectors(frame: pd.DataFrame) -> Matrix:
    vectors = np.array([np.asarray(vector, np.float32) for vector in frame["embedding"]]).astype(np.float64)
    assert np.isfinite(vectors).all(), "vectors that are not finite are no case for the oracle"
    assert vectors.any(axis=-1).all(), "zero vectors are no case for the oracle"
    return vectors


def _names(frame: pd.DataFrame) -> list[Row]:
    return [(str(shard), name) for shard, name in zip(frame["shard"], frame["id"], strict=True)]
