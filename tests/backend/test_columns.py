"""Columns of embeddings to matrices and back, and tables of one schema."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_image import backend, schema
from nemo_image.errors import EmbeddingError


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.floats(-9, 9, width=32)),
    st.data(),
)
def test_round_trip_with_nulls_anywhere(matrix: np.ndarray, data: st.DataObject) -> None:
    length = data.draw(st.integers(len(matrix), len(matrix) + 4))
    rows = np.array(sorted(data.draw(st.permutations(range(length)))[: len(matrix)]))
    column = backend.to_column(matrix, pd.RangeIndex(length), rows)
    assert column.isna().sum() == length - len(matrix)
    found, places = backend.to_matrix(column)
    assert (places == rows).all()
    assert (found == matrix).all()
    start = data.draw(st.integers(0, length - 1))
    part, places = backend.to_matrix(column.iloc[start:])
    assert (places + start == rows[rows >= start]).all()
    assert part.tolist() == matrix[rows >= start].tolist()


def test_no_copy_of_one_chunk() -> None:
    column = backend.to_column(np.ones((1000, 64)), pd.RangeIndex(1000))
    before = pa.array(column)
    matrix, _ = backend.to_matrix(column)
    values = (before.chunk(0) if isinstance(before, pa.ChunkedArray) else before).values
    assert matrix.ctypes.data == values.buffers()[1].address


def test_many_chunks() -> None:
    one = backend.to_column(np.arange(6).reshape(2, 3), pd.RangeIndex(2))
    two = backend.to_column(np.arange(6, 12).reshape(2, 3), pd.RangeIndex(2, 4))
    matrix, rows = backend.to_matrix(pd.concat([one, two]))
    assert matrix.tolist() == np.arange(12).reshape(4, 3).tolist()
    assert rows.tolist() == [0, 1, 2, 3]


def test_unequal_and_unexpected_lengths() -> None:
    ragged = pd.Series(pd.arrays.ArrowExtensionArray(pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32()))), name="emb")
    with pytest.raises(EmbeddingError, match=r"'emb'.*different lengths, from 1 to 2"):
        backend.to_matrix(ragged)
    with pytest.raises(EmbeddingError, match="of 1 numbers, 5 are needed"):
        backend.to_matrix(ragged.iloc[:1], size=5)


def test_a_column_that_holds_no_embeddings() -> None:
    with pytest.raises(EmbeddingError, match="'name'"):
        backend.to_matrix(pd.Series(["a"], dtype=pd.ArrowDtype(pa.string()), name="name"))


def test_float16() -> None:
    column = backend.to_column(np.ones((2, 3)), pd.RangeIndex(2), dtype=np.float16)
    assert column.dtype == schema.list_dtype(np.float16)
    assert backend.to_matrix(column)[0].dtype == np.float16


def test_tables_have_the_schema_asked_for() -> None:
    frame = pd.DataFrame(
        {
            "shard": pd.Categorical(["a", "a", "b"]),
            "count": pd.array([1, 2, 3], dtype="int64"),
            "text": pd.Series(["x", None, "z"], dtype="string"),
            "made": pd.array([1.0, None, 3.0], dtype=pd.ArrowDtype(pa.float32())),
        }
    )
    wanted = pa.schema(
        [("shard", schema.SHARD_TYPE), ("count", pa.int32()), ("text", pa.string()), ("made", pa.float64())]
    )
    table = backend.frame_to_table(frame, wanted)
    assert table.schema.equals(wanted)
    assert table.schema.metadata is None
    assert table.to_pydict() == {
        "shard": ["a", "a", "b"],
        "count": [1, 2, 3],
        "text": ["x", None, "z"],
        "made": [1.0, None, 3.0],
    }


@pytest.mark.parametrize(
    ("kinds", "unified"),
    [
        ([pa.null(), pa.int32()], pa.int32()),
        ([pa.int32(), pa.int64()], pa.int64()),
        ([pa.int32(), pa.float32()], pa.float64()),
        ([pa.string(), pa.large_string()], pa.string()),
        ([pa.dictionary(pa.int8(), pa.string()), pa.string()], pa.string()),
        ([pa.list_(pa.float32()), pa.large_list(pa.float64())], pa.list_(pa.float64())),
        (
            [pa.struct([("a", pa.int32())]), pa.struct([("b", pa.null())])],
            pa.struct([("a", pa.int32()), ("b", pa.null())]),
        ),
        ([pa.string(), pa.int32()], None),
    ],
)
def test_types_that_hold_all(kinds: list[pa.DataType], unified: pa.DataType | None) -> None:
    assert schema.unify_types(kinds) == unified
    assert schema.unify_types(kinds[::-1]) == unified or isinstance(unified, pa.StructType)


def test_pandas_reads_the_dtype_by_name() -> None:
    dtype = schema.list_dtype(np.float32)
    assert pd.api.types.pandas_dtype(str(dtype)) == dtype
    with pytest.raises(TypeError):
        pd.api.types.pandas_dtype("list<item: nonsense>[pyarrow]")


@pytest.mark.parametrize("method", ["tasks", "p2p"])
def test_users_own_merges_and_shuffles_work(cluster: object, method: str) -> None:
    import dask
    import dask.dataframe as dd

    keys = pd.array([f"k{number}" for number in range(8)], dtype=pd.ArrowDtype(pa.string()))
    left = pd.DataFrame({"key": keys, "embedding": backend.to_column(np.arange(16).reshape(8, 2), pd.RangeIndex(8))})
    right = pd.DataFrame({"key": keys[::-1], "number": range(8)})
    with cluster.as_current(), dask.config.set({"dataframe.shuffle.method": method}):  # type: ignore[attr-defined]
        if method == "p2p":
            # P2P cannot carry lists: they go as binary, which the dedup layer does itself.
            left = left.drop(columns="embedding")
        merged = dd.from_pandas(left, npartitions=3).merge(dd.from_pandas(right, npartitions=2), on="key").compute()
    assert dict(zip(merged["key"], merged["number"], strict=True)) == {f"k{7 - number}": number for number in range(8)}
    if method == "tasks":
        matrix, rows = backend.to_matrix(merged["embedding"])
        expected = [[2 * int(key[1:]), 2 * int(key[1:]) + 1] for key in merged["key"]]
        assert matrix[np.argsort(rows)].tolist() == expected
