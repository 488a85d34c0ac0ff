"""Arrow columns from values whose types nobody has promised, and from columns whose types differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets.opening import join_types

DEEPEST = 32
"""Levels of lists and fields in a column; what is nested deeper is text. Arrow ends the process at a few thousand."""


def arrow_column(values: Sequence[Any], kinds: Sequence[pa.DataType] = ()) -> pa.Array:
    """Return values as a column that loses none of them.

    Of the common type of `kinds` if all values fit it exactly; else of the type that they have themselves; else, where
    they have none in common, or one that Parquet does not have, as text: lists, numbers and the like as JSON.

    Parameters
    ----------
    values : sequence
        Plain values, None for null. Half a surrogate pair in a string, which no file has a place for, is replaced.
    kinds : sequence of pyarrow.DataType
        The types that the values had where they come from.
    """
    plain = [None if value is pd.NA or value is pd.NaT else value for value in values]
    if any(_is_deeper(value, DEEPEST) for value in plain):
        return _as_texts(plain)
    for kind in (common_type(kinds), None):
        column = _exact(plain, kind)
        if column is not None:
            return column
    return _as_texts(plain)


def concatenated(columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray | pa.Array:
    """Return columns as one, by the rules of :func:`arrow_column` where their types differ."""
    columns = [one.cast(schema.plain_type(one.type)) for one in columns]
    kinds = {one.type for one in columns if not pa.types.is_null(one.type)}
    if len(kinds) > 1:
        return arrow_column([value for one in columns for value in one.to_pylist()], list(kinds))
    kind = kinds.pop() if kinds else pa.null()
    return pa.chunked_array([chunk for one in columns for chunk in one.cast(kind).chunks], kind)


def common_type(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return the narrowest type that holds the values of all `kinds`, or None where there is none."""
    result: pa.DataType | None = pa.null()
    # In a fixed order, so that the result does not depend on the rows'.
    for one in sorted({schema.plain_type(kind) for kind in kinds}, key=str):
        result = None if result is None else join_types(result, one)
    return result


def encodable(value: Any) -> Any:
    """Replace halves of surrogate pairs in strings, as bad bytes are."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [encodable(one) for one in value]
    if isinstance(value, dict):
        return {encodable(name): encodable(one) for name, one in value.items()}
    return value


_UNFIT = (pa.ArrowException, OverflowError, ValueError, TypeError)


def _exact(values: list[Any], kind: pa.DataType | None) -> pa.Array | None:
    """Return values as a column of a type, or of the one that they have themselves.

    None if Parquet does not have it, or if any value would not be what it was: Arrow makes 3 of 3.5 among integers.
    """
    try:
        column = pa.array(values, kind)
        if not _fits_parquet(column.type):
            return None
        held = column.to_pylist()
    except UnicodeEncodeError:
        return _exact([encodable(value) for value in values], kind)
    except _UNFIT:
        return None
    return column if _are_same(values, held) else None


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    return depth == 0 or any(
        _is_deeper(one, depth - 1) for one in (value.values() if isinstance(value, dict) else value)
    )


def _are_same(values: list[Any], held: list[Any]) -> bool:
    try:
        if held == values:
            return True  # nearly always, and at the speed of C
    except ValueError:  # an array among them
        pass
    return all(map(_is_same, values, held))


def _is_same(value: Any, held: Any) -> bool:
    """Tell whether a value came back as it was; a field that a struct lacks comes back as a null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict) and isinstance(held, dict):
        return all(_is_same(value.get(name), held.get(name)) for name in {*value, *held})
    if isinstance(value, list | tuple) and isinstance(held, list | tuple):
        return len(value) == len(held) and all(map(_is_same, value, held))
    return bool(value == held or (value != value and held != held))  # noqa: PLR0124 -- NaN


def _as_texts(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if value is None else encodable(_as_text(value)) for value in values], pa.string())


def _as_text(value: Any) -> str:
    plain = _plain(value)
    if isinstance(plain, str):
        return plain
    try:
        return json.dumps(plain, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):  # keys that are no names, circles
        return str(value)


def _plain(value: Any) -> Any:
    """Return what JSON knows in place of what it does not know."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if isinstance(value, bool | int | float | list | tuple | dict | None) else str(value)


def _fits_parquet(kind: pa.DataType) -> bool:
    """Tell whether Parquet has the type: it knows no struct without fields, which ``{}`` becomes."""
    if not pa.types.is_nested(kind):
        return True
    return kind.num_fields > 0 and all(_fits_parquet(kind.field(number).type) for number in range(kind.num_fields))
