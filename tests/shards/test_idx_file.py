from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.errors import ArgumentError, TarError
from nemo_image.shards.idx_file import idx_url, load_index, read_idx, write_idx
from nemo_image.shards.index import TarIndex, index_tar

Files = Sequence[tuple[str, bytes]]

FILES = [
    ("d/0.jpg", b"picture 0" * 100),
    ("d/0.txt", b"caption 0"),
    ("d/0.JSON", b"{}"),
    ("d/1.jpg", b"picture 1"),
    ("d/1.txt", b"caption 1" * 100),
    ("ü.seg.png", b"1"),
    ("./2.jpg", b"picture 2"),
]


def make_tar(path: Path, files: Files = FILES, kind: int = tarfile.USTAR_FORMAT, **fields: Any) -> str:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_an_index_file_stands_beside_its_tar() -> None:
    assert idx_url("s3://b/00000.tar") == "s3://b/00000.idx"
    assert idx_url(Path("/d/00000.tar")) == "/d/00000.idx"
    assert idx_url("d/00000") == "d/00000.idx"


def test_the_format(tmp_path: Path) -> None:
    index = index_tar(make_tar(tmp_path / "x.tar"))
    write_idx(index, tmp_path / "x.idx")
    assert (tmp_path / "x.idx").read_text() == (
        "v1.2 4\n"
        "jpg 512 900 d/0.jpg txt 2048 9 d/0.txt JSON 3072 2 d/0.JSON\n"
        "jpg 4096 9 d/1.jpg txt 5120 900 d/1.txt\n"
        "seg.png 6656 1 ü.seg.png\n"
        "jpg 7680 9 ./2.jpg\n"
    )


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_dalis_tool_writes_the_same(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="needs DALI")
    if shutil.which("tar") is None:
        pytest.skip("needs tar")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # tar writes octal numbers for other letters otherwise
    tar = make_tar(tmp_path / "x.tar", FILES, kind)
    with wds2idx.IndexCreator(tar, str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    write_idx(index_tar(tar), tmp_path / "ours.idx")
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert read_idx(tmp_path / "theirs.idx", tar) == index_tar(tar)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_dali_reads_every_member_through_it(kind: int, tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn", reason="needs DALI")
    from nvidia.dali import pipeline_def

    files = [
        (f"{'n' * 150}{number}.{kind_}", f"{kind_} {number}".encode())
        for number in range(5)
        for kind_ in ("jpg", "txt")
    ]
    if kind == tarfile.USTAR_FORMAT:
        files = [(name[100:], data) for name, data in files]
    # Members that do not stand together, as wds2idx cannot group them.
    files = sorted(files, key=lambda file: file[0].endswith("txt"))
    tar = make_tar(tmp_path / "x.tar", files, kind, mtime=1.5)
    write_idx(index_tar(tar), tmp_path / "x.idx")

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipeline() -> Any:
        images, texts = fn.readers.webdataset(
            paths=[tar], index_paths=[str(tmp_path / "x.idx")], ext=["jpg", "txt"], missing_component_behavior="error"
        )
        return images, texts

    built = pipeline()
    built.build()
    images, texts = built.run()
    for number in range(5):
        assert np.asarray(images[number]).tobytes() == f"jpg {number}".encode()
        assert np.asarray(texts[number]).tobytes() == f"txt {number}".encode()


@pytest.mark.parametrize("name", ["a b.jpg", "a.jpg x", "a\tb.jpg", "a\nb.jpg", "a\x0b.jpg"])
def test_names_with_white_space_cannot_be_written(name: str, tmp_path: Path) -> None:
    index = index_tar(make_tar(tmp_path / "x.tar", [("0.jpg", b""), (name, b"1")], tarfile.PAX_FORMAT))
    with pytest.raises(ArgumentError, match=r"x\.idx: .*white space, which .* contains"):
        write_idx(index, tmp_path / "x.idx")
    assert not (tmp_path / "x.idx").exists()


def test_other_spaces_are_no_white_space_to_dali(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", [("a\u00a0b\u2003c.jpg", b"1")], tarfile.PAX_FORMAT)
    write_idx(index_tar(tar), tmp_path / "x.idx")
    assert read_idx(tmp_path / "x.idx", tar) == index_tar(tar)


def test_no_samples_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no samples"):
        write_idx(TarIndex((), (), (), 0), tmp_path / "x.idx")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcü"), st.sampled_from([".jpg", ".txt", ""]), st.integers(0, 2000)), min_size=1
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.sampled_from([0, 1.5]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, str, int]], kind: int, mtime: float
) -> None:
    folder = tmp_path_factory.mktemp("x")
    members = [(name + extension, b"x" * size) for name, extension, size in files]
    tar = make_tar(folder / "x.tar", members, kind, mtime=mtime if kind == tarfile.PAX_FORMAT else 0)
    index = index_tar(tar)
    if index.samples:
        write_idx(index, folder / "x.idx")
        assert read_idx(folder / "x.idx", tar) == index


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("jpg 4096 9", "jpg 4608 9", "puts 'd/1.jpg' of 9 bytes at byte 4608, where the tar has no member"),
        ("jpg 4096 9", "jpg 4096 8", "puts 'd/1.jpg' of 8 bytes at byte 4096, where the tar has 'd/1.jpg' of 9 bytes"),
        ("9 d/1.jpg", "9 d/0.jpg", "puts 'd/0.jpg' of 9 bytes at byte 4096, where the tar has 'd/1.jpg' of 9 bytes"),
        ("jpg 4096 9", "jpg 999999999 9", "puts 'd/1.jpg' of 9 bytes at byte 999999999, where the tar has no member"),
        ("jpg 4096 9", "jpg 4096 999999999", "where the tar has 'd/1.jpg' of 9 bytes"),
        ("jpg 4096 9", "jpg 0 9", "where the tar has no member"),
        (" txt 5120 900 d/1.txt", "", "leaves out 'd/1.txt' at byte 5120"),
        ("v1.2 4\n", "v1.2 5\n", "not with 'v1.2 4' for its lines"),
        ("v1.2 4\n", "v1.1 4\n", "not with 'v1.2 4'"),
        ("v1.2 4\n", "", "not with 'v1.2 3'"),
        ("jpg 4096 9", "jpg -4096 9", "line 3 is not made of"),
        ("jpg 4096 9", "jpg 1e3 9", "line 3 is not made of"),
        ("jpg 4096 9", "jpg 4096", "line 3 is not made of"),
        ("jpg 4096 9", f"jpg {'9' * 5000} 9", "line 3 is not made of"),
        ("seg.png 6656 1 ü.seg.png\n", "\n", "line 4 is not made of"),
    ],
)
def test_an_index_file_that_lies_is_not_believed(
    old: str, new: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar(tmp_path / "x.tar")
    index = index_tar(tar)
    write_idx(index, tmp_path / "x.idx")
    edited(tmp_path / "x.idx", old, new)
    with pytest.raises(TarError, match=message):
        read_idx(tmp_path / "x.idx", tar)
    with caplog.at_level(logging.WARNING):
        assert load_index(tar, use_index_file=True) == index
    assert message in caplog.text
    assert str(tmp_path / "x.idx") in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 1000, b"v1.2"])
