from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.asyn import AsyncFileSystem

from nemo_image.errors import TarError
from nemo_image.shards import retries
from nemo_image.shards.read import ShardReader
from nemo_image.shards.sources import FileSource, LocalSource, RemoteSource, SourceFile, open_file, open_source
from tests.makers import sample, write_tar

CONTENT = bytes(range(256)) * 8
Answer = Callable[[bytes], bytes | Exception]


class Shaky(AsyncFileSystem):
    """A storage that answers as it is told to."""

    protocol = "shaky"
    cachable = False
    content = CONTENT
    asked: list[tuple[int, int]] = []  # noqa: RUF012 -- as a store, one for all instances
    answers: list[Answer] = []  # noqa: RUF012
    infos: list[dict[str, Any] | Exception] = []  # noqa: RUF012

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        info = self.infos.pop(0) if self.infos else {"name": path, "size": len(self.content), "type": "file"}
        if isinstance(info, Exception):
            raise info
        return info

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        assert start is not None
        assert end is not None
        self.asked.append((start, end))
        answer = self.answers.pop(0)(self.content[start:end]) if self.answers else self.content[start:end]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _shaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    monkeypatch.setenv("NEMO_IMAGE_RETRY_WAIT_S", "0")
    yield
    Shaky.content = CONTENT
    for store in (Shaky.asked, Shaky.answers, Shaky.infos):
        store.clear()


def _good(data: bytes) -> bytes:
    return data


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _lost(data: bytes) -> Exception:
    return ConnectionResetError("reset by peer")


def test_ranges() -> None:
    with open_source("shaky://x") as source:
        assert (source.name, source.size) == ("shaky://x", 2048)
        assert source.read_at(3, 4) == CONTENT[3:7]
        assert source.read_at(2047, 10) == CONTENT[2047:]
        assert source.read_at(5000, 10) == b""
        ranges = [(9, 12), (0, 2), (4, 4), (9, 12), (2040, 9999)]
        assert source.read_ranges(ranges) == [CONTENT[start:stop] for start, stop in ranges]
    assert sorted(Shaky.asked[-3:]) == [(0, 2), (9, 12), (2040, 2048)]  # nothing twice, nothing empty


@pytest.mark.parametrize("fault", [_lost, _cut, lambda data: OSError(16, "Please reduce your request rate.")])
def test_only_what_failed_is_asked_for_again(fault: Answer) -> None:
    source = open_source("shaky://x")
    Shaky.answers[:] = [_good, fault, _good, fault]
    ranges = [(0, 10), (20, 30), (40, 50)]
    assert source.read_ranges(ranges) == [CONTENT[start:stop] for start, stop in ranges]
    assert Shaky.asked == [(0, 10), (20, 30), (40, 50), (20, 30), (20, 30)]


def test_what_fails_for_good() -> None:
    source = open_source("shaky://x")
    Shaky.answers[:] = [_cut] * 5
    with pytest.raises(OSError, match=r"shaky://x: .*: 9 of the 10 bytes from 20 on came: the transfer was cut off"):
        source.read_at(20, 10)
    assert len(Shaky.asked) == 5
    Shaky.answers[:] = [lambda data: PermissionError("Access Denied")]
    with pytest.raises(PermissionError):
        source.read_at(20, 10)
    Shaky.answers[:] = [lambda data: KeyError("a client's defect")]
    with pytest.raises(OSError, match='KeyError: "a client\'s defect"'):
        source.read_at(20, 10)
    Shaky.answers[:] = [lambda data: CONTENT]
    with pytest.raises(OSError, match="the server ignores byte ranges"):
        source.read_at(20, 10)
    assert len(Shaky.asked) == 8


def test_what_info_says() -> None:
    Shaky.infos[:] = [TimeoutError(), OSError(121, "internal error")]
    assert open_source("shaky://x").size == 2048
    Shaky.infos[:] = [FileNotFoundError("x")]
    with pytest.raises(FileNotFoundError):
        open_source("shaky://x")
    Shaky.infos[:] = [{"name": "x", "size": None, "type": "file"}]
    with pytest.raises(OSError, match="does not tell the file's size"):
        open_source("shaky://x")
    Shaky.infos[:] = [{"name": "x", "size": 0, "type": "directory"}]
    with pytest.raises(IsADirectoryError):
        open_source("shaky://x")
    assert not Shaky.infos


