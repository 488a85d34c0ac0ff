"""What an expression computes with columns: types are made to fit, or refused, before pandas sees them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import backend, schema

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "abs": (1, lambda column: abs(widened(column))),
    "len": (1, lambda column: _texts(column).str.len()),
    "lower": (1, lambda column: _texts(column).str.lower()),
    "contains": (2, lambda column, text: _texts(column).str.contains(_text(text), regex=False)),
    "startswith": (2, lambda column, text: _texts(column).str.startswith(_text(text))),
}
"""How many arguments each function takes, the column first, and what it does."""
ERRORS = (TypeError, ValueError, NotImplementedError, ArithmeticError, AttributeError)
"""What pandas and Arrow raise for values or types that they cannot compute with."""


def as_operand(column: pd.Series) -> pd.Series:
    """Return a column in an Arrow type that can be computed with: no categories, no half precision."""
    is_arrow = isinstance(column.dtype, pd.ArrowDtype)
    kind = _arrow_type(column) if is_arrow else backend.arrow_values(column).type
    plain = schema.plain_type(kind)
    if pa.types.is_float16(plain):
        plain = pa.float32()
    elif isinstance(column.dtype, pd.CategoricalDtype) and not len(column.dtype.categories):
        plain = pa.string()
    if is_arrow and plain == kind:
        return column
    values = backend.arrow_values(column).cast(plain)
    return pd.Series(pd.arrays.ArrowExtensionArray(values), column.index)


def _arrow_type(value: Any) -> pa.DataType:
    if isinstance(value, pd.Series):
        dtype: Any = value.dtype
        return dtype.pyarrow_dtype
    return pa.scalar(value).type


def type_name(value: Any) -> str:
    """Return what an operand is, for errors: a column's type, or the constant."""
    if isinstance(value, list):
        return "a list"
    return str(_arrow_type(value)) if isinstance(value, pd.Series) else repr(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, pd.Series) and pa.types.is_string(_arrow_type(value)))


def widened(value: Any) -> Any:
    """Return integers as int64: small ones would overflow, and unsigned ones have no sign."""
    if isinstance(value, pd.Series) and pa.types.is_integer(_arrow_type(value)):
        return value.astype(schema.arrow_dtype("int64"))
    return value


def _texts(column: pd.Series) -> pd.Series:
    if pa.types.is_null(_arrow_type(column)):
        return column.astype(schema.arrow_dtype("string"))
    if not _is_text(column):
        raise TypeError("the column is no text")
    return column


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("what to look for is a text in quotes")
    return value


def arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    """Return what ``+ - * /`` makes of columns or constants; integers are computed as int64.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ArithmeticError
        If the types do not go together, or a result is beyond int64.
    """
    if left is None or right is None:
        raise TypeError("None is no number")
    texts = _is_text(left) + _is_text(right)
    if texts and not (texts == 2 and isinstance(op, ast.Add)):
        raise TypeError("a text is no number")
    if not isinstance(op, ast.Div):  # which makes floats of integers by itself
        left, right = widened(left), widened(right)
    return ARITHMETIC[type(op)](left, right)


def compare(op: ast.cmpop, left: Any, right: Any) -> Any:
    """Return a column of booleans: a comparison, ``in`` or ``is``; nulls stay nulls but for ``is``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ArithmeticError
        If values of these types are never equal.
    """
    if isinstance(op, ast.Is | ast.IsNot):
        return left.isna() if isinstance(op, ast.Is) else left.notna()
    if isinstance(op, ast.In | ast.NotIn):
        inside = (
            left.isin([_as_moment(one, left) for one in right]).astype(schema.arrow_dtype("bool")).where(left.notna())
        )
        return inside if isinstance(op, ast.In) else ~inside
    if left is None or right is None:
        raise TypeError("write 'is None' to ask for nulls")
    return _COMPARISONS[type(op)](*_comparable(left, right))


def _comparable(left: Any, right: Any) -> tuple[Any, Any]:
    """Return two operands in types that can be compared; pandas holds other values for unequal without a word.

    A text beside a date or a time is read as one (ISO 8601); true and false are 1 and 0 beside a number.
    """
    left, right = _as_moment(left, right), _as_moment(right, left)
    kinds = _arrow_type(left), _arrow_type(right)
    are_bool = [pa.types.is_boolean(kind) for kind in kinds]
    if are_bool[0] != are_bool[1]:
        left, right = (
            one.astype(schema.arrow_dtype("int64")) if is_bool and isinstance(one, pd.Series) else one
            for one, is_bool in zip((left, right), are_bool, strict=True)
        )
        kinds = tuple(pa.int64() if is_bool else kind for kind, is_bool in zip(kinds, are_bool, strict=True))
    if not any(map(pa.types.is_null, kinds)):
        pc.equal(pa.array([], kinds[0]), pa.array([], kinds[1]))  # raises unless Arrow compares such types
        if all(map(pa.types.is_temporal, kinds)) and kinds[0].id != kinds[1].id:
            raise TypeError("a date and a time are not compared")
    return left, right


def _as_moment(value: Any, other: Any) -> Any:
    if isinstance(value, str) and isinstance(other, pd.Series) and pa.types.is_temporal(_arrow_type(other)):
        return pa.scalar(value).cast(_arrow_type(other)).as_py()
    return value
