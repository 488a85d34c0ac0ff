"""Quantiles in an expression: ``clip_score in top 30%``, ``aesthetic_score in bottom 1000``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from nemo_image.errors import ArgumentError

Side = Literal["top", "bottom"]

CALLS: dict[str, Side] = {"__top__": "top", "__bottom__": "bottom"}
"""How quantiles stand in the text that Python's parser gets."""

_WRITTEN = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\bin\s+(top|bottom)\s+(\d+(?:\.\d*)?|\.\d+)\s*(%?)""")


@dataclass(frozen=True)
class Quantile:
    """The rows with the largest (or smallest) values of a column.

    Attributes
    ----------
    column : str
    side : {"top", "bottom"}
    amount : Fraction
        In percent of the rows that have a value, or in rows.
    is_share : bool
        Whether it is in percent.
    """

    column: str
    side: Side
    amount: Fraction
    is_share: bool

    @classmethod
    def of(cls, column: str, side: Side, amount: str, unit: str) -> Quantile:
        """Return the quantile that is written as ``<column> in <side> <amount><unit>``.

        Raises
        ------
        ArgumentError
            If the amount makes no sense.
        """
        made = cls(column, side, Fraction(amount), unit == "%")
        if made.is_share and not 0 < made.amount <= 100:
            raise ArgumentError(f"{made}: a share lies above 0% and not above 100%")
        if not made.is_share and (made.amount < 1 or made.amount.denominator != 1):
            raise ArgumentError(f"{made}: a number of rows is whole, and at least 1; write 30% for a share")
        return made

    def rows(self, count: int) -> int:
        """Return how many of `count` rows it is: shares are rounded up."""
        wanted = math.ceil(self.amount * count / 100) if self.is_share else int(self.amount)
        return min(count, wanted)

    def __str__(self) -> str:
        return f"{self.column} in {self.side} {float(self.amount):g}{'%' if self.is_share else ''}"


def as_calls(text: str) -> str:
    """Return an expression with its quantiles written as calls, which Python's parser understands."""

    def call(match: re.Match[str]) -> str:
        literal, side, amount, unit = match.groups()
        return literal if literal is not None else f"in __{side}__('{amount}', '{unit}')"

    return _WRITTEN.sub(call, text)
