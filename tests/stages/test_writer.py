"""The writer: full tars across batches and groups, members byte for byte, rows, the same bytes each time."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import tarfile
import tracemalloc
import weakref
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, PipelineError
from nemo_image.shards.idx_file import read_idx
from nemo_image.shards.parquet import read_summary
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import FileGroup, ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from tests.makers import encoded, picture, tar_members, write_tar
from tests.stages.writing import Makes, Run, contents, in_batches, plain_tar, rows, tar_images, tars


def keys(first: int, count: int) -> list[str]:
    return [f"{number:06d}" for number in range(first, first + count)]


@pytest.fixture
def three(tmp_path: Path) -> dict[str, list[ImageObject]]:
    """Three groups' images: 7, 5 and 9."""
    found, first = {}, 0
    for name, size in {"a": 7, "b": 5, "c": 9}.items():
        found[name] = plain_tar(tmp_path / "in" / f"{name}.tar", keys(first, size), first)
        first += size
    return found


def batches_of(groups: dict[str, list[ImageObject]], size: int = 2) -> dict[str, list[ImageBatch]]:
    return {name: in_batches(images, size) for name, images in groups.items()}


def test_tars_are_full_across_batches_and_groups(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Run(ImageWriterStage(str(out), images_per_tar=3), batches_of(three))
    # 7 = 2 * 3 + 1, 5 = 3 + 2, 9 = 3 * 3: what is left over, 1 + 2, fills one more.
    full = ["a-00000", "a-00001", "b-00000", "c-00000", "c-00001", "c-00002", "packed-00000"]
    assert tars(out) == full
    assert run.said == {"shards": 7, "rows": 21, "output_dir": str(out), "rewritten keys": 0}
    seen = []
    for name in full:
        members = tar_members(out / f"{name}.tar")
        table = rows(out / f"{name}.parquet")
        assert len(table) == 3
        assert list(members) == [f"{row['key']}.{end}" for row in table for end in ("jpg", "txt", "json")]
        assert {row["shard"] for row in table} == {name}
        seen += [(row["original_shard"], row["original_key"]) for row in table]
    expected = [("a", key) for key in keys(0, 6)] + [("b", key) for key in keys(7, 3)]
    expected += [("c", key) for key in keys(12, 9)] + [("a", "000006"), ("b", "000010"), ("b", "000011")]
    assert seen == expected
    assert not (out / "_nemo_image" / "remainders").exists()


def test_only_the_last_tar_of_the_run_is_short(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Run(ImageWriterStage(str(out), images_per_tar=4), batches_of(three))
    sizes = {name: len(rows(out / f"{name}.parquet")) for name in tars(out)}
    assert sizes == {
        **dict.fromkeys(["a-00000", "b-00000", "c-00000", "c-00001", "packed-00000"], 4),
        "packed-00001": 1,
    }
    output = run.records["a"].outputs[0]
    assert output.data == [f"{out}/a-00000.tar", f"{out}/a-00000.parquet"]
    assert {name: output.metadata[name] for name in ("shards", "rows")} == {"shards": ["a-00000"], "rows": 7}
    left = output.metadata["remainder"]
    assert (left["rows"], left["name"]) == (3, "a")
    assert output.metadata["files"]["a-00000.tar"] == (out / "a-00000.tar").stat().st_size


def test_members_are_the_source_s_byte_for_byte(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out), images_per_tar=4), batches_of(three))
    originals: dict[str, bytes] = {}
    for path in (tmp_path / "in").glob("*.tar"):
        originals |= tar_members(path)
    written: dict[str, bytes] = {}
    for name in tars(out):
        written |= tar_members(out / f"{name}.tar")
    assert len(originals) == 63
    assert written == originals


