"""The reader decodes ahead: what later stages want, in which processes, in how much memory; and bad pictures."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_image.embedders.preprocess import PreprocessSpec, TorchvisionPreprocessor, torchvision_path
from nemo_image.engine.decoding.isolated import Isolated
from nemo_image.engine.isolation import isolate
from nemo_image.engine.threads import local_share
from nemo_image.errors import ImageError
from nemo_image.shards import decode
from nemo_image.shards.decode import decode_pillow
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.reader import ImageReaderStage, OnError
from nemo_image.stages.reading import pixels_ahead
from nemo_image.stages.reading.pixels_ahead import Pictures, ReadPictures, merge_pictures
from nemo_image.stages.tasks import FileGroup
from tests.makers import encoded, make_dataset, picture, write_tar
from tests.stages.reading import (
    HALF,
    SPEC,
    HasModel,
    Input,
    WantsCaptions,
    WantsPixels,
    connected,
    group_of,
    images_of,
    read,
)

JPG = encoded(picture(1), quality=90)
OTHER_SPEC = PreprocessSpec("exact", (20, 24), (20, 24), HALF, HALF)

MODES: dict[str, Callable[[], list[Any]]] = {
    "pixels": lambda: [WantsPixels()],
    "input": lambda: [HasModel(Input("a"))],
    "none": list,
}


def reader(mode: str = "none", **options: Any) -> ImageReaderStage:
    return connected(ImageReaderStage(verbose=False, **options), *MODES[mode]())


def rotated(seed: int, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(picture(seed), quality=90, exif=exif)


@pytest.fixture
def mixed(tmp_path: Path) -> FileGroup:
    """Good pictures of several formats and sizes among bad ones."""
    blobs = {
        "jpg": JPG, "turned": rotated(2, 6), "png": encoded(picture(3, 50, 70).convert("RGBA"), "PNG"),
        "gif": encoded(picture(4), "GIF"), "cut": JPG[:300], "html": b"<html>", "empty": b"", "grey":
        encoded(picture(5, 30, 40).convert("L")), "webp": encoded(picture(6), "WEBP"), "cut2": JPG[:400],
    }  # fmt: skip
    write_tar(tmp_path / "mixed.tar", [(key, {"jpg": blob}) for key, blob in blobs.items()])
    return group_of(tmp_path, "mixed.tar")


BAD = {"cut": "truncated", "html": "unknown", "empty": "empty", "cut2": "truncated"}
GOOD = ["jpg", "turned", "png", "gif", "grey", "webp"]
SIZES = {"jpg": (64, 48), "turned": (64, 48), "png": (50, 70), "gif": (64, 48), "grey": (30, 40), "webp": (64, 48)}


def pixels_by_pillow(data: bytes) -> Any:
    return np.asarray(decode_pillow(data)[1])


# ------------------------------------------------------------------------------------------------ what stages wanted


def test_pixels_for_a_stage_that_wants_them(mixed: FileGroup) -> None:
    for later in ([WantsPixels()], [WantsCaptions(), WantsPixels(), HasModel(Input("a"))]):
        stage = connected(ImageReaderStage(verbose=False), *later)
        images = images_of(read(stage, mixed)[0])
        assert [image.image_id for image in images] == GOOD
        assert {image.image_id: (image.width, image.height) for image in images} == SIZES
        for image in images:
            assert image.holds_pixels
            assert not image.has_own_pixels
            assert image.prepared == {}
            seen = image.image_data
            assert seen is not None
            assert not seen.flags.writeable
            assert np.array_equal(seen, pixels_by_pillow(image.files["jpg"]))
    assert [image.image_data.shape for image in images if image.image_data is not None][1] == (64, 48, 3)  # upright


def test_inputs_for_models(mixed: FileGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pixels_ahead, "decode_rgb")  # who makes them decodes: once is enough
    models = [HasModel(Input("a")), HasModel(None), HasModel(Input("b", OTHER_SPEC)), HasModel(Input("a"))]
    stage = connected(ImageReaderStage(verbose=False), WantsCaptions(), *models)
    assert [one.key for one in stage._model_inputs] == ["a", "b"]
    images = images_of(read(stage, mixed)[0])
    assert [image.image_id for image in images] == GOOD
    assert {image.image_id: (image.width, image.height) for image in images} == SIZES
    for image in images:
        assert not image.holds_pixels
        assert sorted(image.prepared) == ["a", "b"]
        for key, spec in {"a": SPEC, "b": OTHER_SPEC}.items():
            alone = TorchvisionPreprocessor(spec, 1)([image.files["jpg"]])
            assert torch.equal(image.prepared[key], alone.pixels[0])
            assert image.prepared[key].dtype == torch.uint8
    # Views of the batch's tensor: no copies.
    assert len({image.prepared["a"].untyped_storage().data_ptr() for image in images}) == 1


def test_a_preprocessor_is_made_once_a_stream(mixed: FileGroup) -> None:
    made: list[int] = []

    class Counted(Input):
        def preprocessor(self, num_threads: int) -> Any:
            made.append(num_threads)
            return super().preprocessor(num_threads)

    with local_share(3):
        read(connected(ImageReaderStage(verbose=False, batch_size=2, num_threads=4), HasModel(Counted("a"))), mixed)
        read(connected(ImageReaderStage(verbose=False, batch_size=2, num_threads=2), HasModel(Counted("a"))), mixed)
    assert made == [3, 2]


def test_nobody_wants_pixels(mixed: FileGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = decode.decode_rgb

    def decode_rgb(data: bytes, **options: Any) -> Any:
        decoded.append(len(data))
        return real(data, **options)

    monkeypatch.setattr(pixels_ahead, "decode_rgb", decode_rgb)
    for later in ([], [WantsCaptions()], [HasModel(None)]):
        decoded.clear()
        images = images_of(read(connected(ImageReaderStage(verbose=False), *later), mixed)[0])
        assert [image.image_id for image in images] == GOOD
        assert {image.image_id: (image.width, image.height) for image in images} == SIZES
        assert not any(image.holds_pixels or image.prepared for image in images)
        assert len(decoded) == 10

    decoded.clear()
    batches, counts = read(reader("none", on_error="keep"), mixed)
    images = images_of(batches)
    assert len(images) == 10
    assert (decoded, counts) == ([], {})
    assert {(image.width, image.height, image.image_error) for image in images} == {(None, None, None)}
    assert np.array_equal(images[0].image_data, pixels_by_pillow(JPG))


def test_connecting_changes_no_stage_of_the_users(mixed: FileGroup) -> None:
    mine = ImageReaderStage(verbose=False)
    connected(mine, WantsPixels(), HasModel(Input("a")))
    assert mine == ImageReaderStage(verbose=False)
    assert not any(image.holds_pixels for image in images_of(read(mine, mixed)[0]))


# --------------------------------------------------------------------------------------------------------- bad pictures


@pytest.mark.parametrize("mode", MODES)
def test_bad_pictures_are_left_out(mixed: FileGroup, mode: str) -> None:
    batches, counts = read(reader(mode, batch_size=3), mixed)
    assert [image.image_id for image in images_of(batches)] == GOOD
    # The batch of "cut", "html" and "empty" is none; the others are numbered by the samples of the tar.
    by_batch = {batch.task_id: [image.image_id for image in batch.data] for batch in batches}
    assert by_batch == {"mixed:0": GOOD[:3], "mixed:3": ["gif"], "mixed:6": ["grey", "webp"]}
    assert counts == {"error: truncated": 2, "error: unknown": 1, "error: empty": 1, "skipped": 4}


@pytest.mark.parametrize("mode", ["pixels", "input"])
def test_bad_pictures_are_passed_on(mixed: FileGroup, mode: str) -> None:
    batches, counts = read(reader(mode, on_error="keep"), mixed)
    (batch,) = batches
    reasons = {image.image_id: image.image_error for image in batch.data}
    assert list(reasons) == ["jpg", "turned", "png", "gif", "cut", "html", "empty", "grey", "webp", "cut2"]
    assert {key: reason.partition(":")[0] for key, reason in reasons.items() if reason} == BAD
    assert counts == {"error: truncated": 2, "error: unknown": 1, "error: empty": 1}
    for image in batch.data:
        if image.image_error is not None:
            assert (image.image_data, image.prepared, image.width, image.height) == (None, {}, None, None)
            assert image.image_bytes == image.files["jpg"]


@pytest.mark.parametrize("mode", MODES)
def test_bad_pictures_fail_the_group(mixed: FileGroup, mode: str) -> None:
    with pytest.raises(ImageError, match=r"mixed\.tar/cut\.jpg: Truncated .* \(on_error='skip'") as caught:
        read(reader(mode, on_error="raise"), mixed)
    assert caught.value.category == "truncated"
    stream = reader(mode, on_error="raise", batch_size=4).stream(iter([mixed]), mixed)
    assert [image.image_id for image in next(stream).data] == GOOD[:4]
    with pytest.raises(ImageError):
        next(stream)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_the_largest_picture(tmp_path: Path, mode: str, on_error: OnError) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": JPG}), ("b", {"png": encoded(picture(1, 64, 49), "PNG")})])
    stage = reader(mode, on_error=on_error, max_pixels=64 * 48)
    batches, counts = read(stage, group_of(tmp_path, "0.tar"))
    assert counts["error: bomb"] == 1
    assert [image.image_id for image in images_of(batches)] == (["a", "b"] if on_error == "keep" else ["a"])
    reason = "bomb: 64 x 49 pixels, more than max_pixels=3072"
    assert [image.image_error for image in images_of(batches)] == ([None, reason] if on_error == "keep" else [None])


# ------------------------------------------------------------------------------------------------- real, odd pictures


@pytest.fixture(scope="module")
def odd(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FileGroup, dict[str, str]]:
    """The odd files as a tar, and the category of each that is bad, by Pillow's path alone."""
    root = tmp_path_factory.mktemp("odd")
    manifest = json.loads((shared / "data" / "odd" / "manifest.json").read_text())
    tar, bad = [], {}
    for number, entry in enumerate(manifest):
        data = (shared / "data" / "odd" / entry["file"]).read_bytes()
        extension = entry["file"].rpartition(".")[2].lower()
        tar.append((f"{number:05d}", {extension: data}))
        try:
            decode_pillow(data)
        except ImageError as error:
            bad[f"{number:05d}"] = error.reason
    write_tar(root / "odd.tar", tar)
    assert len(tar) > 100
    assert len(bad) > 10
    return group_of(root, "odd.tar"), bad


