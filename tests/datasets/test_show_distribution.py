"""Histograms of any number of rows in one pass: exact, and the same however the rows are cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.datasets.show import distribution
from nemo_image.datasets.show.charts import chart_of, nice_ticks, number
from nemo_image.datasets.show.distribution import Distribution

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)


def same(one: Distribution, two: Distribution) -> bool:
    arrays = np.array_equal(one.bins, two.bins) and np.array_equal(one.counts, two.counts)
    numbers = [(one.nulls, two.nulls), (one.not_finite, two.not_finite), (one.low, two.low), (one.high, two.high)]
    return arrays and all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in numbers)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.none() | FLOATS, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=4), data=st.data())
def test_neither_cuts_nor_order_matter(values: list[float | None], cuts: list[int], data: st.DataObject) -> None:
    """Merged one after the other, from either end, or all at once."""
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [Distribution.of(pa.array(values[a:b], pa.float64())) for a, b in itertools.pairwise(edges)]
    at_once = Distribution.merged(parts)
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = Distribution.merged([one_by_one, part])
    assert same(at_once, one_by_one)
    assert same(at_once, Distribution.merged(data.draw(st.permutations(parts))))
    finite = [value for value in values if value is not None and math.isfinite(value)]
    assert at_once.count == len(finite)
    assert at_once.nulls == values.count(None)
    assert at_once.nulls + at_once.not_finite + at_once.count == len(values)
    if finite:
        assert (at_once.low, at_once.high) == (min(finite), max(finite))


def test_bins_stay_few_and_their_number_does_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "FINE_BINS", 16)
    rng = np.random.default_rng(0)
    parts = [Distribution.of(pa.array(rng.normal(shift, 1, 300))) for shift in (0, 3, 40)]
    merged = [Distribution.merged([Distribution.merged([parts[a], parts[b]]), parts[c]]) for a, b, c in
              ((0, 1, 2), (2, 1, 0), (1, 2, 0))]  # fmt: skip
    assert len(merged[0].bins) <= 16
    assert all(same(merged[0], one) for one in merged[1:])


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e12, 1e300])
def test_bars_count_what_numpy_counts(scale: float) -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(5, 1, 3000), rng.uniform(0, 10, 500)]) * scale
    found = Distribution.merged([Distribution.of(pa.array(part)) for part in np.array_split(values, 7)])
    bars = found.bars()
    assert 10 <= len(bars.counts) <= distribution.BARS
    # numpy closes the last bin: there is nothing on that edge.
    assert bars.counts == np.histogram(values, bars.edges)[0].tolist()
    assert sum(bars.counts) + bars.below + bars.above == len(values)
    for share in (0.1, 0.5, 0.9):
        assert found.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.01 * scale)
    assert found.mean == pytest.approx(values.mean())


def test_an_outlier_does_not_press_the_others_into_one_bar() -> None:
    values = [*np.linspace(0, 1, 999, endpoint=False), 1e9]  # numpy closes the last bin
    bars = Distribution.of(pa.array(values)).bars()
    assert bars.counts == np.histogram(values, bars.edges)[0].tolist()
    assert max(bars.counts) < 60
    assert 1 <= bars.above <= 6
    assert bars.below + sum(bars.counts) + bars.above == 1000
    assert f"{bars.above} from {number(bars.edges[-1])} on" in chart_of("n", Distribution.of(pa.array(values))).note


def test_integers_are_told_as_integers() -> None:
    found = Distribution.of(pa.array([1, 1, 2, 5, 5, 5, 9]))
    chart = chart_of("n", found)
    assert {bar.range: bar.count for bar in chart.bars if bar.count} == {"1": 2, "2": 1, "5": 3, "9": 1}
    assert dict(chart.facts)["median"] == "5"


@pytest.mark.parametrize("values", [[], [None], [math.nan, math.inf]])
def test_a_column_without_numbers_has_no_bars(values: list[float | None]) -> None:
    chart = chart_of("n", Distribution.of(pa.array(values, pa.float64())))
    assert chart.bars == []
    assert "Histogram of n" in chart.summary


@pytest.mark.parametrize("values", [[0.0] * 5, [7.25] * 5, [-1e300, 1e300], [5e-324]])
def test_odd_columns_have_a_chart(values: list[float]) -> None:
    chart = chart_of("n", Distribution.of(pa.array(values)), [values[0]])
    assert sum(bar.count for bar in chart.bars) == len(values)
    assert all(0 <= bar.left <= 100 and 0 < bar.height <= 100 for bar in chart.bars if bar.count)


def test_thresholds_stand_where_the_axis_says() -> None:
    chart = chart_of("score", Distribution.of(pa.array(np.linspace(0, 8, 801))), [2.0, 99.0])
    ((left, text),) = chart.marks
    low, high = 0.0, 100.0 / chart.bars[0].width * (8 / 32)  # bars are 0.25 wide
    assert text == "2"
    assert left == pytest.approx(100 * (2 - low) / high, abs=0.01)


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-3, 12) == [0, 5, 10]
    assert nice_ticks(1, 1) == []
    assert [number(one) for one in (1234567.0, 0.123456, 12.3456, 1e-9, math.nan)] == [
        "1,234,567", "0.1235", "12.35", "1e-09", "–",
    ]  # fmt: skip
