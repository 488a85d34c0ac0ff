"""All pairs of near 64-bit hashes: multi-index hashing, in numpy.

The 64 bits are cut into bands. If two hashes differed in more than ``flips[i]`` bits of every band i, they would differ
in at least ``sum(flips) + bands`` bits. So with ``sum(flips) = radius - bands + 1`` it is enough to look, in each band,
for hashes whose bits there are equal but for `flips` of them [1]_. The hashes lie sorted by the band's bits, beside a
table that says where each value begins.

References
----------
.. [1] M. Norouzi, A. Punjani, D. J. Fleet. Fast search in Hamming space with multi-index hashing. CVPR 2012.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Pairs = tuple[Rows, Rows, Rows]  # a query, a reference, and the bits in which they differ

BITS = 64

_WIDEST = 24  # bits of a band: its table has 2**24 entries
_MOST_PROBES = 4096  # values looked up for each hash
_QUERIES_AT_ONCE = 2**20
_PAIRS_AT_ONCE = 2**15
_CROWDED = 1024  # references with one value of a band: worth a loop in Python,
_TILE = 4096  # over so many of them
_TILE_QUERIES = 32  # and so many queries
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)

_SPREAD = 27 * np.arange(BITS) % BITS  # of all strides, one of the two under which real hashes met least often

# What things cost, in nanoseconds; only their ratios matter.
_NS_CALL = 30_000.0
_NS_INDEX = 150.0
_NS_PROBE = 10.0
_NS_FOUND = 8.0
_NS_CANDIDATE = 3.5
_NS_CROWDED_CANDIDATE = 2.0

_BIT_COUNTS = np.array([value.bit_count() for value in range(2**16)], np.uint8)


def _popcount_by_table(values: Hashes) -> npt.NDArray[np.uint8]:
    counts = _BIT_COUNTS[values.view(np.uint16)].reshape(*values.shape, 4)
    total: npt.NDArray[np.uint8] = counts.sum(-1, dtype=np.uint8)
    return total


popcount: Any = getattr(np, "bitwise_count", _popcount_by_table)  # numpy 1 has none
"""Number of bits that are set in each of an array of uint64."""


def spread(hashes: Hashes) -> Hashes:
    """Put the bits into an order in which neighbours come from distant parts of the picture; distances stay.

    Neighbouring bits of most hashes are alike: as they come, a band's values would be few.
    """
    moved = np.empty_like(hashes)
    for start in range(0, len(hashes), _PAIRS_AT_ONCE):
        part = np.ascontiguousarray(hashes[start : start + _PAIRS_AT_ONCE])
        bits = np.unpackbits(part.view(np.uint8).reshape(-1, 8), axis=1)[:, _SPREAD]
        moved[start : start + len(part)] = np.packbits(bits).view(np.uint64)
    return moved


def near_pairs(hashes: Hashes, queries: Rows, references: Rows, radius: int) -> Iterator[Pairs]:
    """Yield all pairs of a query and a reference within a radius, some of them several times.

    Parameters
    ----------
    hashes : ndarray of uint64
        See `spread`.
    queries, references : ndarray of int64
        Which of the hashes; fewer than 2**31 each.
    radius : int
        Bits, 0 to 64.

    Yields
    ------
    query, reference : ndarray of int64
        Their places in `queries` and `references`.
    distance : ndarray of int64
        The bits in which they differ.
    """
    if not len(queries) or not len(references):
        return
    for band in plan_bands(len(references), len(queries), radius):
        index = _Index(hashes[references], band)
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = hashes[queries[start : start + _QUERIES_AT_ONCE]]
            for query, reference, distance in index.near(some, radius):
                yield query + start, reference, distance


class _Index:
    """Hashes sorted by the bits of a band."""

    def __init__(self, hashes: Hashes, band: Band) -> None:
        self.band = band
        self.starts = np.zeros((1 << band.width) + 1, np.int32)
        ordered = _by_value(hashes, band)
        for start in range(0, len(ordered), _QUERIES_AT_ONCE):
            values = (ordered[start : start + _QUERIES_AT_ONCE] >> _HALF).astype(np.int64)
            counts = np.bincount(values - values[0])
            self.starts[1 + values[0] : 1 + values[0] + len(counts)] += counts.astype(np.int32)
        np.cumsum(self.starts, out=self.starts)
        self.order = ordered.astype(np.uint32)  # its lower half
        del ordered
        self.hashes = hashes[self.order]

    def near(self, queries: Hashes, radius: int) -> Iterator[Pairs]:
        """Yield the pairs within the radius whose bits here differ in no more than the band's flips."""
        ordered = _by_value(queries, self.band)
        order, values = (ordered & _LOW).astype(np.int64), (ordered >> _HALF).astype(np.int64)
        queries = queries[order]
        for mask in self.band.masks():
            probes = values ^ mask
            start = self.starts[probes]
            size = self.starts[probes + 1] - start
            for query, reference in _sparse(start, size):
                distance = popcount(queries[query] ^ self.hashes[reference])
                near = np.flatnonzero(distance <= radius)
                yield self._pairs(order, query[near], reference[near], distance[near])
            for top, left in _crowded_tiles(probes, start, size):
                distance = popcount(queries[top, None] ^ self.hashes[None, left])
                row, column = np.nonzero(distance <= radius)
                yield self._pairs(order, top.start + row, left.start + column, distance[row, column])

    def _pairs(self, order: Rows, query: Rows, reference: Rows, distance: Any) -> Pairs:
        return order[query], self.order[reference].astype(np.int64), distance.astype(np.int64)


