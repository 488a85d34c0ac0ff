"""Folders of Parquet files as datasets."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_image.datasets.parquet_folder import RowNames, list_parquets, open_parquet_folder, split_names
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import ArgumentError

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)


def write(folder: Path, name: str, **columns: object) -> None:
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_lists_any_depth_but_what_is_ours_or_hidden(tmp_path: Path) -> None:
    for name in ("b", "a/b/c", "_nemo_image/x", "a/.x/y", ".hidden", "a/_SUCCESS"):
        write(tmp_path, name, id=[1])
    (tmp_path / "tar.tar").write_bytes(b"")
    assert list_parquets(str(tmp_path)) == ["a/b/c.parquet", "b.parquet"]
    assert list_parquets(str(tmp_path / "nothing")) == []
    assert list_parquets(str(tmp_path / "_nemo_image")) == ["x.parquet"], "what the user names is looked at"


@pytest.mark.parametrize("ids", [["1", "2"], [1, 2]], ids=str)
def test_who_names_a_row(tmp_path: Path, ids: list[object]) -> None:
    write(tmp_path / "id", "a", id=ids)
    write(tmp_path / "file", "x/a", id=ids, shard=["x/a", "x/a"])
    write(tmp_path / "file", "b", id=[], shard=pa.array([], pa.string()))
    write(tmp_path / "row", "a", id=ids, shard=["a", "b"])
    opened = {name: open_parquet_folder(str(tmp_path / name), "id") for name in ("id", "file", "row")}
    assert {name: one.naming for name, one in opened.items()} == {"id": "id", "file": "file", "row": "row"}
    assert [one.rows for one in opened.values()] == [2, 2, 2]
    assert opened["file"].dataset.shards == ["b", "x/a"]
    frame = opened["row"].dataset.metadata.compute()
    assert frame["shard"].astype(str).tolist() == ["a", "a"]
    names, shards = split_names(pa.array(frame["id"]), pa.array(ids).type)
    assert (names.to_pylist(), shards.to_pylist()) == (ids, ["a", "b"])


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=20))
def test_names_of_strings_come_back_and_sort_by_id_then_shard(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _check(rows, pa.string(), tmp_path_factory)


@given(rows=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), TEXTS), min_size=1, max_size=20))
def test_names_of_integers_come_back_and_sort_by_id_then_shard(
    rows: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _check(rows, pa.int64(), tmp_path_factory)


def _check(rows: list[tuple[str, str]] | list[tuple[int, str]], kind: pa.DataType, folders: object) -> None:
    folder = folders.mktemp("names")  # type: ignore[attr-defined]
    ids, shards = [row[0] for row in rows], [row[1] for row in rows]
    write(folder, "a", id=pa.array(ids, kind), shard=pa.array(shards).dictionary_encode())
    source = DatasetSource(str(folder), str(folder), "id", pa.schema([("id", kind)]))
    made = RowNames(source).names("a", pa.array(ids, kind))
    back = split_names(made, kind)
    assert (back[0].to_pylist(), back[1].to_pylist()) == (ids, shards)
    encoded = [name.encode() for name in made.to_pylist()]
    by_bytes = [row if isinstance(row[0], int) else (row[0].encode(), row[1].encode()) for row in rows]
    assert sorted(range(len(rows)), key=lambda n: encoded[n]) == sorted(
        range(len(rows)), key=lambda n: (by_bytes[n][0], rows[n][1].encode())
    )


def test_folders_that_cannot_be_opened_together(tmp_path: Path) -> None:
    for path in ([], [""], "", ["s3://bucket/a", str(tmp_path)]):
        with pytest.raises(ArgumentError):
            open_parquet_folder(path, "id")
