"""How the kept share depends on the threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nemo_image.dedup.result import SweepPoint

USUAL_EPS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.34, 0.5)
"""The curve that is shown where a model's scale is not known."""

_LEAST_EPS = 1e-6
_POINTS = 15
_ROUNDS = 3
_CLOSE = 1e-3

Sweep = Callable[[Sequence[float]], list[SweepPoint]]


def choose_eps(sweep: Sweep, target_keep: float) -> tuple[float, list[SweepPoint]]:
    """Return the threshold whose kept share comes nearest to a target, and the points looked at.

    Parameters
    ----------
    sweep : callable
        Takes thresholds, and returns the points of the curve; each call goes over all rows once.
    target_keep : float
        Share of the rows to keep, in (0, 1].
    """
    eps = [0.0, *np.geomspace(_LEAST_EPS, 1.0, _POINTS).tolist()]
    seen: dict[float, SweepPoint] = {}
    for _ in range(_ROUNDS):
        seen |= {point.eps: point for point in sweep([one for one in eps if one not in seen])}
        best = min(seen.values(), key=lambda point: (abs(point.share - target_keep), point.eps))
        if abs(best.share - target_keep) <= _CLOSE:
            break
        more = [one.eps for one in seen.values() if one.share >= target_keep]
        fewer = [one.eps for one in seen.values() if one.share < target_keep]
        if not more or not fewer:
            break
        # Few rows more, few thresholds less: the curve falls, but for single rows.
        low = max(one for one in more if one < max(fewer)) if any(one < max(fewer) for one in more) else 0.0
        high = min((one for one in fewer if one > low), default=1.0)
        eps = np.linspace(low, high, _POINTS + 2)[1:-1].tolist()
    return best.eps, sorted(seen.values(), key=lambda point: point.eps)


def curve_text(points: Sequence[SweepPoint]) -> str:
    """Return a curve as lines of text."""
    lines = [
        f"  eps {point.eps:<8.4g} keeps {point.share:6.1%} ({point.kept:,} of {point.total:,})" for point in points
    ]
    return "\n".join(lines)


def is_eps(value: object) -> bool:
    """Tell whether a value is a threshold: a number in [0, 1]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