@pytest.mark.parametrize("mode", MODES)
def test_odd_pictures(odd: tuple[FileGroup, dict[str, str]], mode: str) -> None:
    group, bad = odd
    expected = Counter(f"error: {reason.partition(':')[0]}" for reason in bad.values())

    batches, counts = read(reader(mode, batch_size=50), group)
    good = images_of(batches)
    assert counts == {**expected, "skipped": len(bad)}
    assert not {image.image_id for image in good} & bad.keys()

    with pytest.raises(ImageError, match=rf"odd\.tar/{min(bad)}\."):
        read(reader(mode, on_error="raise"), group)
    if mode == "none":
        return

    batches, counts = read(reader(mode, batch_size=50, on_error="keep"), group)
    assert counts == expected
    assert {image.image_id: image.image_error for image in images_of(batches) if image.image_error} == bad
    assert len(images_of(batches)) == len(good) + len(bad)
    for image in images_of(batches):
        if image.image_error is None:
            header, rgb = decode_pillow(image.files[image.image_extension])
            assert (image.width, image.height) == (header.width, header.height)
            if mode == "pixels":
                assert np.array_equal(image.image_data, np.asarray(rgb))
            else:
                assert image.prepared["a"].shape == (3, 32, 32)


# ----------------------------------------------------------------------------------------------------- child processes


