"""Which shards a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_image.datasets.discover import discover
from nemo_image.errors import ArgumentError, DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000", "00001", "00010", "wide-000000012"):
        for suffix in (".tar", ".parquet"):
            (tmp_path / f"{name}{suffix}").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".nemo-image-tmp-x.tar").touch()
    (tmp_path / "sub").mkdir()
    for suffix in (".tar", ".parquet"):
        (tmp_path / "sub" / f"a{suffix}").touch()
    return tmp_path


def test_a_folder(folder: Path) -> None:
    found = discover(folder)
    assert found.root == str(folder)
    assert found.shards == ["00000", "00001", "00010", "wide-000000012"]
    assert found.without_parquet == found.without_tar == []


def test_a_brace_pattern(folder: Path) -> None:
    assert discover(f"{folder}/{{00000..00001}}.tar").shards == ["00000", "00001"]
    with pytest.raises(DatasetError, match=r"00002\.tar"):
        discover(f"{folder}/{{00000..00002}}.tar")


def test_a_glob(folder: Path) -> None:
    assert discover(f"{folder}/000*.tar").shards == ["00000", "00001", "00010"]
    with pytest.raises(DatasetError, match="matches"):
        discover(f"{folder}/x*.tar")


def test_a_list_in_several_folders(folder: Path) -> None:
    found = discover([f"{folder}/00010.tar", f"{folder}/sub/a.tar"])
    assert found.root == str(folder)
    assert found.shards == ["00010", "sub/a"]
    assert found.without_parquet == []


def test_one_tar(folder: Path) -> None:
    assert discover(folder / "00001.tar").shards == ["00001"]


def test_file_urls(folder: Path) -> None:
    assert discover(f"file://{folder}/{{00000,00010}}.tar").shards == ["00000", "00010"]


def test_partners_that_are_missing(folder: Path) -> None:
    (folder / "00001.parquet").unlink()
    (folder / "00010.tar").unlink()
    found = discover(folder)
    assert found.without_parquet == ["00001"]
    assert found.without_tar == ["00010"]


@pytest.mark.parametrize("path", ["", [], ["a.tar", "a.tar"], ["a.zip"]])
def test_unusable_paths(path: object) -> None:
    with pytest.raises(ArgumentError):
        discover(path)  # type: ignore[arg-type]
