"""Frames of pandas and of cuDF: the user's may be either, our own code computes on pandas' Arrow columns.

A partition of cuDF crosses to Arrow where an operator or a file needs it, and back. Rows and their few numbers cross at
gigabytes a second; what is large, a shard's pictures and the model's batches, never is in a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import schema
from nemo_image.backend.columns import series_of


def is_cudf(frame: Any) -> bool:
    """Tell whether a frame or a column is of cuDF; nothing is imported."""
    return type(frame).__module__.partition(".")[0] == "cudf"


def to_pandas(frame: Any) -> pd.DataFrame:
    """Return a partition as a frame of pandas with Arrow columns, under its labels; one of pandas as it is."""
    if not is_cudf(frame):
        pandas: pd.DataFrame = frame
        return pandas
    table, index = frame.to_arrow(preserve_index=False), frame.index.to_pandas()
    return pd.DataFrame({name: series_of(table[name], index) for name in table.column_names}, index=index)


def to_cudf(frame: pd.DataFrame) -> Any:
    """Return a frame of pandas as one of cuDF, under its labels."""
    import cudf

    made = cudf.DataFrame.from_arrow(pa.table({name: _arrow(frame[name]) for name in frame.columns}))
    made.index = cudf.from_pandas(frame.index)
    return made


def like(result: pd.DataFrame, frame: Any) -> Any:
    """Return what was made of a partition in the partition's own kind."""
    return to_cudf(result) if is_cudf(frame) else result


class _Converted:
    """Makes partitions of one kind those of another; row by row."""

    row_by_row = True

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert

    def __call__(self, frame: Any) -> Any:
        return self.convert(frame)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("nemo-image-converted", self.convert.__name__)


def in_pandas(frame: Any) -> Any:
    """Return a Dask frame whose partitions are frames of pandas: the same one, if they are.

    Choose columns before: Dask reads all that the frame has.
    """
    if not is_cudf(frame._meta):
        return frame
    return frame.map_partitions(_Converted(to_pandas), meta=to_pandas(frame._meta))


def in_kind_of(made: Any, frame: Any) -> Any:
    """Return a Dask frame of pandas as one of the kind of another."""
    if not is_cudf(frame._meta):
        return made
    return made.map_partitions(_Converted(to_cudf), meta=to_cudf(made._meta))


def _arrow(series: pd.Series) -> pa.Array:
    array = pa.array(series, from_pandas=True)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array.cast(_cudf_type(schema.plain_type(array.type)))


def _cudf_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which cuDF holds a column: it has no float16. (The shard's name, a category, is a string.)"""
    if pa.types.is_list(kind):
        return pa.list_(_cudf_type(kind.value_type))
    return pa.float32() if pa.types.is_float16(kind) else kind
