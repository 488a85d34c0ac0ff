"""Hashes of images as columns, against xxhash and imagehash on the bytes that went into the tars."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imagehash
import pandas as pd
import pytest
import xxhash
from dask.base import tokenize
from PIL import Image

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset, shard_pass
from nemo_image.dedup.hashes import hashing
from nemo_image.dedup.hashes.hashing import ContentHash, PerceptualHash
from nemo_image.engine.decoding import isolated, pool
from nemo_image.engine.isolation import isolate
from nemo_image.engine.threads import local_share
from nemo_image.errors import ArgumentError, MissingDependencyError, RunError
from nemo_image.shards.decode import decode_pillow
from tests.makers import encoded, make_dataset, picture, sample, tar_members, write_rows, write_tar

OPERATORS = {"phash": imagehash.phash, "dhash": imagehash.dhash, "ahash": imagehash.average_hash}
STRING = schema.arrow_dtype("string")


def load(path: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(path))


def hashed(dataset: ImageTextPairDataset, function: Any) -> ImageTextPairDataset:
    outputs = {function.column: STRING, schema.IMAGE_ERROR: STRING}
    made = {"operator": type(function).__name__, "column": function.column}
    return dataset.map_columns(function, outputs=outputs, fingerprints=dict.fromkeys(outputs, made), reads_images=True)


def of_blobs(folder: Path, blobs: Mapping[str, bytes]) -> ImageTextPairDataset:
    """Make a dataset of one shard, from images by member name."""
    write_tar(folder / "a.tar", [(name.split(".")[0], {name.split(".")[1]: data}) for name, data in blobs.items()])
    write_rows(folder / "a.parquet", {"key": [name.split(".")[0] for name in blobs]})
    return load(folder)


def values(dataset: ImageTextPairDataset, function: Any) -> tuple[list[Any], list[Any]]:
    frame = hashed(dataset, function).metadata.compute()
    assert frame[function.column].dtype == frame[schema.IMAGE_ERROR].dtype == STRING
    return [
        [None if value is pd.NA else value for value in frame[name]] for name in (function.column, schema.IMAGE_ERROR)
    ]  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------- values


def test_content(tmp_path: Path, scheduler: Any) -> None:
    dataset = load(make_dataset(tmp_path, {"a": 5, "b": 3}))
    members = tar_members(tmp_path / "a.tar") | tar_members(tmp_path / "b.tar")
    found, errors = values(dataset, ContentHash(dataset.source))
    assert found == [xxhash.xxh3_128(members[f"{number:06d}.jpg"]).hexdigest() for number in range(8)]
    assert errors == [None] * 8


@pytest.mark.parametrize("name", OPERATORS)
def test_looks(tmp_path: Path, scheduler: Any, name: Any) -> None:
    dataset = load(make_dataset(tmp_path, {"a": 5, "b": 3}))
    members = tar_members(tmp_path / "a.tar") | tar_members(tmp_path / "b.tar")
    function = PerceptualHash(dataset.source, name)
    assert function.column == f"image_{name}"
    found, errors = values(dataset, function)
    pictures = [decode_pillow(members[f"{number:06d}.jpg"])[1] for number in range(8)]
    assert found == [str(OPERATORS[name](one)) for one in pictures]
    assert {len(value) for value in found} == {16}
    assert len(set(found)) == 8
    assert errors == [None] * 8


def test_the_picture_is_upright_and_over_white(tmp_path: Path) -> None:
    plain = picture(3)
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6
    alpha = plain.convert("RGBA")
    alpha.paste((0, 0, 0, 0), (0, 0, 32, 48))
    white = plain.copy()
    white.paste("white", (0, 0, 32, 48))
    blobs = {
        "0.png": encoded(plain, "PNG"),
        "1.png": encoded(turned, "PNG", exif=exif),
        "2.png": encoded(alpha, "PNG"),
        "3.gif": encoded(plain.convert("L"), "GIF", save_all=True, append_images=[picture(4).convert("L")]),
    }
    dataset = of_blobs(tmp_path, blobs)
    found, _ = values(dataset, PerceptualHash(dataset.source))
    expected = [str(imagehash.phash(one)) for one in (plain, plain, white, plain.convert("L"))]
    assert found == expected
    assert len(set(expected)) >= 2


def test_photographs(tmp_path: Path, shared: Path) -> None:
    paths = sorted((shared / "data" / "photos").glob("*.jpg"))[:12]
    dataset = of_blobs(tmp_path, {path.name: path.read_bytes() for path in paths})
    found, errors = values(dataset, PerceptualHash(dataset.source, num_threads=2))
    # Photographs of the web: upright, RGB or grey.
    expected = []
    for path in paths:
        with Image.open(path) as image:
            expected.append(str(imagehash.phash(image.convert("RGB"))))
    assert found == expected
    assert errors == [None] * 12


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_threads(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads_seen = set()
    decode = decode_pillow

    def watched(data: bytes) -> Any:
        threads_seen.add(threading.get_ident())
        return decode(data)

    monkeypatch.setattr(hashing, "decode_pillow", watched)
    dataset = load(make_dataset(tmp_path, {"a": 40}))
    function = PerceptualHash(dataset.source, num_threads=workers)
    frame = pd.DataFrame({"shard": ["a"] * 40, "key": [f"{number:06d}" for number in range(40)]})
    with local_share(3):
        found = function(frame)["image_phash"].tolist()
    members = tar_members(tmp_path / "a.tar")
    assert found == [str(imagehash.phash(decode(members[f"{number:06d}.jpg"])[1])) for number in range(40)]
    assert len(threads_seen) <= min(workers, 3)


# -------------------------------------------------------------------------------------------------------- odd samples


def odd(folder: Path) -> ImageTextPairDataset:
    """Make a shard with a good picture, damaged ones, a sample without a picture, and rows without a sample."""
    good = encoded(picture(1))
    samples: list[tuple[str, Mapping[str, bytes]]] = [
        ("00", {"jpg": good}),
        ("01", {"jpg": good[:300]}),
        ("02", {"jpg": b""}),
        ("03", {"jpg": b"<html>gone</html>"}),
        ("04", {"txt": b"a caption", "json": b"{}"}),
        ("06", {"jpg": good, "png": encoded(picture(2), "PNG")}),
    ]
    write_tar(folder / "a.tar", samples)
    write_rows(folder / "a.parquet", {"key": ["00", "01", "02", "03", "04", "05", "06"]})
    return load(folder)


def test_content_of_odd_samples(tmp_path: Path) -> None:
    dataset = odd(tmp_path)
    good = encoded(picture(1))
    found, errors = values(dataset, ContentHash(dataset.source))
    blobs = [good, good[:300], b"", b"<html>gone</html>", None, None, good]
    assert found == [None if blob is None else xxhash.xxh3_128_hexdigest(blob) for blob in blobs]
    assert errors == [
        *[None] * 4,
        "missing: sample '04' of a.tar has no image, only txt, json",
        "missing: a.tar has no sample with key '05'",
        None,
    ]


def test_looks_of_odd_samples(tmp_path: Path) -> None:
    dataset = odd(tmp_path)
    found, errors = values(dataset, PerceptualHash(dataset.source))
    seen = str(imagehash.phash(picture_of(encoded(picture(1)))))
    assert found == [seen, None, None, None, None, None, seen]
    assert [error and error.partition(":")[0] for error in errors] == [
        None,
        "truncated",
        "empty",
        "unknown",
        "missing",
        "missing",
        None,
    ]


def picture_of(data: bytes) -> Image.Image:
    return decode_pillow(data)[1]


def test_the_same_reasons_as_an_embedder_gives(tmp_path: Path) -> None:
    from nemo_image.embedders import TimmImageEmbedder
    from tests.makers import TINY_MODEL

    dataset = odd(tmp_path)
    embedded = TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).metadata.compute()
    _, errors = values(dataset, PerceptualHash(dataset.source))
    assert errors == [None if value is pd.NA else value for value in embedded[schema.IMAGE_ERROR]]


@pytest.mark.in_process("watches or changes this process")
def test_a_picture_that_fails_in_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(image: Image.Image) -> Any:
        raise MemoryError

    monkeypatch.setattr(imagehash, "phash", out_of_memory)
    dataset = load(make_dataset(tmp_path, {"a": 2}))
    found, errors = values(dataset, PerceptualHash(dataset.source))
    assert found == [None, None]
    assert errors == ["memory: MemoryError"] * 2


# ------------------------------------------------------------------------------------------------------------- shards


def functions(dataset: ImageTextPairDataset) -> Sequence[Any]:
    return ContentHash(dataset.source), PerceptualHash(dataset.source)


@pytest.mark.parametrize("which", [0, 1])
def test_a_shard_that_cannot_be_read_leaves_the_others(tmp_path: Path, which: int) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})
    data = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: len(data) // 2])
    dataset = load(tmp_path)
    function = functions(dataset)[which]
    frame = pd.DataFrame(
        {"shard": ["b", "a", "b", "a", "a"], "key": ["000003", "000002", "000004", "000000", "000001"]}
    )
    frame.index = pd.Index([7, 7, 1, 0, 3])
    made = function(frame)
    assert made.index.tolist() == [7, 7, 1, 0, 3]
    assert list(made.columns) == [function.column, schema.IMAGE_ERROR]
    assert made[function.column].isna().tolist() == [True, False, True, False, False]
    failed = made[schema.IMAGE_ERROR].tolist()
    assert failed[0].startswith("shard_failed: ")
    assert "b.tar" in failed[0]
    assert failed[2] == failed[0]
    with pytest.raises(RunError, match=r"b\.tar"):
        hashed(dataset, function).save_metadata(tmp_path / "out")
    assert not (tmp_path / "out" / "b.parquet").exists()


def test_reasons_stand_beside_their_rows(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path, {"a": 3, "b": 2}))
    frame = pd.DataFrame({"shard": ["b", "b", "a", "a"], "key": ["000003", "no b", "no a", "000001"]})
    for function in functions(dataset):
        made = function(frame)
        assert made[function.column].notna().tolist() == [True, False, False, True]
        assert made[schema.IMAGE_ERROR].dropna().to_dict() == {
            1: "missing: b.tar has no sample with key 'no b'",
            2: "missing: a.tar has no sample with key 'no a'",
        }


@pytest.mark.in_process("watches or changes this process")
@pytest.mark.parametrize("which", [0, 1])
def test_in_windows(tmp_path: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(make_dataset(tmp_path / "in", {"a": 5}))
    function = functions(dataset)[which]
    expected = values(dataset, function)[0]
    lengths: list[int] = []
    hash_rows = type(function)._hash_rows

    def noted(self: Any, shard: str, ids: Sequence[Any]) -> Any:
        lengths.append(len(ids))
        return hash_rows(self, shard, ids)

    monkeypatch.setattr(type(function), "_hash_rows", noted)
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 2)
    saved = hashed(dataset, function).save_metadata(tmp_path / "out")
    assert lengths == [2, 2, 1]
    assert saved.metadata[function.column].compute().tolist() == expected


@pytest.mark.parametrize("which", [0, 1])
def test_saved_once(tmp_path: Path, which: int) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    dataset = load(tmp_path / "in")
    first = hashed(dataset, functions(dataset)[which]).save_metadata(tmp_path / "out")
    again = hashed(dataset, functions(dataset)[which]).save_metadata(tmp_path / "out")
    assert first.run_totals is not None
    assert again.run_totals is not None
    assert first.run_totals["shards"] == {"done": 2, "skipped": 0, "failed": 0}
    assert again.run_totals["shards"] == {"done": 0, "skipped": 2, "failed": 0}
    column = functions(dataset)[which].column
    assert first.metadata[column].compute().notna().all()


@pytest.mark.in_process("watches or changes this process")
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_rows_that_are_left_are_read(tmp_path: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_image.shards.read import ShardReader

    read: list[str] = []
    many = ShardReader.read_many

    def noted(self: ShardReader, members: Any) -> Any:
        members = list(members)
        read.extend(member.name for member in members if member.name.endswith("jpg"))
        return many(self, members)

    monkeypatch.setattr(ShardReader, "read_many", noted)
    dataset = load(make_dataset(tmp_path, {"a": 6}))
    dataset.metadata = dataset.metadata[dataset.metadata["score"] > 0.25]
    found, _ = values(dataset, functions(dataset)[which])
    assert len(found) == 3
    assert read == ["000003.jpg", "000004.jpg", "000005.jpg"]


def test_no_rows(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path, {"a": 2}))
    dataset.metadata = dataset.metadata[dataset.metadata["score"] > 9]
    for function in functions(dataset):
        assert values(dataset, function) == [[], []]


# --------------------------------------------------------------------------------------------- crashing and hanging


def odd_hasher(flag: Path) -> type:
    """Return a hasher that does what a picture's tail says. It is local, so that a child process gets it by value."""
    name, plain = str(flag), hashing._Hasher

    class Odd:
        def __init__(self, hash: hashing.HashName) -> None:
            self.inner = plain(hash)

        def __call__(self, blob: bytes) -> str:
            if blob.endswith(b"segfault"):
                ctypes.string_at(0)
            while blob.endswith(b"hangs") and os.path.exists(name):
                threading.Event().wait(0.01)
            return self.inner(blob)

    return Odd


