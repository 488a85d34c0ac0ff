"""Which of 64-bit hashes are near to an earlier one: equal but for a few bits.

No more pairs are compared than multi-index hashing finds (`nemo_image.dedup.hashes.multi_index`); rows that fall are
never compared with again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image.dedup.hashes.multi_index import BITS, Hashes, Rows, near_pairs, popcount, spread
from nemo_image.errors import ArgumentError

MAX_ROWS = 2**31

_LEAF = 1024  # rows so few that all pairs of them fit in memory
_PAIRS_A_ROW = 4  # kept in memory at once, of more rows
_PAIRS_AT_ONCE = 2**18
_NONE = np.iinfo(np.int64).max
_LOW = 0xFFFFFFFF
_HEX = "^[0-9a-fA-F]{16}$"
_TEXTS_AT_ONCE = 2**18


def hashes_from_hex(texts: pa.Array | pa.ChunkedArray | Sequence[str]) -> Hashes:
    """Return hashes that are written in 16 hexadecimal digits, as imagehash writes them.

    Parameters
    ----------
    texts : array of strings, or sequence of str
        Without nulls.

    Raises
    ------
    ArgumentError
        If a text is something else.
    """
    column = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts, pa.string())
    hashes = np.empty(len(column), np.uint64)
    for start in range(0, len(column), _TEXTS_AT_ONCE):
        part = column.slice(start, _TEXTS_AT_ONCE)
        odd = part.filter(pc.invert(pc.fill_null(pc.match_substring_regex(part, _HEX), False)))
        if len(odd):
            raise ArgumentError(f"{odd[0].as_py()!r} is no 64-bit hash: 16 hexadecimal digits are needed")
        digits = bytes.fromhex("".join(part.to_pylist()))
        hashes[start : start + len(part)] = np.frombuffer(digits, ">u8")
    return hashes


def near_hashes(
    hashes: Hashes, max_distance: int, *, representative: bool = True, fixed: int = 0
) -> tuple[npt.NDArray[np.int16], Rows]:
    """Find the rows whose hash is near that of an earlier row.

    Row after row: a row falls if an earlier row's hash differs from its own in at most `max_distance` bits; with
    `representative`, an earlier row that did not fall itself.

    Parameters
    ----------
    hashes : ndarray of uint64, shape (n,)
        In the order in which rows are judged; fewer than 2**31.
    max_distance : int
        Bits, 0 to 64.
    representative : bool, default True
        Whether only rows that are kept make others fall; else, any earlier row.
    fixed : int, default 0
        So many first rows are kept and not judged.

    Returns
    -------
    distance : ndarray of int16, shape (n,)
        Bits to the nearest of those earlier rows; -1 for rows that do not fall.
    twin : ndarray of int64, shape (n,)
        That row, the earliest of equally near ones; -1 for rows that do not fall.

    Raises
    ------
    ArgumentError
        If an argument is out of its range.
    """
    hashes = spread(_checked(hashes, max_distance, fixed))
    first = _first_of_equals(hashes)
    distinct = np.flatnonzero(first == np.arange(len(hashes)))
    sources = _kept(hashes, distinct, max_distance, fixed) if representative else distinct
    is_source = np.zeros(len(hashes), bool)
    is_source[sources] = True

    best = np.full(len(hashes), _NONE)
    is_copy = is_source[first]
    is_copy[distinct] = False
    is_copy[:fixed] = False
    best[is_copy] = first[is_copy]  # at distance 0
    del first  # memory: of ten million rows, each of these takes 80 MB
    open_ = ~(is_copy | is_source) if representative else ~is_copy
    open_[:fixed] = False
    judged = np.flatnonzero(open_)
    best[judged] = _nearest(hashes, judged, sources, max_distance)
    fell = best != _NONE
    return np.where(fell, best >> 32, -1).astype(np.int16), np.where(fell, best & _LOW, -1)


def _checked(hashes: Hashes, max_distance: int, fixed: int) -> Hashes:
    hashes = np.asarray(hashes)
    if hashes.ndim != 1 or hashes.dtype != np.uint64 or len(hashes) >= MAX_ROWS:
        raise ArgumentError(
            f"hashes must be a vector of fewer than {MAX_ROWS} uint64, not {hashes.dtype} of shape {hashes.shape}"
        )
    if max_distance not in range(BITS + 1):
        raise ArgumentError(f"max_distance must be 0 to {BITS} bits, not {max_distance}")
    if fixed not in range(len(hashes) + 1):
        raise ArgumentError(f"fixed must be 0 to the number of hashes, {len(hashes)}, not {fixed}")
    return hashes


def _first_of_equals(hashes: Hashes) -> Rows:
    """Return for each row the first row with the same hash."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(hashes)])
    first = np.empty(len(hashes), np.int64)
    first[order] = np.repeat(order[begins], np.diff(begins, append=len(hashes)))
    return first


