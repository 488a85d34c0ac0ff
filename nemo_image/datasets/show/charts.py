"""Histograms as they are drawn: plain numbers for a template of inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_image.datasets.show.distribution import Bars, Distribution

TICKS = 5
_LEAST_HEIGHT = 1.0  # percent: one row among millions is still to be seen


@dataclass(frozen=True)
class Bar:
    """A bar: its place in percent of the chart's width and height, and what it says."""

    left: float
    width: float
    height: float
    range: str
    count: int


@dataclass(frozen=True)
class Chart:
    """A histogram with its axis, marks at thresholds (both as place in percent and text), and a few numbers."""

    title: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""
    tallest: int = 0
    unit: str = "rows"

    @property
    def summary(self) -> str:
        """What it shows, for those who do not see it."""
        said = ", ".join(f"{name} {value}" for name, value in self.facts)
        return f"Histogram of {self.title}: {said}."


def chart_of(title: str, found: Distribution, thresholds: Sequence[float] = (), unit: str = "rows") -> Chart:
    """Return the chart of a column.

    Parameters
    ----------
    thresholds : sequence of float
        Values to mark.
    unit : str, default "rows"
        What is counted.
    """
    shown = found.bars()
    facts = [(unit, f"{found.count:,}")]
    if found.count:
        quantiles = (("10%", 0.1), ("median", 0.5), ("90%", 0.9))
        facts += [("lowest", number(found.low)), *((name, number(found.quantile(q))) for name, q in quantiles)]
        facts += [("highest", number(found.high)), ("mean", number(found.mean))]
    facts += [("null", f"{found.nulls:,}")] if found.nulls else []
    facts += [("not finite", f"{found.not_finite:,}")] if found.not_finite else []
    if not shown.counts:
        return Chart(title, [], [], [], facts, unit=unit)
    low, high, tallest = shown.edges[0], shown.edges[-1], max(shown.counts)
    bars = [
        Bar(
            _percent(left, low, high),
            100 / len(shown.counts),
            max(100 * count / tallest, _LEAST_HEIGHT if count else 0),
            _range(left, right, found.is_whole),
            count,
        )
        for left, right, count in zip(shown.edges, shown.edges[1:], shown.counts, strict=False)
    ]
    marks = [(_percent(value, low, high), number(value)) for value in thresholds if low <= value <= high]
    # A bar of one integer is named in its middle, others where they begin.
    shift = 0.5 if found.is_whole and shown.edges[1] - low == 1 else 0.0
    ticks = [(_percent(value + shift, low, high), number(value)) for value in nice_ticks(low, high - shift)]
    ticks = [(left, text) for left, text in ticks if not (shift and "." in text)]
    return Chart(title, bars, ticks, marks, facts, _left_out(shown), tallest, unit)


def _range(left: float, right: float, is_whole: bool) -> str:
    if not is_whole:
        return f"{number(left)} to {number(right)}"
    return number(left) if right - left == 1 else f"{number(left)} to {number(right - 1)}"


def _left_out(shown: Bars) -> str:
    parts = []
    if shown.below:
        parts.append(f"{shown.below:,} below {number(shown.edges[0])}")
    if shown.above:
        parts.append(f"{shown.above:,} from {number(shown.edges[-1])} on")
    return f"Not drawn: {', '.join(parts)}." if parts else ""


def _percent(value: float, low: float, high: float) -> float:
    # Halved first: the range may be wider than the largest number.
    return round(100 * ((value / 2 - low / 2) / (high / 2 - low / 2)), 3)


def nice_ticks(low: float, high: float, at_most: int = TICKS) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    spread = high / at_most - low / at_most
    if not (spread > 0 and math.isfinite(spread)):
        return []
    power = math.floor(math.log10(spread))
    step = next((one for one in (m * 10.0**p for p in (power, power + 1) for m in (1, 2, 5)) if one >= spread), spread)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(place * step, digits) + 0.0 for place in range(first, last + 1)] if step else []


def number(value: float) -> str:
    """Return a number for people: four digits, thousands apart."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e15 or abs(value) < 1e-3:
        return f"{value:.3g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