def _by_value(hashes: Hashes, band: Band) -> Hashes:
    """Return ``bits in the band << 32 | place`` of hashes, sorted."""
    ordered = hashes >> np.uint64(band.shift)
    ordered &= np.uint64((1 << band.width) - 1)
    ordered <<= _HALF
    ordered |= np.arange(len(hashes), dtype=np.uint64)
    ordered.sort()
    return ordered


def _sparse(start: Rows, size: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yield the pairs of each query with its `size` references from `start` on, where these are few."""
    sparse = np.flatnonzero((size > 0) & (size <= _CROWDED))
    total = np.cumsum(size[sparse])
    cuts = np.arange(_PAIRS_AT_ONCE, total[-1] if len(total) else 0, _PAIRS_AT_ONCE)
    for where in np.split(sparse, np.searchsorted(total, cuts)):
        count = size[where]
        stop = np.cumsum(count)
        if len(where):
            yield np.repeat(where, count), np.arange(stop[-1]) + np.repeat(start[where] + count - stop, count)


def _crowded_tiles(probes: Rows, start: Rows, size: Rows) -> Iterator[tuple[slice, slice]]:
    """Yield tiles of queries and references with the same value, where these references are many."""
    crowded = np.flatnonzero(size > _CROWDED)
    for run in np.split(crowded, np.flatnonzero(np.diff(probes[crowded])) + 1):
        if not len(run):
            continue
        first, stop = int(start[run[0]]), int(start[run[0]] + size[run[0]])
        for left in range(first, stop, _TILE):
            reference = slice(left, min(left + _TILE, stop))
            for top in range(int(run[0]), int(run[-1]) + 1, _TILE_QUERIES):
                yield slice(top, min(top + _TILE_QUERIES, int(run[-1]) + 1)), reference


# ----------------------------------------------------------------------------------------------------------- bands


@dataclass(frozen=True, slots=True)
class Band:
    """Bits of a hash by which near ones are found.

    Attributes
    ----------
    shift, width : int
        The bits from `shift` on.
    flips : int
        In how many of them near hashes may differ.
    """

    shift: int
    width: int
    flips: int

    def masks(self) -> Iterator[int]:
        """Yield all differences in at most `flips` bits."""
        for count in range(self.flips + 1):
            for bits in combinations(range(self.width), count):
                yield sum(1 << bit for bit in bits)

    @property
    def probes(self) -> int:
        """Number of the masks."""
        return sum(math.comb(self.width, count) for count in range(self.flips + 1))

    def cost(self, references: int, queries: int) -> float:
        """Estimate the nanoseconds a query."""
        each = references / (1 << self.width)
        compare = _NS_CANDIDATE if each <= _CROWDED else _NS_CROWDED_CANDIDATE
        probe = _NS_PROBE + min(each, 1.0) * _NS_FOUND + each * compare + _NS_CALL / queries
        return self.probes * probe + _NS_INDEX * references / queries


def plan_bands(references: int, queries: int, radius: int) -> tuple[Band, ...]:
    """Choose the bands that find all pairs within a radius at the least cost.

    Parameters
    ----------
    references, queries : int
        Number of hashes, positive.
    radius : int
        Bits.

    Returns
    -------
    tuple of Band
        One of no bits, where comparing all pairs is the cheapest.
    """
    widest = min(_WIDEST, references.bit_length())
    plans: list[tuple[Band, ...]] = [(Band(0, 0, 0),)]
    for count in range(1, min(radius + 1, BITS) + 1):
        flips, more = divmod(radius, count)
        first = more + 1  # bands with `flips`; the others have one less
        for width in range(1, min(widest, BITS // first) + 1):
            other = min(widest, (BITS - first * width) // max(1, count - first))
            plan = _consecutive([(width, flips)] * first + [(other, flips - 1)] * (count - first), widest)
            if sum(band.probes for band in plan) <= _MOST_PROBES:
                plans.append(plan)
    return min(plans, key=lambda plan: sum(band.cost(references, queries) for band in plan))


def _consecutive(bands: list[tuple[int, int]], widest: int) -> tuple[Band, ...]:
    """Lay out bands, given by width and flips, one after the other; the first get the bits that are left over."""
    left = BITS - sum(width for width, _ in bands)
    plan = []
    shift = 0
    for width, flips in bands:
        extra = min(1, left, widest - width)
        plan.append(Band(shift, width + extra, flips))
        shift += width + extra
        left -= extra
    return tuple(plan)
