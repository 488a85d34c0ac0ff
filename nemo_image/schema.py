"""Column names, dtypes and units: what a row of metadata can say.

Importing this module also registers the name ``list<item: float>[pyarrow]`` with pandas. Without that, a plain
``merge`` or shuffle of a frame with an embedding column fails in every process that rebuilds its dtypes from
their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.extensions import ExtensionDtype, register_extension_dtype

SHARD = "shard"
"""The shard that a row belongs to: its tar's path below the dataset's, without ``.tar``. Dictionary of strings."""

IMAGE_ERROR = "image_error"
"""Why a row's image has no results: ``"<category>: <detail>"``; null when the image is good."""

WIDTH = "width"
"""Width of the stored image, in pixels (int32), before its EXIF orientation is applied."""

HEIGHT = "height"
"""Height of the stored image, in pixels (int32), before its EXIF orientation is applied."""

IMAGE_EMBEDDING = "image_embedding"
AESTHETIC_SCORE = "aesthetic_score"
NSFW_SCORE = "nsfw_score"

TEXT_EMBEDDING = "text_embedding"
"""Embedding of a row's best caption; null where it has none."""

CLIP_SCORE = "clip_score"
"""Cosine of a row's picture and its best caption (float32), from -1 to 1; null where it has none."""

CLIP_CAPTION = "clip_caption"
"""Which of a row's captions those two are of (int32), counted from 0."""

IS_DUPLICATE = "is_duplicate"
"""Whether a row is to be removed as another's copy (bool); null where it could not be judged."""

DUPLICATE_OF = "duplicate_of"
"""The id of the row whose copy a row is; null exactly for rows that are kept or not judged."""

DUPLICATE_OF_SHARD = "duplicate_of_shard"
"""That row's shard."""

DUPLICATE_TIER = "duplicate_tier"
"""What found the copy: ``"exact"``, ``"perceptual"`` or ``"semantic"``."""

CLUSTER = "cluster"
"""The k-means cluster of a row's embedding, from 0 (int32)."""

CENTROID_DISTANCE = "cosine_dist_to_cent"
"""1 - cosine of a row's embedding and its cluster's centroid (float32), from 0 to 2."""

MAX_SIMILARITY = "max_similarity"
"""Largest cosine of a row's embedding and that of a row judged before it (float32); 0 where there is none."""

CAPTION = "caption"
KEY = "key"

KEPT = "nemo_image_kept"
"""The boolean column that an expression is computed into; exports leave it out."""

SHARD_TYPE = pa.dictionary(pa.int32(), pa.string())
EMBEDDING_TYPES = {"float32": pa.list_(pa.float32()), "float16": pa.list_(pa.float16())}

COMPUTED_WITH = "computed_with"
"""In a fingerprint: the column whose value says that a row was computed, for a column that may stay null then."""

FOOTER_KEY = b"nemo_image"
"""Key of our record in a Parquet footer."""

MISSING = "missing"
"""Category of ``image_error`` for rows without a sample, or whose sample has no image."""

SHARD_FAILED = "shard_failed"
"""Category of ``image_error`` for rows whose whole shard could not be read; never saved."""


def is_bad_image(reasons: Any) -> Any:
    """Tell which reasons of ``image_error`` are a picture's own: all but those of samples that are not there."""
    return reasons.notna() & ~reasons.fillna("").str.startswith(MISSING + ":").astype(bool)


def arrow_dtype(kind: str | pa.DataType) -> pd.ArrowDtype:
    """Return the pandas dtype of an Arrow type or of a name such as ``"float32"`` or ``"string"``.

    Parameters
    ----------
    kind : str or pyarrow.DataType
        ``"embedding"`` is the list of float32.

    Raises
    ------
    TypeError
        If Arrow knows no type of that name.
    """
    if isinstance(kind, pa.DataType):
        return pd.ArrowDtype(kind)
    if kind in ("str", "object"):
        kind = "string"
    return pd.ArrowDtype(pa.type_for_alias(kind))


def list_dtype(dtype: Any = np.float32) -> pd.ArrowDtype:
    """Return the dtype of an embedding column: a list of float32 (or float16) a row."""
    return pd.ArrowDtype(EMBEDDING_TYPES[np.dtype(dtype).name])


def shard_column(name: str, length: int) -> pd.Categorical:
    """Return `length` rows of the ``shard`` column, all saying `name`."""
    return pd.Categorical.from_codes(np.zeros(length, np.int8), categories=pd.Index([name], dtype=_STRING))


def shard_meta() -> pd.Categorical:
    """Return an empty ``shard`` column whose categories Dask knows to be unknown."""
    from dask.dataframe.utils import UNKNOWN_CATEGORIES

    return pd.Categorical([], categories=pd.Index([UNKNOWN_CATEGORIES], dtype=_STRING))


def empty_frame(dtypes: Iterable[tuple[str, Any]]) -> pd.DataFrame:
    """Return a frame of no rows with the columns and dtypes given (Dask's ``meta``)."""
    return pd.DataFrame({name: pd.Series([], dtype=dtype) for name, dtype in dtypes})


def unify_types(types: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return the narrowest type that holds the values of all `types`, or None where there is none.

    Nulls join anything, integers join floats, dictionaries count as their values, and both string types are one.
    """
    result = pa.null()
    for one in types:
        merged = _unify_pair(result, plain_type(one))
        if merged is None:
            return None
        result = merged
    return result


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a column of `kind` is held: no dictionaries, one string type, one binary type."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def _unify_pair(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    if one.equals(two) or pa.types.is_null(two):
        return one
    if pa.types.is_null(one):
        return two
    if pa.types.is_list(one) and pa.types.is_list(two):
        value = _unify_pair(one.value_type, two.value_type)
        return None if value is None else pa.list_(value)
    if pa.types.is_struct(one) and pa.types.is_struct(two):
        return _unify_structs(one, two)
    if _is_number(one) and _is_number(two):
        return _unify_numbers(one, two)
    return None


def _unify_structs(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    kinds = {field.name: field.type for field in one}
    for field in two:
        merged = _unify_pair(kinds.get(field.name, pa.null()), field.type)
        if merged is None:
            return None
        kinds[field.name] = merged
    return pa.struct(list(kinds.items()))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _unify_numbers(one: pa.DataType, two: pa.DataType) -> pa.DataType:
    if pa.types.is_integer(one) != pa.types.is_integer(two):
        return pa.float64()
    merged = np.promote_types(one.to_pandas_dtype(), two.to_pandas_dtype())
    return pa.from_numpy_dtype(merged)


_STRING = pd.ArrowDtype(pa.string())
_LIST_NAME = re.compile(r"list<(?:item|element): (float|halffloat|double)(?: not null)?>\[pyarrow\]")
_LIST_VALUES = {"float": pa.float32(), "halffloat": pa.float16(), "double": pa.float64()}


@register_extension_dtype
class _ListDtypeName(ExtensionDtype):
    """Teaches pandas to read the names that ``pd.ArrowDtype`` gives lists of floats; never an array's dtype."""

    name = "nemo_image_list_name"
    type = list

    @classmethod
    def construct_from_string(cls, string: str) -> Any:
        match = _LIST_NAME.fullmatch(string) if isinstance(string, str) else None
        if match is None:
            raise TypeError(f"not the name of a list dtype: {string!r}")
        return pd.ArrowDtype(pa.list_(_LIST_VALUES[match[1]]))
