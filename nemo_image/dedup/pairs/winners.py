"""The best earlier row of each row of a block, kept from tile to tile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from nemo_image.dedup.pairs.cosine import Doubles, double_bound, single_bound
from nemo_image.dedup.pairs.tiles import (
    HITS_A_ROW,
    PAIRS_A_ROW,
    Columns,
    Multiplier,
    Pairs,
    Products,
    Tile,
    group_maxima,
    join,
    leading_pairs,
    pairs_above,
)
from nemo_image.dedup.pairs.vectors import Floats

# Any cosine from 0 on is larger.
_BELOW_ZERO = np.nextafter(np.float32(0), np.float32(-1))


class Patterns:
    """At which thresholds a row is kept, as one small number a row; pattern 0 is "at all of them".

    Attributes
    ----------
    members : list of ndarray of bool, shape (thresholds,)
        The thresholds of each pattern.
    """

    def __init__(self, thresholds: int) -> None:
        self.thresholds = thresholds
        self.members: list[npt.NDArray[np.bool_]] = []
        self._numbers: dict[bytes, int] = {}
        self.number(np.ones((thresholds, 1), bool))

    def number(self, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Return the pattern of each row of `kept`, shape (thresholds, rows); a new one gets the next number."""
        numbers = np.empty(kept.shape[1], np.int32)
        for row, packed in enumerate(np.packbits(kept, axis=0).T):
            key = packed.tobytes()
            if key not in self._numbers:
                self._numbers[key] = len(self.members)
                self.members.append(kept[:, row].copy())
            numbers[row] = self._numbers[key]
        return numbers


class Winners:
    """For each row of the multiplier's block and each threshold, the largest canonical cosine so far, and whose it is.

    Tiles come in ascending order of their rows: where a row's best is 1, no later one can win.

    Parameters
    ----------
    single : bool
        Whether float32 products on this device have float32's precision; if not, tiles are multiplied in float64.

    Attributes
    ----------
    best : ndarray of float32, shape (thresholds, b)
        A negative number where there is none from 0 on.
    twin : ndarray of int64, shape (thresholds, b)
        The row, as a place in the vectors; -1 where there is none.
    """

    def __init__(self, multiplier: Multiplier, patterns: Patterns, *, single: bool) -> None:
        shape = (patterns.thresholds, len(multiplier.block))
        self.best = np.full(shape, _BELOW_ZERO)
        self.twin = np.full(shape, -1, np.int64)
        self._multiplier, self._patterns = multiplier, patterns
        self._may_single = self._single = single
        # The largest float32 product so far, and the pairs that may still win by it.
        self._top = np.full(shape, -np.inf)
        self._pending: list[Pairs] = []
        self._single_bound, self._double_bound = single_bound(multiplier.size), double_bound(multiplier.size)

    def settled(self) -> bool:
        """Tell whether no further row can win anything."""
        return bool((self.best == 1).all())

    def compare(self, tile: Tile) -> None:
        """Compare the block with a tile; complete only after :meth:`finish`."""
        if self._single:
            product = tile.product(torch.float32)
            maxima = group_maxima(product)
            self._raise_top(tile.columns, maxima)
            floors = {span.pattern: self._floor(span.pattern) for span in tile.columns.spans}
            pairs = pairs_above(product, maxima, tile.columns, floors)
            if pairs is not None:
                self._pending.append(pairs)
                if sum(len(part.rows) for part in self._pending) > PAIRS_A_ROW * self.best.shape[1]:
                    self.finish()
                return
        product = tile.product(torch.float64)
        maxima = group_maxima(product)
        least = {span.pattern: self._least(span.pattern) for span in tile.columns.spans}
        self._offer(leading_pairs(product, maxima, tile.columns, least, self._double_bound))
        near = maxima >= maxima.max(1, keepdims=True) - 2 * self._single_bound
        self._single = self._may_single and int(near.sum()) <= HITS_A_ROW * len(maxima)

    def finish(self) -> None:
        """Decide between the pairs found so far."""
        if not self._pending:
            return
        pairs, self._pending = join(self._pending), []
        hopeful = np.zeros(len(pairs.rows), bool)
        for pattern in np.unique(pairs.patterns).tolist():
            hopeful |= (pairs.patterns == pattern) & (pairs.products >= self._floor(pattern)[pairs.rows])
        self._offer(Pairs(*(column[hopeful] for column in pairs)))

    def _raise_top(self, columns: Columns, maxima: Products) -> None:
        for pattern, start, stop in columns.spans:
            members = self._patterns.members[pattern]
            self._top[members] = np.maximum(self._top[members], maxima[:, start:stop].max(1))

    def _floor(self, pattern: int) -> Doubles:
        """Return the least float32 product with which a row of `pattern` may still win, by row of the block."""
        members = self._patterns.members[pattern]
        best = self.best[members].astype(np.float64)
        floor = np.maximum(self._top[members] - 2 * self._single_bound, best - self._single_bound)
        return np.asarray(floor.min(0))

    def _least(self, pattern: int) -> Floats:
        """Return the least canonical cosine with which a later row of `pattern` wins, by row of the block."""
        members = self._patterns.members[pattern]
        return np.asarray(np.nextafter(self.best[members].min(0), np.float32(np.inf)))

    def _offer(self, pairs: Pairs) -> None:
        """Let pairs win by their canonical cosine, the earlier row among equals."""
        cosines = self._multiplier.canonical(pairs.rows, pairs.others)
        order = np.lexsort((pairs.others, -cosines, pairs.rows))
        rows, others, cosines = pairs.rows[order], pairs.others[order], cosines[order]
        members = np.array(self._patterns.members)[pairs.patterns[order]]
        for threshold in range(self._patterns.thresholds):
            here = np.flatnonzero(members[:, threshold])
            first = here[np.flatnonzero(np.diff(rows[here], prepend=-1))]
            row, other, cosine = rows[first], others[first], cosines[first]
            best, twin = self.best[threshold, row], self.twin[threshold, row]
            wins = (cosine > best) | ((cosine == best) & (other < twin))
            self.best[threshold, row[wins]] = cosine[wins]
            self.twin[threshold, row[wins]] = other[wins]
