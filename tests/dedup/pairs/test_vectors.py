"""Vectors in memory and on disk."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.dedup.pairs import vectors
from nemo_image.dedup.pairs.vectors import DiskVectors, Floats, MemoryVectors, Vectors
from nemo_image.errors import DatasetError

COUNT, SIZE, BEFORE = 200, 5, 3


def matrix() -> Floats:
    return np.random.default_rng(0).normal(size=(COUNT, SIZE)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of some other rows, and the matrix behind them."""
    path = tmp_path / "rows.f32"
    path.write_bytes(np.full((BEFORE, SIZE), 7, "<f4").tobytes() + matrix().astype("<f4").tobytes())
    return path


@pytest.fixture(params=["memory", "disk"])
def rows(request: pytest.FixtureRequest, path: Path) -> Vectors:
    return MemoryVectors(matrix()) if request.param == "memory" else DiskVectors(path, BEFORE, COUNT, SIZE)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The bytes asked for, and where, of each read from now on."""
    seen: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        seen.append((offset, sum(len(buffer) for buffer in buffers)))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def test_count_and_size(rows: Vectors) -> None:
    assert (rows.count, rows.size) == (COUNT, SIZE)


@pytest.mark.parametrize("bounds", [(0, COUNT), (0, 0), (17, 18), (COUNT - 1, COUNT)])
def test_rows(rows: Vectors, bounds: tuple[int, int]) -> None:
    found = rows.rows(*bounds)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, matrix()[slice(*bounds)])


@pytest.mark.parametrize(
    "indices", [[], [0], [COUNT - 1], [3, 4, 5], [0, 2, 4, 100, 101, 199], list(range(0, COUNT, 7)), list(range(COUNT))]
)
def test_take(rows: Vectors, indices: list[int]) -> None:
    found = rows.take(np.array(indices, np.int64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, matrix()[indices].reshape(-1, SIZE))


@settings(max_examples=200, deadline=None)
@given(
    chosen=st.sets(st.integers(0, COUNT - 1)),
    gap=st.integers(0, 10 * SIZE * 4),
    piece=st.integers(1, 20 * SIZE * 4),
)
def test_take_from_disk_whatever_is_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, chosen: set[int], gap: int, piece: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.f32"
    if not path.exists():
        path.write_bytes(matrix().astype("<f4").tobytes())
    indices = np.array(sorted(chosen), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_GAP", gap)
        patch.setattr(vectors, "_PIECE", piece)
        found = DiskVectors(path, 0, COUNT, SIZE).take(indices)
    np.testing.assert_array_equal(found, matrix()[indices])


def test_neighbours_are_one_read(path: Path, reads: list[tuple[int, int]]) -> None:
    DiskVectors(path, BEFORE, COUNT, SIZE).take(np.arange(10, 110))
    assert reads == [((BEFORE + 10) * SIZE * 4, 100 * SIZE * 4)]


def test_near_rows_are_one_read_and_far_rows_are_not(
    path: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_GAP", 3 * SIZE * 4)
    DiskVectors(path, BEFORE, COUNT, SIZE).take(np.array([1, 5, 7, 12]))
    assert reads == [((BEFORE + 1) * SIZE * 4, 7 * SIZE * 4), ((BEFORE + 12) * SIZE * 4, SIZE * 4)]


def test_what_lies_between_is_read_in_pieces(
    path: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_PIECE", 20 * SIZE * 4)
    DiskVectors(path, BEFORE, COUNT, SIZE).take(np.arange(0, COUNT, 2))
    assert max(size for _, size in reads) <= 20 * SIZE * 4
    assert len(reads) == COUNT // 20


def test_a_read_may_give_less_than_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:13]], offset))
    np.testing.assert_array_equal(DiskVectors(path, BEFORE, COUNT, SIZE).rows(0, COUNT), matrix())


def test_a_file_cut_short_is_named(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
    disk = DiskVectors(path, BEFORE, COUNT, SIZE)
    np.testing.assert_array_equal(disk.rows(0, COUNT - 1), matrix()[:-1])
    with pytest.raises(DatasetError, match=rf"{path} is cut short: it has {BEFORE + COUNT - 1} whole rows .* write it"):
        disk.take(np.array([0, COUNT - 1]))


def test_no_file_stays_open(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    disk = DiskVectors(path, BEFORE, COUNT + 1, SIZE)
    disk.rows(0, 3)
    with pytest.raises(DatasetError):
        disk.rows(0, COUNT + 1)
    assert (set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()) == before


def test_neighbours_in_memory_are_not_copied() -> None:
    whole = matrix()
    whole.flags.writeable = False
    rows = MemoryVectors(whole)
    assert np.shares_memory(rows.take(np.arange(3, 9)), whole)
    assert np.shares_memory(rows.rows(3, 9), whole)


def test_the_file_can_go_to_another_process(path: Path) -> None:
    there = pickle.loads(pickle.dumps(DiskVectors(path, BEFORE, COUNT, SIZE)))
    np.testing.assert_array_equal(there.rows(0, COUNT), matrix())