@pytest.mark.parametrize(
    ("tail", "reason"),
    [(b"segfault", "crashed: the decoder ended with SIGSEGV"), (b"hangs", "hung: no result within 5 s")],
)
def test_a_picture_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes, reason: str) -> None:
    samples = [sample(seed, f"{seed:06d}") for seed in range(5)]
    samples[2][1]["jpg"] += tail
    write_tar(tmp_path / "a.tar", samples)
    write_rows(tmp_path / "a.parquet", {"key": [key for key, _ in samples]})
    source = load(tmp_path).source
    frame = pd.DataFrame({"shard": ["a"] * 5, "key": [key for key, _ in samples]})
    expected = [None if seed == 2 else str(imagehash.phash(picture_of(samples[seed][1]["jpg"]))) for seed in range(5)]
    flag = tmp_path / "hangs"
    flag.touch()
    monkeypatch.setattr(hashing, "_Hasher", odd_hasher(flag))
    monkeypatch.setattr(pool, "SECONDS_A_PICTURE", 1.0)
    monkeypatch.setattr(isolated, "SECONDS_A_PICTURE", 5.0)
    try:
        if tail == b"segfault":
            with isolate():  # as a task is tried again after its process died
                made = PerceptualHash(source)(frame)
        else:
            made = PerceptualHash(source)(frame)
    finally:
        flag.unlink()
    assert [None if value is pd.NA else value for value in made["image_phash"]] == expected
    assert made[schema.IMAGE_ERROR].dropna().to_dict() == {2: reason}


