"""The exact threshold of a quantile, found in a few passes over one column.

Each value becomes an unsigned integer that orders as the value does. A pass counts, in every shard, how many values
lie in each of 65,536 equal parts of an interval; the part that holds the value of the rank wanted is the next
interval. So memory is bounded however many rows there are, only the columns concerned are read, and the result does
not depend on how rows are spread over shards: two passes for float32 and for integers of a small range, at most four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nemo_image import backend
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.passes import one_task_a_shard, run_each, tasks_of
from nemo_image.datasets.row_windows import frames
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import ArgumentError
from nemo_image.filters.quantiles import Quantile

PART_BITS = 16
"""An interval is counted in two to this power parts."""

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Interval:
    """Where a value is looked for: in a column's keys from `low` to `high`."""

    column: str
    low: int
    high: int

    @property
    def shift(self) -> int:
        return max(0, (self.high - self.low).bit_length() - PART_BITS)


@dataclass
class _Counts:
    """Values by part of an interval: those parts that have any."""

    parts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    least: int
    most: int


@dataclass
class _Search:
    """The search for one quantile's threshold.

    Attributes
    ----------
    rank : int
        How many values of the interval lie below the one wanted; known after the first pass.
    """

    quantile: Quantile
    interval: _Interval
    rank: int | None = None
    found: bool = False

    def narrow(self, counts: npt.NDArray[np.int64], least: int, most: int) -> None:
        """Go on in the part that holds the value."""
        total = int(counts.sum())
        if total == 0:
            self.found = True
            return
        if self.rank is None:
            rows = self.quantile.rows(total)
            self.rank = total - rows if self.quantile.side == "top" else rows - 1
        below = np.cumsum(counts)
        part = int(np.searchsorted(below, self.rank, side="right"))
        self.rank -= int(below[part - 1]) if part else 0
        old = self.interval
        low = max(least, old.low + (part << old.shift))
        high = min(most, old.low + ((part + 1) << old.shift) - 1)
        self.interval = _Interval(old.column, low, high)
        self.found = low == high


def find_thresholds(
    dataset: ImageTextPairDataset, quantiles: Sequence[Quantile]
) -> tuple[ImageTextPairDataset, dict[Quantile, int | float | None]]:
    """Find the value from which on (or down to which) rows belong to each quantile.

    Parameters
    ----------
    dataset : ImageTextPairDataset
    quantiles : sequence of Quantile
        Of columns of numbers. Nulls and NaNs are no values.

    Returns
    -------
    dataset : ImageTextPairDataset
        The same rows; with the columns read from files if they were still to compute.
    thresholds : dict of Quantile to int or float
        None for a column without any value.

    Raises
    ------
    MissingColumnError
        If a column is not there.
    ArgumentError
        If one holds no numbers.
    RunError
        If shards cannot be read.
    """
    columns = list(dict.fromkeys(one.column for one in quantiles))
    dataset = one_task_a_shard(dataset, columns)
    kinds = {name: _kind(name, backend.arrow_type_of(dataset.metadata._meta[name])) for name in columns}
    largest = {name: 2 ** (8 * kind.itemsize) - 1 for name, kind in kinds.items()}
    searches = [_Search(one, _Interval(one.column, 0, largest[one.column])) for one in quantiles]
    while under_way := [one for one in searches if not one.found]:
        _pass(dataset, kinds, under_way)
    values = {
        one.quantile: None if one.rank is None else _value(one.interval.low, kinds[one.quantile.column])
        for one in searches
    }
    return dataset, values


def _pass(dataset: ImageTextPairDataset, kinds: dict[str, np.dtype[Any]], searches: Sequence[_Search]) -> None:
    """Count once, for all searches, and narrow them."""
    intervals = list(dict.fromkeys(one.interval for one in searches))
    sums = {one: np.zeros(2**PART_BITS, np.int64) for one in intervals}
    ends = {one: (one.high, one.low) for one in intervals}

    def add(_: int, found: list[_Counts | None]) -> None:
        for interval, one in zip(intervals, found, strict=True):
            if one is not None:
                sums[interval][one.parts] += one.counts
                least, most = ends[interval]
                ends[interval] = min(least, one.least), max(most, one.most)

    tasks = tasks_of(dataset, list(kinds))
    counting = _CountShard(dataset.source, intervals, kinds)
    run_each("find quantiles", counting, tasks, len(tasks.shards), add, name_of=lambda item: item[0])
    for one in searches:
        one.narrow(sums[one.interval], *ends[one.interval])


class _CountShard:
    """Counts a shard's values in the parts of intervals."""

    def __init__(self, source: DatasetSource, intervals: Sequence[_Interval], kinds: dict[str, np.dtype[Any]]) -> None:
        self.source = source
        self.intervals = intervals
        self.kinds = kinds

    def __call__(self, item: tuple[str, PartitionTask]) -> list[_Counts | None]:
        """Return the counts for each interval; None where it has no value."""
        parts: dict[str, list[Keys]] = {name: [] for name in self.kinds}
        for frame in frames(self.source, *item):
            for name, kind in self.kinds.items():
                parts[name].append(_keys(backend.arrow_values(frame[name]), kind))
        keys = {name: np.concatenate(some) if some else np.zeros(0, np.uint64) for name, some in parts.items()}
        return [_count(keys[one.column], one) for one in self.intervals]


def _count(keys: Keys, interval: _Interval) -> _Counts | None:
    inside = keys[(keys >= interval.low) & (keys <= interval.high)]
    if not len(inside):
        return None
    parts, counts = np.unique((inside - np.uint64(interval.low)) >> np.uint64(interval.shift), return_counts=True)
    return _Counts(parts.astype(np.int64), counts.astype(np.int64), int(inside.min()), int(inside.max()))


# ------------------------------------------------------------------------------------------------- values as integers


def _kind(name: str, kind: pa.DataType) -> np.dtype[Any]:
    """Return numpy's type in which a column's values are ordered."""
    if pa.types.is_float16(kind):
        return np.dtype(np.float32)
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        wide = {pa.float32(): np.float32, pa.float64(): np.float64, pa.uint64(): np.uint64}
        return np.dtype(wide.get(kind, np.int64))
    raise ArgumentError(f"a quantile needs a column of numbers, and {name!r} holds {kind}")


def _keys(values: pa.Array, kind: np.dtype[Any]) -> Keys:
    """Return an unsigned integer for each value, in the values' order; nulls and NaNs have none."""
    array = values.drop_null().cast(pa.from_numpy_dtype(kind)).to_numpy(zero_copy_only=False)
    unsigned = np.dtype(f"u{kind.itemsize}")
    top = unsigned.type(1 << (8 * kind.itemsize - 1))
    keys: npt.NDArray[Any] = array.view(unsigned)
    if kind.kind == "i":
        keys = keys ^ top
    elif kind.kind == "f":
        bits = (array[~np.isnan(array)] + kind.type(0)).view(unsigned)  # and -0.0 is 0.0
        keys = np.where(bits & top, ~bits, bits | top)
    return keys.astype(np.uint64)


def _value(key: int, kind: np.dtype[Any]) -> int | float:
    """Return the value of a key."""
    if kind.kind == "u":
        return key
    top = 1 << (8 * kind.itemsize - 1)
    if kind.kind == "i":
        return key - top
    bits = key ^ top if key & top else ~key & (2 * top - 1)
    return float(np.array([bits], f"u{kind.itemsize}").view(kind)[0])