def test_a_shard_on_a_shaky_storage(tmp_path: Path) -> None:
    samples = [sample(seed, f"{seed:03d}", "caption") for seed in range(5)]
    write_tar(tmp_path / "x.tar", samples)
    Shaky.content = (tmp_path / "x.tar").read_bytes()
    Shaky.answers[:] = [_lost, _cut, _good] * 20
    with ShardReader("shaky://x.tar") as reader:
        for (key, members), found in zip(samples, reader.index.samples, strict=True):
            assert found.key == key
            assert [reader.read(member) for member in found.members] == list(members.values())
    assert len(Shaky.answers) < 60
    Shaky.answers[:] = [_lost] * 5
    with ShardReader("shaky://x.tar") as reader, pytest.raises(TarError, match=r"shaky://x.tar: cannot be read .*5 tr"):
        reader.index  # noqa: B018


def test_a_local_file_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    with open_source(tmp_path / "x") as source:
        assert isinstance(source, LocalSource)
        assert source.read_at(2040, 100) == CONTENT[2040:]
        assert source.read_ranges([(5, 6), (0, 1)]) == [CONTENT[5:6], CONTENT[:1]]
    with open_source(io.BytesIO(CONTENT)) as source:
        assert isinstance(source, FileSource)
        assert source.read_at(2040, 100) == CONTENT[2040:]


def test_the_kernel_is_asked_for_what_will_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)), raising=False)
    (tmp_path / "x").write_bytes(bytes(10))
    with open_source(tmp_path / "x") as source:
        source.fetch_ahead([(0, 3), (5, 5), (7, 7 + 300_000)])
        assert asked == [(0, 3), (7, 131_072), (131_079, 131_072), (262_151, 37_856)]  # one advice is good for 128 KiB

        def refuse(*_: object) -> None:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "posix_fadvise", refuse)
        source.fetch_ahead([(0, 3)])
        monkeypatch.delattr(os, "posix_fadvise")
        source.fetch_ahead([(0, 3)])
    assert len(asked) == 4


def test_a_local_file_costs_no_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(CONTENT)

    def call(*args: Any) -> None:
        raise AssertionError("retries.call for a local file")

    monkeypatch.setattr(retries, "call", call)
    with open_source(tmp_path / "x") as source:
        source.read_at(0, 10)
    with open_file(str(tmp_path / "x")) as file:
        assert file.read() == CONTENT


# As a file object -----------------------------------------------------------------------------------------------------


def test_a_source_as_a_file() -> None:
    with open_file("shaky://x") as file:
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.read(3) == CONTENT[:3]
        assert file.tell() == 3
        assert file.seek(-5, io.SEEK_END) == 2043
        assert file.read(99) == CONTENT[2043:]
        assert file.read(1) == b""
        assert file.seek(-2045, io.SEEK_CUR) == 3
        buffer = bytearray(4)
        assert file.readinto(buffer) == 4  # type: ignore[attr-defined]
        assert bytes(buffer) == CONTENT[3:7]
        file.seek(0)
        assert file.read() == CONTENT
        assert file.seek(9999) == 9999
        assert file.read() == b""
    assert file.closed
    assert Shaky.asked[0] == (0, 3)  # nothing is read ahead


def test_closing_closes_the_source(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    source = LocalSource(str(tmp_path / "x"), "x")
    SourceFile(source).close()
    with pytest.raises(ValueError, match="closed"):
        source.read_at(0, 1)


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    wide = pa.array([bytes([row]) * 10_000 for row in range(100)], pa.binary())
    table = pa.table({"key": [str(row) for row in range(100)], "wide": wide})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    Shaky.content = (tmp_path / "x.parquet").read_bytes()
    with open_file("shaky://x.parquet") as raw, pq.ParquetFile(raw) as file:
        assert file.read(columns=["key"]).column("key").to_pylist() == table["key"].to_pylist()
    read = sum(stop - start for start, stop in Shaky.asked)
    assert len(Shaky.content) > 1_000_000
    assert read < 100_000
    with open_file("shaky://x.parquet") as raw, pq.ParquetFile(raw) as file:
        assert file.read().equals(table)


def test_threads_share_a_source() -> None:
    source = open_source("shaky://x")
    assert isinstance(source, RemoteSource)
    wrong: list[int] = []

    def read(first: int) -> None:
        offsets = range(first, 2000, 7)
        wrong.extend(offset for offset in offsets if source.read_at(offset, 5) != CONTENT[offset : offset + 5])

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
