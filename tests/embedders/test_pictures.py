"""Batches of a tar's pictures: in which thread each is read, and that it does not matter."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
import torch

from nemo_image.embedders.pictures import prepared_batches
from nemo_image.embedders.preprocess import (
    IsolatedPreprocessor,
    PreprocessedBatch,
    Preprocessor,
    PreprocessSpec,
    TorchvisionPreprocessor,
)
from nemo_image.errors import TarError
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader
from tests.makers import encoded, picture, write_tar

SPEC = PreprocessSpec("shortest", (36, 36), (32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BLOBS = [encoded(picture(seed)) for seed in range(7)]
SAMPLES = [(f"{number:03}", {"jpg": blob, "txt": b"text %d" % number}) for number, blob in enumerate(BLOBS)]


class Listing:
    """A preprocessor that keeps the bytes it is given, and tells whether they had been read by then."""

    spec = SPEC

    def __init__(self) -> None:
        self.seen: list[tuple[bool, list[bytes | None]]] = []

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        assert list(blobs[:2]) == [blobs[row] for row in range(len(blobs))][:2]
        self.seen.append((isinstance(blobs, list), list(blobs)))
        count = len(blobs)
        return PreprocessedBatch(torch.zeros(count, 1), list(range(count)), [None] * count, [1] * count, [1] * count)


def images_of(reader: ShardReader) -> list[Member]:
    return [sample.image for sample in reader.index.samples if sample.image is not None]


def batches(reader: ShardReader, prepare: Preprocessor, size: int = 3, texts: bool = False) -> list[PreprocessedBatch]:
    """Return all batches, and check which pictures each is of and the texts beside them."""
    beside = [[sample.members[1]] for sample in reader.index.samples] if texts else None
    found = []
    with contextlib.closing(prepared_batches(reader, images_of(reader), prepare, size, beside=beside)) as ready:
        for number, (places, batch, read) in enumerate(ready):
            assert places == range(len(BLOBS))[number * size : number * size + size]
            assert read == [(b"text %d" % place,) if texts else () for place in places]
            found.append(batch)
    return found


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    write_tar(tmp_path / "x.tar", SAMPLES)
    return tmp_path / "x.tar"


@pytest.mark.parametrize("texts", [False, True])
def test_a_local_tar_is_read_while_it_is_decoded(tar: Path, texts: bool) -> None:
    listing = Listing()
    with ShardReader(tar) as reader:
        batches(reader, listing, texts=texts)
    seen = sorted(listing.seen, key=lambda one: BLOBS.index(one[1][0] or b""))
    assert [blobs for _, blobs in seen] == [BLOBS[:3], BLOBS[3:6], BLOBS[6:]]
    assert not any(was_read for was_read, _ in seen)


def test_the_kernel_is_asked_for_a_batch_before_it_is_decoded(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)), raising=False)
    asked_by_then = []

    class Watching(Listing):
        def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
            asked_by_then.append(len(asked))
            return super().__call__(blobs)

    with ShardReader(tar) as reader:
        batches(reader, Watching(), size=7)
        assert asked == [(member.offset, member.size) for member in images_of(reader)]
    assert asked_by_then == [7]


def test_a_remote_tar_is_read_batch_by_batch(tar: Path) -> None:
    with fsspec.open("memory://pictures/x.tar", "wb") as file:
        file.write(tar.read_bytes())
    listing = Listing()
    with ShardReader("memory://pictures/x.tar") as reader:
        batches(reader, listing, size=7)
    assert listing.seen == [(True, BLOBS)]


def test_the_threads_that_decode_read(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = []
    read = ShardReader.read

    def watched(self: ShardReader, member: Member) -> bytes:
        readers.append(threading.current_thread().name)
        return read(self, member)

    monkeypatch.setattr(ShardReader, "read", watched)
    with ShardReader(tar) as reader:
        (made,) = batches(reader, TorchvisionPreprocessor(SPEC, 2), size=7)
    assert len(readers) == 7
    assert all(name.startswith("nemo-image-decode") for name in readers)
    assert torch.equal(made.pixels, TorchvisionPreprocessor(SPEC, 2)(BLOBS).pixels)


def test_a_child_process_gets_the_bytes(tar: Path) -> None:
    with IsolatedPreprocessor(TorchvisionPreprocessor(SPEC, 1)) as prepare, ShardReader(tar) as reader:
        found = batches(reader, prepare)
    expected = TorchvisionPreprocessor(SPEC, 1)(BLOBS).pixels
    assert torch.equal(torch.cat([batch.pixels for batch in found]), expected)


@pytest.mark.parametrize("size", [3, 7])
def test_a_tar_that_is_cut_off_meanwhile(tar: Path, size: int) -> None:
    with ShardReader(tar) as reader:
        last = images_of(reader)[2 if size == 3 else 6]
        os.truncate(tar, last.offset + 10)
        with pytest.raises(TarError, match=rf"member '{last.name}' at byte {last.offset} gave 10 of"):
            batches(reader, TorchvisionPreprocessor(SPEC, 2), size)
