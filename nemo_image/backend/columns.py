"""Columns of frames as Arrow arrays, and embeddings as matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from nemo_image import schema
from nemo_image.errors import EmbeddingError

FloatMatrix = npt.NDArray[np.floating[Any]]
Positions = npt.NDArray[np.int64]


def to_matrix(series: pd.Series, size: int | None = None) -> tuple[FloatMatrix, Positions]:
    """Return the embeddings of a column as one matrix, without its null rows.

    Parameters
    ----------
    series : Series
        A column of lists of floats.
    size : int, optional
        The length that each embedding must have, in numbers.

    Returns
    -------
    matrix : ndarray of float, shape (n_valid, size)
        The embeddings of the rows that have one, in the column's own precision, without a copy where there is one
        chunk.
    rows : ndarray of int64, shape (n_valid,)
        Their positions in `series`.

    Raises
    ------
    EmbeddingError
        If the column holds no lists of floats, or they differ in length, or are not of the `size` wanted.
    """
    array = arrow_values(series)
    if not _is_float_list(array.type):
        raise EmbeddingError(
            f"column {series.name!r} holds {array.type}, not lists of floats: it is no embedding column"
        )
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False)).astype(np.int64)
    if len(rows) < len(array):
        array = array.drop_null()
    matrix_size = _common_length(array, series.name, size)
    # `flatten` honours the array's offset, and skips what lies under null rows.
    values = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(rows), matrix_size), rows


def to_column(
    matrix: npt.NDArray[Any],
    index: pd.Index,
    rows: Positions | None = None,
    dtype: Any = np.float32,
) -> pd.Series:
    """Return an embedding column: a list of `dtype` a row, null where a row has none.

    Parameters
    ----------
    matrix : ndarray, shape (n, size)
        One embedding a row.
    index : Index
        The column's index, of any length ``m >= n``.
    rows : ndarray of int64, shape (n,), optional
        The position in `index` of each row of `matrix`, ascending; all positions by default.
    dtype : dtype, default float32
        ``float32`` or ``float16``.
    """
    matrix = np.ascontiguousarray(matrix, dtype=dtype)
    lengths = np.zeros(len(index) + 1, np.int64)
    positions = np.arange(len(index)) if rows is None else np.asarray(rows)
    if len(positions) != len(matrix):
        raise ValueError(f"{len(matrix)} embeddings for {len(positions)} positions")
    valid = np.zeros(len(index), bool)
    valid[positions] = True
    lengths[1:][valid] = matrix.shape[1] if matrix.ndim == 2 else 0
    offsets = np.cumsum(lengths)
    if offsets[-1] > np.iinfo(np.int32).max:
        raise EmbeddingError(
            f"{len(positions)} embeddings of {matrix.shape[1]} numbers do not fit one partition's column (2^31 "
            "numbers): "
            "use smaller shards or call repartition()"
        )
    array = pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(matrix.reshape(-1)), mask=pa.array(~valid)
    )
    return pd.Series(pd.arrays.ArrowExtensionArray(array), index=index)


def is_embedding_dtype(dtype: Any) -> bool:
    """Tell whether a column of `dtype`, of pandas or of cuDF, can hold embeddings."""
    if isinstance(dtype, pd.ArrowDtype):
        return _is_float_list(dtype.pyarrow_dtype)
    # cuDF's dtypes of lists; its others are numpy's, or have no such method.
    return hasattr(dtype, "to_arrow") and _is_float_list(dtype.to_arrow())


def series_of(values: pa.Array | pa.ChunkedArray, index: pd.Index) -> pd.Series:
    """Return an Arrow array as a column that keeps its type (dictionaries become their values)."""
    kind = schema.plain_type(values.type)
    return pd.Series(pd.arrays.ArrowExtensionArray(values.cast(kind)), index=index)


def frame_to_table(frame: pd.DataFrame, arrow_schema: pa.Schema) -> pa.Table:
    """Return a frame's columns as an Arrow table of exactly `arrow_schema`, without pandas' own metadata.

    Raises
    ------
    pyarrow.ArrowInvalid
        If a column's values do not fit its type.
    """
    arrays = [_to_type(arrow_values(frame[field.name]), field.type) for field in arrow_schema]
    return pa.Table.from_arrays(arrays, schema=arrow_schema)


def arrow_type_of(series: Any) -> pa.DataType:
    """Return the Arrow type in which a column is saved."""
    if isinstance(series.dtype, pd.ArrowDtype):
        return schema.plain_type(series.dtype.pyarrow_dtype)
    if not isinstance(series, pd.Series):  # cuDF's
        return schema.plain_type(series.to_arrow().type)
    if isinstance(series.dtype, pd.CategoricalDtype):
        categories = series.dtype.categories
        return schema.plain_type(pa.array(categories, from_pandas=True).type) if len(categories) else pa.string()
    if len(series) == 0 and series.dtype == object:
        return pa.string()
    return schema.plain_type(pa.array(series, from_pandas=True).type)


def arrow_values(series: pd.Series) -> pa.Array:
    """Return a column's values as one Arrow array; without a copy where the column is one chunk already."""
    array = pa.array(series, from_pandas=True)
    if isinstance(array, pa.ChunkedArray):
        # `combine_chunks` copies even a single chunk.
        return array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
    return array


def _to_type(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return (
            array.cast(kind) if pa.types.is_dictionary(array.type) else array.cast(kind.value_type).dictionary_encode()
        )
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(kind)


def _is_float_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def _common_length(array: pa.Array, name: Any, wanted: int | None) -> int:
    if len(array) == 0:
        return wanted or 0
    lengths = pa.compute.list_value_length(array)
    least, most = (pa.compute.min_max(lengths)[edge].as_py() for edge in ("min", "max"))
    if least != most:
        raise EmbeddingError(f"column {name!r} holds embeddings of different lengths, from {least} to {most} numbers")
    if wanted is not None and most != wanted:
        raise EmbeddingError(f"column {name!r} holds embeddings of {most} numbers, {wanted} are needed")
    return int(most)