def test_what_is_at_hand_is_not_read_again(tmp_path: Path) -> None:
    images = plain_tar(tmp_path / "in" / "a.tar", keys(0, 4))
    held = tar_images(tmp_path / "in" / "a.tar", held=("jpg", "txt", "json"))
    Run(ImageWriterStage(str(tmp_path / "one"), images_per_tar=3), {"g": in_batches(images, 3)})
    (tmp_path / "in" / "a.tar").unlink()
    Run(ImageWriterStage(str(tmp_path / "two"), images_per_tar=3), {"g": in_batches(held, 3)})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_case_of_extensions_odd_members_and_their_order_stay(tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.tar"
    picture_bytes = encoded(picture(1, 8, 8))
    with_parts = {"seg.PNG": b"mask", "JPG": picture_bytes, "Json": b'{"key": "k"}', "npy": b"", "jpeg": b"extra"}
    write_tar(source, [("k", with_parts), ("dir/k2", {"jpg": picture_bytes})])
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": in_batches(tar_images(source, held=("jpg", "npy")), 5)})
    written = tar_members(out / "packed-00000.tar")
    assert list(written) == ["k.seg.PNG", "k.JPG", "k.Json", "k.npy", "k.jpeg", "dir/k2.jpg"]
    assert written == tar_members(source)


def test_same_bytes_whatever_the_order_in_which_groups_end(
    three: dict[str, list[ImageObject]], tmp_path: Path, scheduler: Any
) -> None:
    folders = []
    for number, (size, order) in enumerate(product((2, 100), ("abc", "cab"))):
        out = tmp_path / f"out{number}"
        # The remainders are packed on the scheduler's workers.
        Run(ImageWriterStage(str(out), images_per_tar=2), batches_of(three, size), order=list(order))
        folders.append(contents(out))
    assert len(folders[0]) == 1 + 3 * 11
    assert all(folder == folders[0] for folder in folders[1:])


def test_dataset_webdataset_and_pandas_read_it(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs webdataset, of the extra 'test'")
    out = tmp_path / "out"
    for number, image in enumerate(image for images in three.values() for image in images):
        image.embedding = np.full(4, number, np.float32)
        image.aesthetic_score = number / 2
    made = {"image_embedding": {"operator": "clip"}, "aesthetic_score": {"operator": "head"}}
    Run(ImageWriterStage(str(out), images_per_tar=4), batches_of(three), earlier=[Makes(**made)])

    dataset = ImageTextPairDataset.from_webdataset(out, on_mismatch="raise")
    assert dataset.provenance == made
    frame = dataset.metadata.compute()
    assert len(frame) == 21
    assert sorted(frame["seed"]) == list(range(21))
    assert frame["aesthetic_score"].tolist() == [seed / 2 for seed in frame["seed"]]
    assert [row[0] for row in frame["image_embedding"]] == frame["seed"].tolist()
    assert frame["caption"].tolist() == [f"caption {seed}" for seed in frame["seed"]]

    urls = [str(out / f"{name}.tar") for name in tars(out)]
    code = (  # a process of its own: the library leaves files open
        "import json, sys, webdataset\n"
        "for one in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):\n"
        "    print(json.dumps([one['__key__'], json.loads(one['json'])['seed'], one['txt'].decode()]))"
    )
    read = subprocess.run([sys.executable, "-c", code, *urls], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in read.stdout.splitlines()]
    assert found == frame[["key", "seed", "caption"]].to_numpy().tolist()

    plain = pd.read_parquet(out / "a-00000.parquet")
    assert list(plain.columns) == [
        *("shard", "key", "original_shard", "original_key", "caption", "seed", "width", "height"),
        *("image_embedding", "aesthetic_score", "image_error"),
    ]
    assert pq.read_metadata(out / "a-00000.parquet").metadata.keys() == {b"ARROW:schema", b"nemo_image"}
    for name in tars(out):
        tar, idx = out / f"{name}.tar", out / f"{name}.idx"
        assert len(read_idx(idx, tar)) == len(rows(out / f"{name}.parquet"))


def test_the_output_can_be_enriched_in_place(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out), images_per_tar=4), batches_of(three))
    dataset = ImageTextPairDataset.from_webdataset(out)
    dataset.metadata["double"] = dataset.metadata["seed"] * 2
    saved = dataset.save_metadata()
    frame = saved.metadata.compute()
    assert frame["double"].tolist() == [2 * seed for seed in frame["seed"]]
    assert len(frame) == 21


