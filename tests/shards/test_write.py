from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_image.errors import ArgumentError
from nemo_image.shards.idx_file import read_idx, write_idx
from nemo_image.shards.index import Member, TarIndex, index_tar
from nemo_image.shards.write import TarWriter

Files = list[tuple[str, bytes]]


def written(files: Files) -> tuple[bytes, TarIndex]:
    out = io.BytesIO()
    with TarWriter(out) as writer:
        members = [writer.add(name, data) for name, data in files]
    content = out.getvalue()
    for member, (name, data) in zip(members, files, strict=True):
        assert member.name == name
        assert content[member.offset : member.offset + member.size] == data
    return content, writer.index()


def by_tarfile(content: bytes) -> Files:
    with tarfile.open(fileobj=io.BytesIO(content), encoding="utf-8") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


parts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=70)
broken = st.binary(min_size=1, max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
names = st.lists(parts, min_size=1, max_size=5).map("/".join) | broken.filter(
    lambda name: "\0" not in name and not name.endswith("/")
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(names, st.binary(max_size=1100)), max_size=6))
@example([("n" * length, b"1") for length in (99, 100, 101, 155, 156, 255, 256, 257, 5000)])
@example([("d" * length + "/" + "n" * 100, b"1") for length in (1, 99, 154, 155, 156)])
@example([("d" * 155 + "/" + "n" * length, b"1") for length in (1, 99, 100, 101)])
@example([("/" + "n" * length, b"1") for length in (1, 99, 100, 101)])
@example([("ü" * length, b"1") for length in (1, 49, 50, 51)])
def test_tarfile_reads_what_is_written(files: Files) -> None:
    content, index = written(files)
    assert by_tarfile(content) == files
    assert len(content) % 10240 == 0
    assert index_tar(io.BytesIO(content)) == index


@pytest.mark.parametrize(
    "files",
    [
        [("a.jpg", b"x" * 1000), ("a.txt", b""), ("d/b.json", b"{}" * 256)],
        [("d" * 155 + "/" + "n" * 100, b"1")],
        [("d" * 80 + "/" + "e" * 70 + "/" + "n" * 90 + ".jpg", b"1")],
        [],
    ],
)
def test_plain_names_make_the_bytes_that_tarfile_makes(files: Files) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert written(files)[0] == out.getvalue()


@pytest.mark.parametrize("name", ["n" * 101, "ü.jpg", "\udcff.jpg", "d/" + "ü" * 60, "d" * 156 + "/n.jpg", "n" * 9990])
def test_other_names_make_the_pax_header_that_tarfile_makes(name: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        tar.addfile(tarfile.TarInfo(name))
    content = written([(name, b"")])[0]
    assert len(content) == len(out.getvalue())
    size = int(content[124:136].rstrip(b"\0"), 8)
    assert content[124:136] == out.getvalue()[124:136]
    assert content[512 : 512 + size] == out.getvalue()[512 : 512 + size]


TRICKY = [
    ("a.jpg", b"x" * 1000),
    ("ü/é ñ.jpg", b"1"),
    ("d" * 150 + "/" + "n" * 96 + ".txt", b"22"),
    ("n" * 200 + ".txt", b"333"),
    ("long/" + "ü" * 90 + "/" + "n" * 90 + ".txt", b"4444"),
    ("z.txt", b""),
]


def test_gnu_tar_reads_what_is_written(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs tar")
    (tmp_path / "x.tar").write_bytes(written(TRICKY)[0])
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["tar", "-xf", str(tmp_path / "x.tar"), "-C", str(tmp_path / "out")], check=True, capture_output=True
    )
    assert done.stderr == b""
    for name, data in TRICKY:
        assert (tmp_path / "out" / name).read_bytes() == data
    assert (tmp_path / "out" / "a.jpg").stat().st_mode & 0o777 == 0o644 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_webdataset_reads_what_is_written() -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    files = [("a.jpg", b"1"), ("a.txt", b"22"), ("ü/" + "b" * 200 + ".seg.PNG", b"333"), ("c.jpg", b"")]
    source = {"url": "x.tar", "stream": io.BytesIO(written(files)[0])}
    samples = list(tariterators.group_by_keys(tariterators.tar_file_expander([source])))
    assert [{key: value for key, value in sample.items() if key != "__url__"} for sample in samples] == [
        {"__key__": "a", "jpg": b"1", "txt": b"22"},
        {"__key__": "ü/" + "b" * 200, "seg.png": b"333"},
        {"__key__": "c", "jpg": b""},
    ]


def test_the_same_members_make_the_same_bytes() -> None:
    assert written(TRICKY)[0] == written(TRICKY)[0]
    with tarfile.open(fileobj=io.BytesIO(written(TRICKY)[0])) as tar:
        infos = tar.getmembers()
    for info in infos:
        assert (info.mode, info.uid, info.gid, info.mtime, info.uname, info.gname) == (0o644, 0, 0, 0, "", "")


def test_the_index_needs_no_second_read(tmp_path: Path) -> None:
    files = [*TRICKY[2:], ("b.jpg", b"1"), ("b.jpg", b"2"), ("README", b""), (".hidden", b"")]
    content, index = written(files)
    assert index == index_tar(io.BytesIO(content))
    assert (index.repeated, index.ignored) == (("b.jpg",), ("README", ".hidden"))
    (tmp_path / "x.tar").write_bytes(content)
    write_idx(index, tmp_path / "x.idx")
    assert read_idx(tmp_path / "x.idx", tmp_path / "x.tar") == index


def test_members_can_be_written_in_pieces() -> None:
    out = io.BytesIO()
    with TarWriter(out) as writer:
        member = writer.add_from("ü.jpg", 1300, iter([b"x" * 600, b"", b"y" * 700]))
        assert writer.add_from("empty.txt", 0, []).size == 0
    assert member == Member("ü.jpg", "jpg", 1536, 1300)
    assert out.getvalue() == written([("ü.jpg", b"x" * 600 + b"y" * 700), ("empty.txt", b"")])[0]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [([b"x" * 9], "make 9 of the 10 bytes"), ([], "make 0 of"), ([b"x" * 6] * 2, "make more than the 10 bytes")],
)
def test_pieces_of_another_size_spoil_the_tar(chunks: list[bytes], message: str) -> None:
    out = io.BytesIO()
    writer = TarWriter(out)
    with pytest.raises(ArgumentError, match=f"member 'a.jpg': its pieces {message}"):
        writer.add_from("a.jpg", 10, iter(chunks))
    with pytest.raises(ArgumentError, match="unusable"):
        writer.add("b.jpg", b"1")
    size = len(out.getvalue())
    writer.close()
    assert len(out.getvalue()) == size  # no end mark: it must not look whole