@pytest.mark.parametrize("mode", MODES)
def test_the_same_in_a_child_process(mixed: FileGroup, mode: str) -> None:
    here, counts_here = read(reader(mode, on_error="skip", batch_size=4), mixed)
    with isolate():
        there, counts_there = read(reader(mode, on_error="skip", batch_size=4), mixed)
    assert counts_there == counts_here
    assert [batch.task_id for batch in there] == [batch.task_id for batch in here]
    for one, other in zip(images_of(there), images_of(here), strict=True):
        assert (one.image_id, one.width, one.height) == (other.image_id, other.width, other.height)
        assert one.holds_pixels == other.holds_pixels == (mode == "pixels")
        assert np.array_equal(one.image_data, other.image_data)
        assert one.prepared.keys() == other.prepared.keys()
        assert all(torch.equal(one.prepared[key], other.prepared[key]) for key in one.prepared)
    with isolate():
        kept, _ = read(reader("pixels", on_error="keep"), mixed)
    reasons = {image.image_id: str(image.image_error).partition(":")[0] for image in images_of(kept)}
    assert {key: category for key, category in reasons.items() if category != "None"} == BAD


def test_no_decoder_of_an_isolated_task_runs_here(mixed: FileGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*args: Any, **options: Any) -> Any:
        raise AssertionError("decoded in this process")

    monkeypatch.setattr(pixels_ahead, "decode_rgb", here)
    monkeypatch.setattr(pixels_ahead, "read_header", here)
    monkeypatch.setattr(torchvision_path, "decode_rgb", here)
    for mode in MODES:
        with isolate():
            assert [image.image_id for image in images_of(read(reader(mode), mixed)[0])] == GOOD
        with pytest.raises(AssertionError, match="decoded in this process"):
            read(reader(mode), mixed)