# What stages change ---------------------------------------------------------------------------------------------------


def test_a_changed_caption_is_written_and_others_stay(tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.tar"
    jpg = encoded(picture(1, 8, 8))
    write_tar(source, [("a", {"txt": b"old", "jpg": jpg}), ("b", {"jpg": jpg}), ("c", {"jpg": jpg, "txt": b"\xff"})])
    images = tar_images(source)
    images.append(tar_images(source)[0])
    images[3].image_id = "gone"
    images[0].caption, images[1].caption, images[3].caption = "new é", "added", None
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": in_batches(images, 5)})
    members = tar_members(out / "packed-00000.tar")
    assert list(members) == ["a.txt", "a.jpg", "b.jpg", "b.txt", "c.jpg", "c.txt", "gone.jpg"]
    assert [members[name] for name in ("a.txt", "b.txt", "c.txt")] == ["new é".encode(), b"added", b"\xff"]
    assert [row["caption"] for row in rows(out / "packed-00000.parquet")] == ["new é", "added", "\ufffd", None]


def test_assigned_bytes_added_files_and_fields_are_written(tmp_path: Path) -> None:
    images = plain_tar(tmp_path / "in" / "a.tar", keys(0, 2))
    better = encoded(picture(9, 10, 6), "PNG")
    images[0].image_bytes = better
    images[0].files["seg.png"] = b"mask"
    images[0].metadata["language"] = "en"
    images[1].image_data = np.zeros((3, 3, 3), np.uint8)  # seen by later stages, not written
    original = tar_members(tmp_path / "in" / "a.tar")
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": in_batches(images, 5)})
    members = tar_members(out / "packed-00000.tar")
    assert list(members)[:4] == ["000000.jpg", "000000.txt", "000000.json", "000000.seg.png"]
    assert members["000000.jpg"] == better
    assert members["000000.seg.png"] == b"mask"
    assert members["000001.jpg"] == original["000001.jpg"]
    found = rows(out / "packed-00000.parquet")
    assert [row["language"] for row in found] == ["en", None]
    assert (found[0]["width"], found[0]["height"]) == (10, 6)


def test_an_image_without_a_file_is_stored_without_loss(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    made = ImageObject(image_id="x", image_data=pixels, caption="hello", metadata={"n": 1})
    stored = ImageObject(image_id="y", image_bytes=b"not a picture", metadata={"n": 2})
    stored.image_error = "unknown: no picture"
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": [ImageBatch([made, stored])]})
    members = tar_members(out / "packed-00000.tar")
    assert list(members) == ["x.png", "x.txt", "y.jpg"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(members["x.png"]))), pixels)
    assert (members["x.txt"], members["y.jpg"]) == (b"hello", b"not a picture")
    found = rows(out / "packed-00000.parquet")
    assert [(row["width"], row["height"], row["image_error"], row["n"]) for row in found] == [
        (7, 5, None, 1),
        (None, None, "unknown: no picture", 2),
    ]


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (ImageObject(image_path="some/where.jpg", image_id="empty"), "'empty'.*some/where.jpg.*neither"),
        (ImageObject(image_path="some/where.jpg", image_bytes=b"x"), "some/where.jpg.*no image_id"),
    ],
)
def test_an_image_that_cannot_be_written_is_named(image: ImageObject, match: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match=match):
        Run(ImageWriterStage(str(out)), {"g": [ImageBatch([image])]})
    assert not list(out.rglob("*.tar"))


def test_a_file_with_no_usable_extension_is_refused(tmp_path: Path) -> None:
    image = ImageObject(image_id="k", image_bytes=b"x")
    image.files["../up"] = b"y"
    with pytest.raises(ArgumentError, match=r"'k'.*'\.\./up'"):
        Run(ImageWriterStage(str(tmp_path / "out")), {"g": [ImageBatch([image])]})


