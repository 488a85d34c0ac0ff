"""Reading samples for an export: the right bytes in the right order, whatever the tars, in bounded memory."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest

from nemo_image.errors import TarError
from nemo_image.export import copy
from nemo_image.export.copy import WINDOW, LargeWrites, Piece, SampleSource
from nemo_image.shards.index import index_tar
from tests.makers import tar_members, write_tar


def make_tars(folder: Path, tars: int, samples: int, size: int) -> list[Piece]:
    """Write tars of made-up bytes; return their samples, of one tar after the other."""
    rng = np.random.default_rng(0)
    pieces: list[Piece] = []
    for number in range(tars):
        path = folder / f"{number}.tar"
        made = [
            (f"{number}-{one}", {"bin": rng.bytes(size), "txt": b"%d" % one, "none": b""}) for one in range(samples)
        ]
        write_tar(path, made)
        pieces += [(str(path), found) for found in index_tar(str(path)).samples]
    return pieces


def expected(pieces: list[Piece], folder: Path) -> list[list[bytes]]:
    """Return the members' bytes as the standard library reads them."""
    there = {path.name: tar_members(path) for path in folder.glob("*.tar")}
    return [[there[url.rpartition("/")[2]][member.name] for member in sample.members] for url, sample in pieces]


@pytest.mark.parametrize("seed", [None, 1])
def test_bytes_in_the_order_asked_for(tmp_path: Path, seed: int | None) -> None:
    pieces = make_tars(tmp_path, 3, 40, 30_000)  # several windows
    if seed is not None:
        pieces = [pieces[place] for place in np.random.default_rng(seed).permutation(len(pieces))]
    with SampleSource({}) as tars:
        found = [[bytes(data) for data in one if data is not None] for one in tars.read(pieces)]
    assert found == expected(pieces, tmp_path)


def test_remote_tars_give_the_same(tmp_path: Path) -> None:
    pieces = make_tars(tmp_path, 12, 5, 1000)  # more than are read at once
    order = np.random.default_rng(2).permutation(len(pieces))
    pieces = [pieces[place] for place in order]
    wanted = expected(pieces, tmp_path)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        memory.pipe_file(f"/copy-test/{path.name}", path.read_bytes())
    remote = [(f"memory://copy-test/{url.rpartition('/')[2]}", sample) for url, sample in pieces]
    with SampleSource({}) as tars:
        assert [[bytes(data or b"") for data in one] for one in tars.read(remote)] == wanted


def test_large_members_come_in_pieces(tmp_path: Path) -> None:
    pieces = make_tars(tmp_path, 1, 2, 2 * WINDOW + 5)
    wanted = expected(pieces, tmp_path)
    with SampleSource({}) as tars:
        for (url, sample), contents, whole in zip(pieces, tars.read(pieces), wanted, strict=True):
            assert [data is None for data in contents] == [True, False, False]
            chunks = [bytes(chunk) for chunk in tars.chunks(url, sample.members[0])]
            assert [len(chunk) for chunk in chunks] == [WINDOW, WINDOW, 5]
            assert b"".join(chunks) == whole[0]


def test_memory_is_that_of_windows_whatever_the_number_of_samples(tmp_path: Path) -> None:
    pieces = make_tars(tmp_path, 1, 100, 200_000)
    with SampleSource({}) as tars:
        tracemalloc.start()
        try:
            total = sum(len(data or b"") for one in tars.read(pieces) for data in one)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert total > 20_000_000
    assert peak < 4 * WINDOW


def test_a_tar_that_was_cut_off_since_is_named(tmp_path: Path) -> None:
    pieces = make_tars(tmp_path, 1, 3, 20_000)
    path = tmp_path / "0.tar"
    path.write_bytes(path.read_bytes()[:30_000])
    with SampleSource({}) as tars, pytest.raises(TarError, match=r"0\.tar.*'0-1\.bin'.*cut off"):
        list(tars.read(pieces))
    path.unlink()
    with SampleSource({}) as tars, pytest.raises(TarError, match="no such tar"):
        list(tars.read(pieces))


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleSource, "AT_MOST", 9)
    opened: list[copy.ByteSource] = []
    closed: list[str] = []
    real = copy.open_source

    def counted(url: str, options: object) -> copy.ByteSource:
        source = real(url, None)
        close = source.close
        monkeypatch.setattr(source, "close", lambda: (closed.append(url), close())[1])
        opened.append(source)
        assert len(opened) - len(closed) <= 9
        return source

    monkeypatch.setattr(copy, "open_source", counted)
    pieces = make_tars(tmp_path, 20, 2, 10)
    with SampleSource({}) as tars:
        found = [[bytes(data or b"") for data in one] for one in tars.read(pieces[::2] + pieces[1::2])]
    assert found == expected(pieces[::2] + pieces[1::2], tmp_path)
    assert len(opened) == len(closed) >= 20


@pytest.mark.parametrize("at_once", [None, 1, 7, 1000])
def test_pieces_are_written_however_many_bytes_the_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    pieces: list[bytes | memoryview] = [bytes([number % 256]) * (number % 5) for number in range(3000)]
    pieces[7] = memoryview(b"seven")
    writev = os.writev
    calls: list[int] = []

    def some(descriptor: int, buffers: list[bytes | memoryview]) -> int:
        calls.append(len(buffers))
        return os.write(descriptor, b"".join(buffers)[:at_once]) if at_once else writev(descriptor, buffers)

    monkeypatch.setattr(os, "writev", some)
    with open(tmp_path / "x", "wb") as file:
        file.write(b"before")
        gathered = LargeWrites(file)
        for piece in pieces:
            gathered.write(piece)
        gathered.flush()
        gathered.flush()
    assert (tmp_path / "x").read_bytes() == b"before" + b"".join(pieces)
    assert max(calls) <= 1024


def test_what_is_no_local_file_gets_joined_pieces() -> None:
    file = io.BytesIO()
    gathered = LargeWrites(file)
    for piece in (b"a", memoryview(b"bc"), b""):
        gathered.write(piece)
    gathered.flush()
    assert file.getvalue() == b"abc"
