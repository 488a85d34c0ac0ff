"""Boolean expressions over columns, such as ``aesthetic_score > 5 and clip_score in top 30%``.

The text is parsed as a Python expression and walked by a short list of allowed nodes; nothing of it is ever executed.
"""

from __future__ import annotations

import ast
import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from nemo_image import schema
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.filters.operations import (
    ARITHMETIC,
    ERRORS,
    FUNCTIONS,
    arithmetic,
    as_operand,
    compare,
    type_name,
    widened,
)
from nemo_image.filters.quantiles import CALLS, Quantile, as_calls

_CALLED = re.compile(r"__(top|bottom)__\('([^']*)', '([^']*)'\)")
_SEPARATED = re.compile(r"__(?:top|bottom)__\('\d+', ''\)[,_' ]\s*\d")

ALLOWED = "columns, numbers, 'text', comparisons, in [..], in top 30%, is None, and, or, not, + - * /, " + ", ".join(
    sorted(FUNCTIONS)
)


class KeepExpression:
    """A parsed expression that tells which rows to keep.

    Parameters
    ----------
    text : str
        For example ``"aesthetic_score > 5 and nsfw_score < 0.5 and len(caption) >= 10"``. A comparison with a null is
        null, and a row whose result is null is not kept. ``clip_score in top 30%`` (or ``bottom 5%``, ``top 1000``)
        asks for the rows with the largest (smallest) values among all rows that have one; see
        :func:`~nemo_image.filters.keep`.

    Attributes
    ----------
    columns : list of str
        The columns that it names.
    quantiles : list of Quantile
        Those that it asks for: their thresholds must be found in all rows before it can be applied to some.

    Raises
    ------
    ArgumentError
        If the text is no expression, or uses more than is allowed.
    """

    row_by_row = True

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        called = as_calls(self.text)
        if _SEPARATED.search(called):
            raise ArgumentError(f"{text!r}: a number of rows is written without separators, as in top 1000")
        try:
            self._body = ast.parse(called, mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ArgumentError(
                f"{text!r} is not an expression ({error}); write for example 'aesthetic_score > 5'"
            ) from error
        names: dict[str, None] = {}
        self._quantiles: dict[Quantile, None] = {}
        self._check(self._body, names)
        self.columns = list(names)
        self.quantiles = list(self._quantiles)
        self._thresholds: dict[Quantile, int | float | None] = {}
        if not self.columns:
            raise ArgumentError(f"{text!r} names no column")

    def __call__(self, frame: pd.DataFrame) -> pd.Series:
        """Return a boolean column without nulls: whether each row of `frame` is kept.

        Raises
        ------
        ArgumentError
            If it asks for a quantile whose threshold is not known yet, or something cannot be computed: the message
            names the part of the expression and the types.
        """
        result = self._value(self._body, frame)
        if not isinstance(result, pd.Series) or not pd.api.types.is_bool_dtype(result.dtype):
            raise ArgumentError(f"{self.text!r} is not true or false: compare the column with something")
        return result.fillna(False).astype(schema.arrow_dtype("bool"))

    def with_thresholds(self, thresholds: Mapping[Quantile, int | float | None]) -> KeepExpression:
        """Return the expression with the thresholds of its quantiles; None for a column without any value."""
        known = copy.copy(self)
        known._thresholds = dict(thresholds)
        return known

    def terms(self) -> list[KeepExpression]:
        """Return the expressions that this one joins by ``and``; itself if there are no several."""
        body = self._body
        if not (isinstance(body, ast.BoolOp) and isinstance(body.op, ast.And)):
            return [self]
        return [term for value in body.values for term in KeepExpression(_written(value)).terms()]

    def require_columns(self, present: list[str]) -> None:
        """Raise if the expression names a column that is not there.

        Raises
        ------
        MissingColumnError
            Naming the column and those that are there.
        """
        missing = [name for name in self.columns if name not in present]
        if missing:
            raise MissingColumnError(
                f"the expression {self.text!r} names column {missing[0]!r}, which is not there; there are "
                f"{', '.join(present)}"
            )

    def __dask_tokenize__(self) -> tuple[str, str, str]:
        return ("KeepExpression", self.text, repr(sorted((str(one), at) for one, at in self._thresholds.items())))

    def _check(self, node: ast.expr, names: dict[str, None]) -> None:
        match node:
            case ast.Name(id=name):
                names[name] = None
            case ast.Constant(value=str() | int() | float() | bool() | None):
                pass
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value, names)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                self._check(operand, names)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                self._check(left, names)
                self._check(right, names)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                self._check_comparison(left, ops, comparators, names)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                if len(args) != FUNCTIONS[name][0]:
                    raise ArgumentError(f"{self.text!r}: {name}() takes {FUNCTIONS[name][0]} arguments")
                for value in args:
                    self._check(value, names)
            case _:
                raise ArgumentError(f"{self.text!r}: {_written(node)!r} is not allowed here. Allowed: {ALLOWED}")

    def _check_comparison(
        self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr], names: dict[str, None]
    ) -> None:
        self._check(left, names)
        for op, before, right in zip(ops, [left, *comparators], comparators, strict=False):
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Call):
                self._quantiles[self._quantile(before, right)] = None
                continue
            if isinstance(op, ast.In | ast.NotIn):
                self._check_list(before, right)
                continue
            self._check(right, names)
            if not _has_column(before) and (isinstance(op, ast.Is | ast.IsNot) or not _has_column(right)):
                raise ArgumentError(f"{self.text!r}: {_written(before)!r} is compared without a column")
            if isinstance(op, ast.Is | ast.IsNot) and not (isinstance(right, ast.Constant) and right.value is None):
                raise ArgumentError(f"{self.text!r}: 'is' goes with None alone; compare with ==")

    def _check_list(self, left: ast.expr, right: ast.expr) -> None:
        if not isinstance(right, ast.List | ast.Tuple):
            raise ArgumentError(
                f"{self.text!r}: 'in' needs a list or a quantile, as in shard in ['00000', '00001'] and clip_score "
                "in top 30%"
            )
        if not _has_column(left):
            raise ArgumentError(f"{self.text!r}: {_written(left)!r} before 'in' is no column")
        listed: dict[str, None] = {}
        for value in right.elts:
            self._check(value, listed)
        if listed:
            raise ArgumentError(
                f"{self.text!r}: the list {_written(right)} has the column {next(iter(listed))}; a list holds numbers "
                "or texts, and columns are compared with =="
            )

    def _quantile(self, left: ast.expr, right: ast.Call) -> Quantile:
        match right:
            case ast.Call(
                func=ast.Name(id=name), args=[ast.Constant(value=str(amount)), ast.Constant(value=str(unit))]
            ):
                if name in CALLS and isinstance(left, ast.Name):
                    return Quantile.of(left.id, CALLS[name], amount, unit)
        raise ArgumentError(
            f"{self.text!r}: a quantile is of a column by itself, and 'in' goes with a list or a quantile, as in "
            "clip_score in top 30%"
        )

    def _value(self, node: ast.expr, frame: pd.DataFrame) -> Any:
        match node:
            case ast.Name(id=name):
                return as_operand(frame[name])
            case ast.Constant(value=value):
                return value
            case ast.List(elts=values) | ast.Tuple(elts=values):
                return [self._value(value, frame) for value in values]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._computed(node, lambda value: -widened(value), self._value(operand, frame))
            case ast.UnaryOp(operand=operand):
                return ~self._truth(operand, frame)
            case ast.BoolOp(op=op, values=values):
                return self._joined(op, [self._truth(value, frame) for value in values])
            case ast.BinOp(left=left, op=op, right=right):
                both = self._value(left, frame), self._value(right, frame)
                return self._computed(node, lambda one, two: arithmetic(op, one, two), *both)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._compared(node, left, ops, comparators, frame)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._called(node, name, [self._value(value, frame) for value in args])
        raise AssertionError(f"unchecked node {ast.dump(node)}")

    def _truth(self, node: ast.expr, frame: pd.DataFrame) -> pd.Series:
        """Return a nullable boolean column, so that a null stays a null under `not`."""
        value = self._value(node, frame)
        if not isinstance(value, pd.Series) or not pd.api.types.is_bool_dtype(value.dtype):
            raise ArgumentError(f"{self.text!r}: {_written(node)!r} is not true or false")
        return value.astype(schema.arrow_dtype("bool"))

    def _joined(self, op: ast.boolop, values: list[pd.Series]) -> pd.Series:
        result = values[0]
        for value in values[1:]:
            result = result & value if isinstance(op, ast.And) else result | value
        return result

    def _compared(
        self, whole: ast.expr, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr], frame: pd.DataFrame
    ) -> Any:
        parts = []
        before = self._value(left, frame)
        for op, earlier, node in zip(ops, [left, *comparators], comparators, strict=False):
            if isinstance(node, ast.Call) and isinstance(op, ast.In | ast.NotIn):
                parts.append(self._in_quantile(whole, op, self._quantile(earlier, node), before))
                continue
            after = self._value(node, frame)
            parts.append(self._pair(whole, op, before, after))
            before = after
        return self._joined(ast.And(), parts)

    def _in_quantile(self, whole: ast.expr, op: ast.cmpop, quantile: Quantile, values: pd.Series) -> pd.Series:
        if quantile not in self._thresholds:
            raise ArgumentError(
                f"{self.text!r}: which rows are {quantile} depends on all rows of the dataset, and these are only "
                "some: use nemo_image.filters.keep(dataset, ...) or nemo-image curate --keep"
            )
        threshold: Any = self._thresholds[quantile]
        if threshold is None:
            return pd.Series(None, values.index, schema.arrow_dtype("bool"))
        if isinstance(threshold, int) and threshold > 2**63 - 1:
            threshold = np.uint64(threshold)  # a plain integer would be taken for a signed one
        inside = self._pair(whole, ast.GtE() if quantile.side == "top" else ast.LtE(), values, threshold)
        inside = inside.where(values.between(-math.inf, math.inf).fillna(False))  # a NaN is no value, under `not` too
        return inside if isinstance(op, ast.In) else ~inside

    def _pair(self, whole: ast.expr, op: ast.cmpop, left: Any, right: Any) -> pd.Series:
        result: pd.Series = self._computed(whole, lambda one, two: compare(op, one, two), left, right)
        return result.astype(schema.arrow_dtype("bool"))

    def _called(self, node: ast.expr, name: str, values: list[Any]) -> Any:
        if not isinstance(values[0], pd.Series):
            raise ArgumentError(f"{self.text!r}: {name}() needs a column")
        return self._computed(node, FUNCTIONS[name][1], *values)

    def _computed(self, node: ast.expr, operation: Callable[..., Any], *values: Any) -> Any:
        """Return what an operation makes of values; what it cannot do is an error that names both."""
        try:
            return operation(*values)
        except ERRORS as error:
            verb = "compare" if isinstance(node, ast.Compare) else "compute"
            raise ArgumentError(
                f"{self.text!r}: cannot {verb} {_written(node)!r} of {' and '.join(map(type_name, values))} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error


def _written(node: ast.expr) -> str:
    """Return a part of an expression as a user writes it."""
    return _CALLED.sub(r"\1 \2\3", ast.unparse(node))


def _has_column(node: ast.expr) -> bool:
    calls = {id(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)}
    return any(isinstance(one, ast.Name) and id(one) not in calls for one in ast.walk(node))