def test_no_more_pieces_are_taken_than_fit() -> None:
    out = io.BytesIO()
    pieces = iter([b"x" * 6] * 1000)
    with pytest.raises(ArgumentError, match="more than"):
        TarWriter(out).add_from("a.jpg", 10, pieces)
    assert len(list(pieces)) == 998
    assert len(out.getvalue()) <= 512 + 10


def test_no_end_mark_after_an_exception() -> None:
    out = io.BytesIO()

    def fail() -> None:
        with TarWriter(out) as writer:
            writer.add("a.jpg", b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(out.getvalue()) == 1024


@pytest.mark.parametrize("name", ["", "a\0.jpg", "d/", "/", "\ud800.jpg"])
def test_names_that_no_file_has_are_errors(name: str) -> None:
    out = io.BytesIO()
    writer = TarWriter(out)
    with pytest.raises(ArgumentError, match="member"):
        writer.add(name, b"")
    assert out.getvalue() == b""
    writer.add("a.jpg", b"")  # nothing was written, so that it can go on
    writer.close()
    assert by_tarfile(out.getvalue()) == [("a.jpg", b"")]


def test_a_closed_writer_takes_nothing_more() -> None:
    out = io.BytesIO()
    writer = TarWriter(out)
    writer.close()
    writer.close()
    assert out.getvalue() == bytes(10240)
    with pytest.raises(ArgumentError, match="closed"):
        writer.add("a.jpg", b"")


def test_members_of_8_gib_and_more(tmp_path: Path) -> None:
    size = 8 * 2**30
    zeros = bytes(64 * 2**20)

    class Sparse(io.FileIO):
        """A file in which zeros take no place."""

        def write(self, data: bytes) -> int:  # type: ignore[override]
            if data is not zeros:
                return super().write(data)
            self.seek(len(data), os.SEEK_CUR)
            return len(data)

    def chunks() -> Iterator[bytes]:
        for _ in range(size // len(zeros)):
            yield zeros

    path = tmp_path / "x.tar"
    try:
        with Sparse(str(path), "w") as out, TarWriter(out) as writer:
            writer.add_from("big.bin", size, chunks())
            writer.add("small.txt", b"1")
    except OSError as error:
        pytest.skip(f"the file system does not take a sparse file of 8 GiB ({error})")
    index = index_tar(path)
    assert index == writer.index()
    assert [member.size for sample in index.samples for member in sample.members] == [size, 1]
    with tarfile.open(path) as tar:
        assert [(info.name, info.size, info.offset_data) for info in tar] == [
            ("big.bin", size, 1536),
            ("small.txt", 1, 1536 + size + 512),
        ]