def test_garbage_is_no_index_file(content: bytes, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar")
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(TarError, match=r"x\.idx: "):
        read_idx(tmp_path / "x.idx", tar)
    assert load_index(tar, use_index_file=True) == index_tar(tar)


def test_an_index_file_of_another_tar_is_not_believed(tmp_path: Path) -> None:
    write_idx(index_tar(make_tar(tmp_path / "x.tar")), tmp_path / "x.idx")
    tar = make_tar(tmp_path / "x.tar", [*FILES, ("later.jpg", b"1")])
    with pytest.raises(TarError, match=r"leaves out 'later\.jpg'"):
        read_idx(tmp_path / "x.idx", tar)
    tar = make_tar(tmp_path / "x.tar", FILES[:-1])
    with pytest.raises(TarError, match=r"puts '\./2\.jpg'"):
        read_idx(tmp_path / "x.idx", tar)


def test_dalis_wrong_offsets_of_long_names_are_not_believed(tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="needs DALI")
    if shutil.which("tar") is None:
        pytest.skip("needs tar")
    tar = make_tar(tmp_path / "x.tar", [("n" * 120 + ".jpg", b"1")], tarfile.GNU_FORMAT)
    with wds2idx.IndexCreator(tar, str(tmp_path / "x.idx"), verbose=False) as creator:
        creator.create_index()
    with pytest.raises(TarError, match="where the tar has no member"):
        read_idx(tmp_path / "x.idx", tar)


def test_a_missing_file_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = make_tar(tmp_path / "x.tar")
    with pytest.raises(TarError, match="no such index file"):
        read_idx(tmp_path / "x.idx", tar)
    with caplog.at_level(logging.WARNING):
        assert load_index(tar) == index_tar(tar)
        assert caplog.text == ""
        assert load_index(tar, use_index_file=True) == index_tar(tar)
    assert "no such index file" in caplog.text
    write_idx(index_tar(tar), tmp_path / "x.idx")
    os.unlink(tar)
    for call in (lambda: read_idx(tmp_path / "x.idx", tar), lambda: load_index(tar, use_index_file=True)):
        with pytest.raises(TarError, match=r"x\.tar: no such tar"):
            call()


def test_a_tar_cut_off_is_an_error_with_an_index_file_too(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar")
    write_idx(index_tar(tar), tmp_path / "x.idx")
    os.truncate(tar, 5200)
    with pytest.raises(TarError, match=r"byte 5120: member 'd/1\.txt' needs bytes"):
        load_index(tar, use_index_file=True)


class Counted(MemoryFileSystem):
    """A remote file system that counts requests; one `cat_ranges` is one wait for all."""

    protocol = "counted"
    waits: list[int] = []  # noqa: RUF012

    def cat_ranges(self, paths: Any, starts: Any, ends: Any, *args: Any, **kwargs: Any) -> Any:
        self.waits.append(sum(ends) - sum(starts))
        return super().cat_ranges(paths, starts, ends, *args, **kwargs)


def test_an_index_file_saves_waiting_for_a_remote_tar(tmp_path: Path) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    tar = make_tar(tmp_path / "x.tar", [(f"{number}.jpg", bytes(2 * 2**20)) for number in range(20)])
    index = index_tar(tar)
    write_idx(index, "counted://d/x.idx")
    fs, path = fsspec.core.url_to_fs("counted://d/x.tar")
    fs.pipe_file(path, Path(tar).read_bytes())
    Counted.waits.clear()
    assert load_index("counted://d/x.tar") == index
    one_by_one = len(Counted.waits)
    assert one_by_one >= 20
    Counted.waits.clear()
    assert load_index("counted://d/x.tar", use_index_file=True) == index
    assert len(Counted.waits) <= 4
    assert sum(Counted.waits) < 2**18