# ---------------------------------------------------------------------------------------------------------- arguments


def test_tokens(tmp_path: Path) -> None:
    make_dataset(tmp_path / "one", {"a": 1})
    make_dataset(tmp_path / "two", {"a": 1})
    one, two = load(tmp_path / "one").source, load(tmp_path / "two").source
    made = [ContentHash(one), ContentHash(two), *(PerceptualHash(one, name) for name in OPERATORS), PerceptualHash(two)]  # type: ignore[arg-type]
    assert len({tokenize(function) for function in made}) == len(made)
    assert tokenize(ContentHash(one)) == tokenize(ContentHash(load(tmp_path / "one").source))
    assert tokenize(PerceptualHash(one)) == tokenize(PerceptualHash(one, num_threads=9))


def test_bad_arguments(tmp_path: Path) -> None:
    source = load(make_dataset(tmp_path, {"a": 1})).source
    with pytest.raises(ArgumentError, match="'phash', 'dhash', 'ahash', not 'whash'"):
        PerceptualHash(source, "whash")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_threads must be at least 1, not 0"):
        PerceptualHash(source, num_threads=0)


def test_without_imagehash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(make_dataset(tmp_path, {"a": 1}))
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nemo-image\[image_cpu\]'"):
        PerceptualHash(dataset.source)
    assert values(dataset, ContentHash(dataset.source))[0] != [None]
