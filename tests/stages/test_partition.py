"""Finding files, and grouping them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.stages.partition import FilePartitioningStage
from nemo_image.stages.tasks import EmptyTask, FileGroup


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (
        ("b.tar", 30),
        ("a.tar", 10),
        ("sub/a.tar", 20),
        ("sub/deep/c.TAR", 5),
        ("a.parquet", 1),
        (".x.tar", 1),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "_nemo_image" / "enriched").mkdir(parents=True)
    (tmp_path / "_nemo_image" / "enriched" / "a.tar").write_bytes(b"x")
    return tmp_path


def groups(paths: Any, **options: Any) -> list[FileGroup]:
    return FilePartitioningStage(paths, **options).process(EmptyTask())


def below(folder: Path, made: list[FileGroup]) -> list[list[str]]:
    return [[str(Path(url).relative_to(folder)) for url in one.data] for one in made]


def test_a_folder_is_searched_to_any_depth(folder: Path) -> None:
    made = groups(str(folder))
    assert below(folder, made) == [["a.tar"], ["b.tar"], ["sub/a.tar"], ["sub/deep/c.TAR"]]
    assert [one.index for one in made] == [0, 1, 2, 3]
    assert {one.root for one in made} == {str(folder)}
    assert {one.dataset_name for one in made} == {folder.name}


def test_files_per_partition_limit_and_extensions(folder: Path) -> None:
    assert below(folder, groups(str(folder), files_per_partition=3)) == [
        ["a.tar", "b.tar", "sub/a.tar"],
        ["sub/deep/c.TAR"],
    ]
    assert below(folder, groups(folder, limit=1)) == [["a.tar"]]
    assert below(folder, groups(str(folder), file_extensions=["parquet"])) == [["a.parquet"]]


@pytest.mark.parametrize(
    ("blocksize", "sizes"),
    [
        (40, [[10, 30], [20, 5]]),
        ("40 B", [[10, 30], [20, 5]]),
        (1, [[10], [30], [20], [5]]),
        ("1kB", [[10, 30, 20, 5]]),
    ],
)
def test_blocksize(folder: Path, blocksize: Any, sizes: list[list[int]]) -> None:
    made = groups(str(folder), blocksize=blocksize)
    assert [[Path(url).stat().st_size for url in one.data] for one in made] == sizes


def test_patterns_lists_and_files(folder: Path) -> None:
    assert below(folder, groups(f"{folder}/{{a,b}}.tar")) == [["a.tar"], ["b.tar"]]
    assert below(folder, groups(f"{folder}/*.tar")) == [["a.tar"], ["b.tar"]]
    assert below(folder, groups([f"{folder}/sub/a.tar", f"{folder}/b.tar", f"{folder}/b.tar"])) == [
        ["b.tar"],
        ["sub/a.tar"],
    ]
    (one,) = groups(f"{folder}/sub/a.tar")
    assert (one.root, one.data) == (f"{folder}/sub", [f"{folder}/sub/a.tar"])


def test_names_are_their_own_and_stay(folder: Path) -> None:
    before = {one.data[0]: one.name for one in groups(str(folder))}
    assert len(set(before.values())) == 4
    (folder / "aa.tar").write_bytes(b"x")
    after = {one.data[0]: one.name for one in groups(str(folder))}
    assert {url: after[url] for url in before} == before
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in after.values())


def test_names_do_not_depend_on_where_the_folder_is(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "data"
    folder.rename(other)
    moved = [one.name for one in groups(str(other))]
    other.rename(folder)
    assert moved == [one.name for one in groups(str(folder))]


def test_other_file_systems() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("/part/x.tar", "/part/sub/y.tar"):
        fs.pipe_file(name, b"x")
    try:
        made = groups("memory://part")
        assert [one.data for one in made] == [["memory://part/sub/y.tar"], ["memory://part/x.tar"]]
        assert made[0].root == "memory://part"
    finally:
        fs.rm("/part", recursive=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_paths": ""}, "file_paths"),
        ({"file_paths": 3}, "file_paths"),
        ({"files_per_partition": 0}, "files_per_partition must be"),
        ({"limit": 0}, "limit must be"),
        ({"blocksize": "many"}, "blocksize must be"),
        ({"blocksize": 0}, "at least 1 byte"),
        ({"blocksize": 3, "files_per_partition": 3}, "not both"),
        ({"file_extensions": ".tar"}, "must be a list"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        FilePartitioningStage(**{"file_paths": "x", **options})


def test_nothing_there(folder: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        groups(str(folder / "none"))
    with pytest.raises(DatasetError, match="no such file"):
        groups(str(folder / "none.tar"))
    with pytest.raises(DatasetError, match=r"no file that ends in \.zip"):
        groups(str(folder), file_extensions=[".zip"])
    with pytest.raises(DatasetError, match="give file_extensions"):
        groups(str(folder / "a.parquet"))