# --------------------------------------------------------------------------------------------------- who is kept


def _kept(hashes: Hashes, distinct: Rows, max_distance: int, fixed: int) -> Rows:
    """Return the rows that do not fall, of those that are first with their hash."""
    if max_distance == 0:
        return distinct
    count = int(np.searchsorted(distinct, fixed))
    before, rest = distinct[:count], distinct[count:]
    rest = rest[_nearest(hashes, rest, before, max_distance) == _NONE]
    return np.concatenate([before, _greedy(hashes, rest, max_distance)])


def _greedy(hashes: Hashes, rows: Rows, max_distance: int) -> Rows:
    """Return the rows that are kept when they are judged one after the other.

    Where too many are near to each other, the first half is judged alone. What falls to its kept rows is compared with
    nothing else.
    """
    pairs = _pairs_among(hashes, rows, max_distance)
    if pairs is not None:
        return rows[_stands(len(rows), pairs)]
    half = len(rows) // 2
    kept = _greedy(hashes, rows[:half], max_distance)
    rest = rows[half:]
    rest = rest[_nearest(hashes, rest, kept, max_distance) == _NONE]
    return np.concatenate([kept, _greedy(hashes, rest, max_distance)])


def _pairs_among(hashes: Hashes, rows: Rows, radius: int) -> Rows | None:
    """Return the pairs within the radius, by their places in `rows`, as ``later << 32 | earlier``, sorted.

    None if they are too many.
    """
    if len(rows) <= _LEAF:
        few = hashes[rows]
        later, earlier = np.nonzero(np.tril(popcount(few[:, None] ^ few) <= radius, -1))
        return later << 32 | earlier
    found = np.empty(_PAIRS_A_ROW * len(rows), np.int64)  # untouched memory costs nothing
    count = 0
    for query, reference, _ in near_pairs(hashes, rows, rows, radius):
        is_earlier = reference < query
        pairs = query[is_earlier] << 32 | reference[is_earlier]
        if count + len(pairs) > len(found):
            return None
        found[count : count + len(pairs)] = pairs
        count += len(pairs)
    found = found[:count]
    found.sort()
    return found


def _stands(count: int, pairs: Rows) -> npt.NDArray[np.bool_]:
    """Tell which rows are kept, given all near pairs by their later row."""
    stands = bytearray(b"\1") * count
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        for later, earlier in zip((part >> 32).tolist(), (part & _LOW).tolist(), strict=True):
            if stands[earlier]:
                stands[later] = 0
    return np.frombuffer(stands, bool)


# ---------------------------------------------------------------------------------------------------- who is near


def _nearest(hashes: Hashes, queries: Rows, references: Rows, max_distance: int) -> Rows:
    """Return ``distance << 32 | row`` of the nearest earlier reference of each query row; `_NONE` where none is near.

    The radius grows, so that a row with a close neighbour is not compared with all of its distant ones.
    """
    best = np.full(len(queries), _NONE)
    open_ = np.arange(len(queries))
    radius = 0
    while radius < max_distance:
        radius = min(max(1, 2 * radius), max_distance)
        for query, reference, distance in near_pairs(hashes, queries, references, radius):
            row = references[reference]
            earlier = row < queries[query]
            np.minimum.at(best, open_[query[earlier]], distance[earlier] << 32 | row[earlier])
        alone = best[open_] == _NONE
        open_, queries = open_[alone], queries[alone]
    return best
