"""How a column's numbers are spread, counted in one pass over any number of rows.

Bins are a power of two wide and begin at a multiple of their width, so that two neighbours make one of the next width,
whatever part of the rows they count. Counts therefore stay exact while parts are merged and bins widened, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

FINE_BINS = 2048
"""Bins with anything in them that are kept of a column: 16 bytes each."""

BARS = 44
"""Bars of a chart at most."""

OUTLIERS = 0.005
"""So large a share of the values at each end may be left out of a chart that would otherwise show one bar."""

_NARROWEST = -1000  # 2**-1000: twice that is still far above the smallest number


@dataclass(frozen=True)
class Bars:
    """What a chart shows.

    Attributes
    ----------
    edges : list of float
        One more than there are bars. A bar counts from its left edge to before its right one.
    counts : list of int
    below, above : int
        Values left out at each end.
    """

    edges: list[float]
    counts: list[int]
    below: int = 0
    above: int = 0


@dataclass(frozen=True)
class Distribution:
    """Counts of a column's values in bins, merged exactly.

    Attributes
    ----------
    exponent : int
        Bins are ``2 ** exponent`` wide.
    bins : ndarray of float64, shape (n,)
        Left edges in units of that width, ascending: integers, as floats because they may be huge.
    counts : ndarray of int64, shape (n,)
    nulls, not_finite : int
        Rows without a value, and with one that is no number or infinite.
    low, high : float
        The least and the greatest value; NaN where there is none.
    total : float
        Sum of the values.
    is_whole : bool
        Whether the column holds integers.
    """

    exponent: int
    bins: Floats
    counts: Counts
    nulls: int = 0
    not_finite: int = 0
    low: float = math.nan
    high: float = math.nan
    total: float = 0.0
    is_whole: bool = False

    @classmethod
    def of(cls, values: pa.Array | pa.ChunkedArray) -> Distribution:
        """Count an Arrow column of integers, floats or booleans."""
        present = np.asarray(values.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
        numbers = present[np.isfinite(present)]
        is_whole = pa.types.is_integer(values.type)
        rest = {"nulls": values.null_count, "not_finite": len(present) - len(numbers)}
        if not len(numbers):
            return cls(_NARROWEST, np.zeros(0), np.zeros(0, np.int64), is_whole=is_whole, **rest)
        exponent = max(_first_exponent(numbers), 0 if is_whole else _NARROWEST)
        bins, counts = np.unique(np.floor(numbers / 2.0**exponent), return_counts=True)
        low, high = float(numbers.min()), float(numbers.max())
        return cls(
            exponent, bins, counts, low=low, high=high, total=_sum(numbers), is_whole=is_whole, **rest
        )._narrowed()

    @classmethod
    def merged(cls, parts: Sequence[Distribution]) -> Distribution:
        """Add the counts of several parts of a column. Neither their order nor how they were cut matters."""
        exponent = max(part.exponent for part in parts)
        wide = [part._widened(exponent) for part in parts]
        bins, places = np.unique(np.concatenate([part.bins for part in wide]), return_inverse=True)
        counts = np.zeros(len(bins), np.int64)
        np.add.at(counts, places.reshape(-1), np.concatenate([part.counts for part in wide]))
        filled = [part for part in parts if len(part.bins)]
        return cls(
            exponent,
            bins,
            counts,
            nulls=sum(part.nulls for part in parts),
            not_finite=sum(part.not_finite for part in parts),
            low=min((part.low for part in filled), default=math.nan),
            high=max((part.high for part in filled), default=math.nan),
            total=_sum(np.array([part.total for part in parts])),
            is_whole=all(part.is_whole for part in parts),
        )._narrowed()

    @property
    def count(self) -> int:
        """Values counted: finite numbers."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the values; NaN where there is none."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """Return the value below which a share of the values lies, exact to the width of a bin; NaN without any."""
        if not self.count:
            return math.nan
        if share <= 0 or share >= 1:
            return self.low if share <= 0 else self.high
        ends = np.cumsum(self.counts)
        place = int(np.searchsorted(ends, share * ends[-1]))
        before = ends[place] - self.counts[place]
        inside = (share * ends[-1] - before) / self.counts[place]
        value = float((self.bins[place] + inside) * 2.0**self.exponent)
        value = math.floor(value) if self.is_whole else value
        return min(max(value, self.low), self.high)

    def bars(self, at_most: int = BARS) -> Bars:
        """Return what a chart shows: all values, but for outliers that would press all others into a few bars."""
        if not self.count:
            return Bars([], [])
        low, high = self.quantile(OUTLIERS), self.quantile(1 - OUTLIERS)
        if self.high - self.low <= 4 * (high - low) or not high > low:
            low, high = self.low, self.high
        exponent = self.exponent
        while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= at_most:
            exponent += 1
        wide = self._widened(exponent)
        first, last = math.floor(low / 2.0**exponent), math.floor(high / 2.0**exponent)
        counts = np.zeros(last - first + 1, np.int64)
        shown = (wide.bins >= first) & (wide.bins <= last)
        counts[(wide.bins[shown] - first).astype(np.int64)] = wide.counts[shown]
        below, above = wide.counts[wide.bins < first].sum(), wide.counts[wide.bins > last].sum()
        edges = [(first + number) * 2.0**exponent for number in range(len(counts) + 1)]
        return Bars(edges, counts.tolist(), int(below), int(above))

    def _widened(self, exponent: int) -> Distribution:
        if exponent == self.exponent or not len(self.bins):
            return self
        # In two steps: 2 ** (a difference of exponents) may be too large for a number.
        half = (exponent - self.exponent) // 2
        bins = np.floor(self.bins / 2.0**half / 2.0 ** (exponent - self.exponent - half))
        bins, places = np.unique(bins, return_inverse=True)
        counts = np.zeros(len(bins), np.int64)
        np.add.at(counts, places.reshape(-1), self.counts)
        return replace(self, exponent=exponent, bins=bins, counts=counts)

    def _narrowed(self) -> Distribution:
        """Return as few bins as may be kept."""
        found = self
        while len(found.bins) > FINE_BINS:
            found = found._widened(found.exponent + 1)
        return found


def _sum(numbers: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # the mean is then not told
        return float(numbers.sum())


def _first_exponent(numbers: Floats) -> int:
    """Return the width to begin with: about a thousandth of where most values lie."""
    largest = float(np.abs(numbers).max())
    if not largest > 0:
        return -10
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(numbers, (0.01, 0.99))
        spread = high - low
    if not (spread > 0 and math.isfinite(spread)):
        spread = largest * 2.0**-10
    # The largest number, divided by the width, must not become infinite.
    least = max(_NARROWEST, math.ceil(math.log2(largest)) - 900)
    return max(least, math.floor(math.log2(spread)) - 10) if spread > 0 else least