def test_a_picture_that_crashes_its_decoder_costs_itself() -> None:
    inner = ReadPictures("pixels", 2, decode.MAX_PIXELS)

    class Crashing:  # local, so that the child gets it by value
        def __call__(self, blobs: Sequence[bytes | None]) -> Pictures:
            for blob in blobs:
                if blob is not None and blob.endswith(b"segfault"):
                    ctypes.string_at(0)
            return inner(blobs)

    blobs = [JPG, encoded(picture(2, 30, 20)) + b"segfault", JPG[:300], encoded(picture(3, 20, 30))]
    with Isolated(Crashing(), merge_pictures) as child:
        found = child(blobs)
    assert found.sizes == [(64, 48), None, None, (20, 30)]
    assert found.errors[1] == "crashed: the decoder ended with SIGSEGV"
    assert [str(error).partition(":")[0] for error in found.errors] == ["None", "crashed", "truncated", "None"]
    for place in (0, 3):
        assert np.array_equal(found.pixels[place], pixels_by_pillow(blobs[place]))
    assert (found.pixels[1], found.pixels[2]) == (None, None)


# -------------------------------------------------------------------------------------------------------------- memory


def test_batches_close_where_their_pixels_would_take_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(10, 10), (20, 10), (30, 30), (5, 5), (10, 10), (0, 0), (10, 18), (1, 1)]
    blobs = [encoded(picture(1, *size), "PNG") if size[0] else b"bad" for size in sizes]
    write_tar(tmp_path / "0.tar", [(str(number), {"png": blob}) for number, blob in enumerate(blobs)])
    monkeypatch.setattr(pixels_ahead, "PIXEL_BYTES", 900)
    group = group_of(tmp_path, "0.tar")
    expected = {"0:0": ["0", "1"], "0:2": ["2"], "0:3": ["3", "4"], "0:6": ["6", "7"]}
    runs: list[Callable[[], Any]] = [lambda: read(reader("pixels"), group)[0]]
    runs.append(lambda: read(reader("pixels", num_threads=1), group)[0])
    for run in runs:
        assert {batch.task_id: [image.image_id for image in batch.data] for batch in run()} == expected
    with isolate():
        assert {batch.task_id: [image.image_id for image in batch.data] for batch in runs[0]()} == expected
    # Where pixels are not held, they do not count.
    assert [len(batch.data) for batch in read(reader("input"), group)[0]] == [7]
    # The pixels of each chunk of samples are counted anew.
    found = read(reader("pixels", batch_size=4, on_error="keep"), group)[0]
    assert [[image.image_id for image in batch.data] for batch in found] == [
        ["0", "1"], ["2"], ["3"], ["4", "5", "6", "7"]
    ]  # fmt: skip


def test_pixels_that_were_given_away_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"00000": 6})
    monkeypatch.setattr(pixels_ahead, "PIXEL_BYTES", 2 * 64 * 48 * 3)
    group = group_of(tmp_path, "00000.tar")
    alive: list[weakref.ref[ImageObject]] = []
    real = ReadPictures.__call__
    held: list[int] = []

    def decoding(self: ReadPictures, blobs: Sequence[bytes | None]) -> Pictures:
        if self.how == "pixels":
            gc.collect()
            held.append(sum(one() is not None for one in alive))
        return real(self, blobs)

    monkeypatch.setattr(ReadPictures, "__call__", decoding)
    stream = reader("pixels").stream(iter([group]), group)
    while (batch := next(stream, None)) is not None:
        alive += [weakref.ref(image) for image in batch.data]
        assert len(batch.data) == 2
        del batch
    assert held == [0, 0, 0]


def test_a_picture_larger_than_the_limit_is_a_batch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_ahead, "PIXEL_BYTES", 1)
    make_dataset(tmp_path, {"00000": 3})
    assert [len(batch.data) for batch in read(reader("pixels"), group_of(tmp_path, "00000.tar"))[0]] == [1, 1, 1]


def test_an_animated_picture_is_its_first_frame(tmp_path: Path) -> None:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    write_tar(tmp_path / "0.tar", [("a", {"gif": out.getvalue()})])
    (image,) = images_of(read(reader("pixels"), group_of(tmp_path, "0.tar"))[0])
    assert image.image_data is not None
    assert image.image_data.tolist() == [[[255, 0, 0]] * 8] * 8
