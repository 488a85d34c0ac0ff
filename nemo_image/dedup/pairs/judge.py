"""Which rows of one cluster are copies of earlier ones: cosines of all pairs, in memory for a few tiles.

float32 products only say which pairs may matter: all whose product lies within the error of such products
(:func:`~nemo_image.dedup.pairs.cosine.single_bound`) of what decides. Of those the canonical cosine is computed
(:mod:`nemo_image.dedup.pairs.cosine`), and everything is decided on that, so that the result depends on the rows and
their order alone. Where nearly all pairs are that close, as among near-copies, the tile is multiplied in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from nemo_image.dedup.pairs.cosine import double_bound, edge, single_bound
from nemo_image.dedup.pairs.tiles import Columns, Multiplier, Tile, group_maxima, lay_out, pairs_above, tiles
from nemo_image.dedup.pairs.vectors import Floats, Indices, Vectors
from nemo_image.dedup.pairs.winners import Patterns, Winners
from nemo_image.errors import ArgumentError

Bools = npt.NDArray[np.bool_]

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Judged:
    """The closest earlier row of each row.

    Attributes
    ----------
    similarity : ndarray of float32, shape (thresholds, count)
        The largest canonical cosine to an earlier row (with `representative`, to one kept at that threshold); 0 where
        there is none, or it is negative.
    twin : ndarray of int64, shape (thresholds, count)
        That row, the earliest among equals; -1 where there is none, or its cosine is negative.
    """

    similarity: Floats
    twin: Indices


def judge(
    vectors: Vectors,
    thresholds: Sequence[float],
    *,
    representative: bool,
    fixed: int = 0,
    silent: Bools | None = None,
    block_rows: int = 1024,
    device: str = "cpu",
) -> Judged:
    """Compare each row with the rows before it.

    Parameters
    ----------
    vectors : Vectors
        The rows in the order in which they are judged: finite and not zero, of any norm.
    thresholds : sequence of float
        Cosines from 0 to 1. With `representative`, a row falls at a threshold if it has a twin and its similarity
        (float32, taken as a float64) is at least that; all thresholds are judged in one pass over the products.
        Otherwise what falls changes nothing for later rows, and the result holds for any threshold: one row of it is
        returned.
    representative : bool
        Compare with those earlier rows only that did not fall. Otherwise with all, as SemDeDup does (arXiv
        2303.09540).
    fixed : int, default 0
        So many first rows are kept at every threshold and not judged: similarity 0, no twin.
    silent : ndarray of bool, shape (count,), optional
        Rows that are judged, but that no row is compared with.
    block_rows : int, default 1024
        Rows compared at once with a tile of 4,096 others. A tile takes 48 KiB a row; the result does not depend on it.
    device : str, default "cpu"
        The device of torch for the products.

    Raises
    ------
    ArgumentError
        If an argument is out of its range.
    """
    _check(vectors, thresholds, fixed, silent, block_rows)
    compared = np.ones(vectors.count, bool) if silent is None else ~silent
    with torch.inference_mode():
        judges = _Judges(vectors, _limits(thresholds) if representative else None, device)
        if representative:
            judges.run(np.arange(fixed, vectors.count), compared, fixed, block_rows)
        else:
            _run_chains(judges, first_copies(vectors, compared), compared, fixed, block_rows)
        return Judged(judges.similarity, judges.twin)


def first_copies(vectors: Vectors, compared: Bools) -> Indices:
    """Return the first row of the same bytes (by XXH3-128) for each row `compared`, itself for others; (count,)."""
    digests = np.empty((vectors.count, 2), np.uint64)
    for start in range(0, vectors.count, _ROWS_AT_ONCE):
        rows = np.ascontiguousarray(vectors.rows(start, min(start + _ROWS_AT_ONCE, vectors.count)))
        joined = b"".join([xxhash.xxh3_128_digest(row) for row in rows])
        digests[start : start + len(rows)] = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    # The sort is stable: each run of equal digests begins with its first row.
    order = np.lexsort((digests[:, 1], digests[:, 0], ~compared))
    new = ~compared[order]
    new[:1] = True
    new[1:] |= (digests[order[1:]] != digests[order[:-1]]).any(1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[new][np.cumsum(new) - 1]
    return firsts


def single_precision_holds(device: str) -> bool:
    """Tell whether torch multiplies float32 matrices on `device` in float32, and not in TF32 or bfloat16."""
    backends = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    # torch 2.8 has one setting for all devices.
    precision = getattr(getattr(backends, "matmul", None), "fp32_precision", None)
    if precision is None:
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


class _Judges:
    """The state of a pass over the rows: what each row has won, and which rows later ones are compared with."""

    def __init__(self, vectors: Vectors, limits: Floats | None, device: str) -> None:
        self._limits = limits
        self._patterns = Patterns(1 if limits is None else len(limits))
        self._multiplier = Multiplier(vectors, device)
        self._single = single_precision_holds(device)
        shape = (self._patterns.thresholds, vectors.count)
        self.similarity = np.zeros(shape, np.float32)
        self.twin = np.full(shape, -1, np.int64)

    def run(self, judged: Indices, compared: Bools, fixed: int, block_rows: int) -> None:
        """Judge the rows `judged`, which ascend, by those that are `compared` with."""
        pattern = np.full(len(compared), -1, np.int32)
        pattern[:fixed][compared[:fixed]] = 0
        for start in range(0, len(judged), block_rows):
            block = judged[start : start + block_rows]
            pattern[block] = self._judge_block(block, pattern[: block[0]], compared[block])

    def _judge_block(self, block: Indices, pattern: npt.NDArray[np.int32], compared: Bools) -> npt.NDArray[np.int32]:
        """Judge a block, and return its rows' patterns: -1 for rows that later ones are not compared with."""
        self._multiplier.load(block)
        winners = Winners(self._multiplier, self._patterns, single=self._single)
        pool = np.flatnonzero(pattern >= 0)
        for columns in tiles(pool, pattern[pool]):
            if winners.settled():
                break
            winners.compare(Tile(self._multiplier, columns))
        winners.finish()
        numbers = np.where(compared, 0, -1).astype(np.int32)
        if self._limits is not None:
            fell = np.asarray(winners.best >= self._limits[:, None])
            numbers[fell.all(0)] = -1
        if (numbers >= 0).any():
            square = Tile(self._multiplier, _columns(block, numbers), strict=True)
            if self._limits is not None:
                kept = ~self._fall(square, fell) & compared
                numbers[:] = -1
                some = np.flatnonzero(kept.any(0))
                numbers[some] = self._patterns.number(kept[:, some])
            if not winners.settled():
                winners.compare(square.select(_columns(block, numbers)))
                winners.finish()
        self.similarity[:, block] = np.where(winners.twin >= 0, winners.best, 0)
        self.twin[:, block] = winners.twin
        return numbers

    def _fall(self, square: Tile, fell: Bools) -> Bools:
        """Return which rows of the block fell, shape (thresholds, b), given which fell to rows before it.

        In their order, each row that has not fallen fells those after it that are as close.
        """
        assert self._limits is not None
        places = np.searchsorted(self._multiplier.block_indices, square.columns.indices)
        reached = self._reach(square, np.asarray(~fell.all(0)))
        for threshold, limit in enumerate(self._limits):
            reaches = reached(limit)
            for column in np.flatnonzero(reaches.any(1)).tolist():
                if not fell[threshold, places[column]]:
                    fell[threshold] |= reaches[column]
        return fell

    def _reach(self, square: Tile, rows: Bools) -> Callable[[np.float32], Bools]:
        """Return what tells, for a threshold, which of `rows` reach it with which column, shape (columns, b)."""
        assert self._limits is not None
        multiplier, indices = self._multiplier, square.columns.indices
        if self._single:
            product = square.product(torch.float32)
            floor = np.where(rows, float(self._limits.min()) - single_bound(multiplier.size), np.inf)
            pairs = pairs_above(product, group_maxima(product), square.columns, {0: floor})
            if pairs is not None:
                cosines = multiplier.canonical(pairs.rows, pairs.others)
                return partial(
                    _few_reach, np.searchsorted(indices, pairs.others), pairs.rows, cosines, (len(indices), len(rows))
                )
        products = square.product(torch.float64)[:, : len(indices)].cpu().numpy()

        def many_reach(limit: np.float32) -> Bools:
            reaches = products >= edge(limit)
            doubtful = np.nonzero(np.abs(products - edge(limit)) <= double_bound(multiplier.size))
            reaches[doubtful] = multiplier.canonical(doubtful[0], indices[doubtful[1]]) >= limit
            return np.ascontiguousarray(reaches.T)

        return many_reach