def test_pixels_are_freed_if_asked_for(tmp_path: Path) -> None:
    for free in (False, True):
        images = plain_tar(tmp_path / "in" / "a.tar", keys(0, 3))
        for image in images:
            assert image.image_data is not None
        out = tmp_path / f"out-{free}"
        Run(ImageWriterStage(str(out), images_per_tar=2, remove_image_data=free), {"g": in_batches(images, 2)})
        assert [image.holds_pixels for image in images] == [not free] * 3
    assert contents(tmp_path / "out-True") == contents(tmp_path / "out-False")


def test_a_large_member_is_never_in_memory(tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.tar"
    large = bytes(range(256)) * 2**17  # 32 MiB
    write_tar(source, [("k", {"jpg": encoded(picture(1, 8, 8)), "mp4": large})])
    image = tar_images(source)[0]
    out = tmp_path / "out"
    tracemalloc.start()
    Run(ImageWriterStage(str(out)), {"g": [ImageBatch([image])]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    with tarfile.open(out / "packed-00000.tar") as tar:
        file = tar.extractfile("k.mp4")
        assert file is not None
        assert file.read() == large


def test_no_image_is_held_beyond_its_batch(tmp_path: Path) -> None:
    plain_tar(tmp_path / "in" / "a.tar", keys(0, 9))
    made: list[weakref.ref[ImageObject]] = []
    alive: list[int] = []

    def batches() -> Iterator[ImageBatch]:
        for start in range(0, 9, 3):
            alive.append(sum(one() is not None for one in made))
            images = tar_images(tmp_path / "in" / "a.tar")[start : start + 3]
            made.extend(map(weakref.ref, images))
            batch = ImageBatch(images)
            del images
            yield batch
            del batch

    stage = ImageWriterStage(str(tmp_path / "out"), images_per_tar=5)
    # The batch itself is held by its maker until it is asked for the next one; the writer may hold the last image.
    made_files = list(stage.stream(_handed_over(batches()), FileGroup(name="g")))
    assert made_files[0].metadata["rows"] == 9
    assert len(alive) == 3
    assert max(alive) <= 1


def _handed_over(batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
    while (holder := [next(batches, None)])[0] is not None:
        yield holder.pop()  # type: ignore[misc]


# Odd groups -----------------------------------------------------------------------------------------------------------


def test_groups_without_images(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    groups = {"none": [], "filtered": [ImageBatch([]), ImageBatch([])], **batches_of({"b": three["b"]})}
    run = Run(ImageWriterStage(str(out), images_per_tar=5), groups)
    assert tars(out) == ["b-00000"]
    assert run.records["filtered"].outputs[0].metadata["rows"] == 0
    assert run.records["none"].outputs[0].data == []
    nothing = Run(ImageWriterStage(str(tmp_path / "empty")), {"none": []})
    assert nothing.said["shards"] == nothing.said["rows"] == 0


def test_one_batch_written_by_hand(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage = ImageWriterStage(str(out), images_per_tar=3)
    made = stage.process(ImageBatch(three["b"], task_id="my/batch:0"))
    assert made.data == [f"{out}/my_batch_0-{number:05d}.{end}" for number in range(2) for end in ("tar", "parquet")]
    assert [len(rows(out / f"my_batch_0-{number:05d}.parquet")) for number in range(2)] == [3, 2]
    assert len(ImageTextPairDataset.from_webdataset(out)) == 5
    unnamed = stage.process(ImageBatch(three["a"]))
    assert unnamed.metadata["shards"][0].startswith("batch-")


def test_verbose_says_a_line_a_group(
    three: dict[str, list[ImageObject]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nemo_image")
    Run(ImageWriterStage(str(tmp_path / "one"), images_per_tar=4), batches_of(three))
    assert not caplog.messages
    Run(ImageWriterStage(str(tmp_path / "two"), images_per_tar=4, verbose=True), batches_of(three))
    assert caplog.messages == [
        f"image_writer: {name}: {images} images in {files} files, {left} of them left over"
        for name, images, files, left in (("a", 7, 1, 3), ("b", 5, 1, 1), ("c", 9, 2, 1))
    ]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"output_dir": ""}, "output_dir"),
        ({"images_per_tar": 0}, "images_per_tar.*0"),
        ({"images_per_tar": True}, "images_per_tar.*True"),
        ({"images_per_tar": 2.5}, "images_per_tar.*2.5"),
        ({"deterministic_name": False}, "deterministic_name"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        ImageWriterStage(**{"output_dir": "out", **arguments})


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "packed"])
def test_names_of_groups_that_cannot_name_tars(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="name"):
        list(ImageWriterStage(str(tmp_path / "out")).stream(iter([]), FileGroup(name=name)))


def test_the_writer_is_the_last_stage(tmp_path: Path) -> None:
    stage = ImageWriterStage(str(tmp_path / "out"))
    with pytest.raises(PipelineError, match="'makes' comes after 'image_writer'"):
        stage.connect([], [Makes()])


def test_footers_count_what_is_missing(three: dict[str, list[ImageObject]], tmp_path: Path) -> None:
    three["a"][0].embedding = np.ones(2, np.float32)
    three["a"][1].image_error = "truncated: cut off"
    out = tmp_path / "out"
    Run(
        ImageWriterStage(str(out), images_per_tar=7), batches_of({"a": three["a"]}), earlier=[Makes(image_embedding={})]
    )
    summary = read_summary(str(out / "a-00000.parquet"))
    assert summary.footer is not None
    assert summary.footer.plan == "token"
    assert summary.footer.pending == {"image_embedding": 5}
    assert summary.footer.source is not None
    assert summary.footer.source["size"] == (out / "a-00000.tar").stat().st_size
    assert summary.footer.idx_size == (out / "a-00000.idx").stat().st_size
    record = summary.footer.record
    assert (record["rows_out"], record["results"], record["failures"]) == (7, {"image_embedding": 1}, {"truncated": 1})


# Any cut into batches and groups --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    plain_tar(folder / "s.tar", keys(0, 24))
    return folder


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=5),
    size=st.integers(1, 9),
)
def test_any_cut_gives_full_tars_in_order(
    cuts: list[list[int]], size: int, many: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    images = tar_images(many / "s.tar", held=("jpg", "txt", "json"))
    groups: dict[str, list[ImageBatch]] = {}
    place = 0
    for number, sizes in enumerate(cuts):
        groups[f"g{number}"] = []
        for length in sizes:
            groups[f"g{number}"].append(ImageBatch(images[place : place + length]))
            place += length
    place = min(place, len(images))
    out = tmp_path_factory.mktemp("out")
    Run(ImageWriterStage(str(out), images_per_tar=size), groups)
    by_shard = {name: [row["original_key"] for row in rows(out / f"{name}.parquet")] for name in tars(out)}
    assert sorted(key for found in by_shard.values() for key in found) == keys(0, place)
    in_full = [name for name in by_shard if not name.startswith("packed")]
    packed = [name for name in by_shard if name.startswith("packed")]
    assert all(len(by_shard[name]) == size for name in [*in_full, *packed[:-1]])
    assert len(packed) == -(-(place - size * len(in_full)) // size)
    left = []
    for name, batches in groups.items():
        own = [image.image_id for batch in batches for image in batch.data]
        whole = len(own) // size * size
        assert [key for shard in in_full if shard.startswith(f"{name}-") for key in by_shard[shard]] == own[:whole]
        left += own[whole:]
    assert [key for shard in packed for key in by_shard[shard]] == left
    for name, found in by_shard.items():
        assert [one.split(".")[0] for one in tar_members(out / f"{name}.tar")][::3] == found


def test_no_row_of_fields_is_invented(tmp_path: Path) -> None:
    """The declared types of the source are kept, also where all values are null."""
    fields = pa.schema([("key", pa.string()), ("seed", pa.int16()), ("note", pa.large_string())])
    images = plain_tar(tmp_path / "in" / "a.tar", keys(0, 3))
    for image in images:
        image.metadata = {"key": image.image_id, "seed": 1, "note": None}
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": in_batches(images, 2, fields)})
    found = pq.read_schema(out / "packed-00000.parquet")
    assert (found.field("seed").type, found.field("note").type) == (pa.int16(), pa.string())
    assert "source_key" not in found.names