def _few_reach(columns: Indices, rows: Indices, cosines: Floats, shape: tuple[int, int], limit: np.float32) -> Bools:
    reaches = np.zeros(shape, bool)
    close = cosines >= limit
    reaches[columns[close], rows[close]] = True
    return reaches


def _run_chains(judges: _Judges, firsts: Indices, compared: Bools, fixed: int, block_rows: int) -> None:
    """Judge each vector once: rows of the same bytes get their twin from the first judged of them."""
    rows = np.arange(fixed, len(firsts))
    _, places, groups = np.unique(firsts[fixed:], return_index=True, return_inverse=True)
    leaders = fixed + places
    judges.run(np.sort(leaders), compared & (firsts == np.arange(len(firsts))), fixed, block_rows)
    leader = leaders[groups]
    copies, leader = rows[rows != leader], leader[rows != leader]
    # A leader's own twin at 1 is earlier, and its copies are at 1 to that too.
    at_one = judges.similarity[0, leader] == 1
    judges.similarity[0, copies] = 1
    judges.twin[0, copies] = np.where(at_one, judges.twin[0, leader], leader)


def _columns(block: Indices, numbers: npt.NDArray[np.int32]) -> Columns:
    return lay_out(block[numbers >= 0], numbers[numbers >= 0])


def _limits(thresholds: Sequence[float]) -> Floats:
    """Return for each threshold the least float32 that reaches it."""
    wanted = np.asarray(thresholds, np.float64)
    limits = wanted.astype(np.float32)
    return np.where(limits < wanted, np.nextafter(limits, np.float32(np.inf)), limits)


def _check(vectors: Vectors, thresholds: Sequence[float], fixed: int, silent: Bools | None, block_rows: int) -> None:
    if len(thresholds) == 0 or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ArgumentError(f"thresholds={list(thresholds)}: give at least one, each a cosine from 0 to 1")
    if not 0 <= fixed <= vectors.count:
        raise ArgumentError(f"fixed={fixed}: there are {vectors.count} rows, give a number of them")
    if silent is not None and (silent.shape != (vectors.count,) or silent.dtype != np.bool_):
        raise ArgumentError(f"silent has {silent.dtype} of shape {silent.shape}: give {vectors.count} booleans")
    if block_rows < 1:
        raise ArgumentError(f"block_rows={block_rows}: give at least 1")
