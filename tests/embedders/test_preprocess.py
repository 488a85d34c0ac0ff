"""One suite for every preprocessing path: the reference is the model's own transform on Pillow's picture."""

from __future__ import annotations

import functools
import io
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as tv

from nemo_image.embedders.preprocess import (
    PillowPreprocessor,
    PreprocessedBatch,
    Preprocessor,
    PreprocessSpec,
    TorchvisionPreprocessor,
    make_preprocessor,
    normalize,
    spec_from_transform,
)
from nemo_image.embedders.preprocess.dali_path import DaliPreprocessor
from nemo_image.errors import ArgumentError, MissingDependencyError
from nemo_image.shards.decode import decode_rgb, read_header
from nemo_image.shards.jpeg import scan_jpeg
from tests.images import PHOTOGRAPHS, STORED, photograph
from tests.makers import encoded, picture

HALF = (0.5, 0.5, 0.5)
SMALL = PreprocessSpec("shortest", (36, 36), (32, 32), HALF, HALF)

TRANSFORMS: dict[str, dict[str, Any]] = {
    "center": {},
    "bilinear": {"interpolation": "bilinear", "crop_pct": 0.95},
    "squash": {"crop_mode": "squash", "crop_pct": 1.0},
    "border": {"crop_mode": "border", "mean": (0.5, 0.25, 0.75)},
    "oblong": {"input_size": (3, 128, 192), "crop_pct": 0.9},
    "enlarging": {"input_size": (3, 288, 288), "crop_pct": 0.5},
}


def timm_transform(name: str) -> Any:
    base = {"input_size": (3, 160, 160), "interpolation": "bicubic", "crop_pct": 0.875, "mean": HALF, "std": HALF}
    return create_transform(**{**base, **TRANSFORMS[name]})


@functools.cache
def small_model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_efficientnet", num_classes=0).eval()


@torch.inference_mode()
def embed(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    vectors = torch.cat([model(part) for part in pixels.split(32)])
    return torch.nn.functional.normalize(vectors, dim=1)


def reference(transform: Any, blobs: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([transform(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in blobs])


@functools.cache
def photographs(subsampling: int) -> tuple[bytes, ...]:
    return tuple(encoded(photograph(name), "JPEG", quality=90, subsampling=subsampling) for name in PHOTOGRAPHS)


@pytest.fixture(params=["pillow", "torchvision", "dali", pytest.param("dali on a GPU", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("dali"):
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    if "GPU" in request.param and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def make(path: str, transform: Any, **options: Any) -> Preprocessor:
    device = "cuda" if "GPU" in path else "cpu"
    return make_preprocessor(
        transform, decoder=path.split(maxsplit=1)[0], device=device, **{"num_threads": 2, **options}
    )  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- promise


@pytest.mark.parametrize("subsampling", [0, 2], ids=["4:4:4", "4:2:0"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_photographs_agree_with_the_reference(path: str, name: str, subsampling: int) -> None:
    transform, blobs = timm_transform(name), photographs(subsampling)
    preprocessor = make(path, transform)
    batch = preprocessor(blobs)
    assert (batch.rows, batch.errors) == (list(range(len(blobs))), [None] * len(blobs))
    assert batch.pixels.dtype == torch.uint8
    spec = preprocessor.spec
    assert spec is not None
    expected = reference(transform, blobs)
    found = normalize(batch.pixels, spec).cpu()
    levels = (found - expected).mul(torch.tensor(spec.std).view(3, 1, 1)).abs() * 255
    if path == "pillow":
        assert torch.equal(found, expected)
    else:
        assert levels.mean() < 0.05
        # At a picture's rim DALI repeats the last pixel under the filter, where Pillow leaves the filter's end out.
        assert levels.max() < (3.5 if path == "torchvision" else 12.5)
    cosine = (embed(small_model(), found) * embed(small_model(), expected)).sum(1)
    assert cosine.min() > 0.9998


@pytest.mark.parametrize(
    "mistake", [{"interpolation": "bilinear"}, {"crop_pct": 0.88}, {"mean": (0.485, 0.456, 0.406)}]
)
def test_the_promise_is_broken_by_a_mistake(mistake: dict[str, Any]) -> None:
    blobs = photographs(0)
    wrong = create_transform(**{"input_size": (3, 160, 160), "crop_pct": 0.875, "mean": HALF, "std": HALF, **mistake})
    expected = reference(timm_transform("center"), blobs)
    cosine = (embed(small_model(), reference(wrong, blobs)) * embed(small_model(), expected)).sum(1)
    assert cosine.min() < 0.9998


# ------------------------------------------------------------------------------------------------------------ batches


def test_bad_pictures_cost_only_themselves(path: str) -> None:
    good = [encoded(picture(seed, 50 + seed, 40), "JPEG") for seed in range(4)]
    png = encoded(picture(9), "PNG")
    blobs = [good[0], b"", None, good[1], good[2][:400], b"<html>", png[: len(png) // 2], png, good[3]]
    preprocessor = make(path, SMALL)
    batch = preprocessor(blobs)
    assert batch.rows == [0, 3, 7, 8]
    categories = [reason and reason.split(":")[0] for reason in batch.errors]
    assert categories == [None, "empty", "missing", None, "truncated", "unknown", "truncated", None, None]
    assert batch.widths == [50, None, None, 51, None, None, None, 64, 53]
    assert batch.heights == [40, None, None, 40, None, None, None, 48, 40]
    assert batch.pixels.shape == (4, 3, 32, 32)
    for place, row in enumerate(batch.rows):
        alone = preprocessor([blobs[row]])
        assert torch.equal(batch.pixels[place], alone.pixels[0])


@pytest.mark.parametrize("blobs", [[], [None], [b"", None]])
def test_a_batch_may_have_no_pictures(path: str, blobs: list[bytes | None]) -> None:
    batch = make(path, SMALL)(blobs)
    assert batch.pixels.shape == (0, 3, 32, 32)
    assert (batch.rows, len(batch.errors)) == ([], len(blobs))
    assert normalize(batch.pixels, SMALL).shape == (0, 3, 32, 32)


def test_batches_of_any_size_in_any_order(path: str) -> None:
    blobs = [encoded(picture(seed, 60, 40 + seed), "JPEG") for seed in range(12)]
    preprocessor = make(path, SMALL)
    whole = preprocessor(blobs).pixels
    for start, end in [(0, 3), (3, 12), (5, 6)]:
        assert torch.equal(preprocessor(blobs[start:end]).pixels, whole[start:end])


def test_threads_change_nothing(path: str) -> None:
    blobs = [encoded(picture(seed, 80, 50 + seed), "JPEG") for seed in range(10)]
    expected = make(path, SMALL, num_threads=1)(blobs).pixels
    preprocessor = make(path, SMALL, num_threads=3)
    with ThreadPoolExecutor(4) as callers:
        for batch in callers.map(preprocessor, [blobs] * 8):
            assert torch.equal(batch.pixels, expected)


def test_the_decoders_threads_leave_torchs_number_alone(path: str) -> None:
    def number_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as one:
            return one.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)  # also what threads get that have not used torch yet
    try:
        make(path, SMALL)([encoded(picture(seed), "PNG") for seed in range(8)])
        assert (torch.get_num_threads(), number_of_a_new_thread()) == (3, 3)
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------- kinds of pictures


@pytest.mark.parametrize("crop", [(32, 32), (32, 24)], ids=["square", "oblong"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_pictures_embed_as_the_upright_one(path: str, orientation: int, crop: tuple[int, int]) -> None:
    spec = PreprocessSpec("shortest", (37, 37), crop, HALF, HALF)
    upright = picture(5, 70, 48)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    tags = Image.Exif()
    tags[274] = orientation
    batch = make(path, spec)([encoded(stored, "JPEG", quality=100, subsampling=0, exif=tags)])
    expected = make("pillow", spec)([encoded(upright, "PNG")]).pixels
    assert (batch.widths, batch.heights) == ([stored.width], [stored.height])
    difference = (batch.pixels.cpu().int() - expected.int()).abs()
    assert difference.max() <= 6  # what JPEG of quality 100 costs; a row or column beside costs 30 and more
    assert difference.float().mean() < 1


@pytest.mark.parametrize("size", [(20, 20), (20, 50), (51, 20), (31, 33)])
def test_small_pictures_are_padded(path: str, size: tuple[int, int]) -> None:
    spec = PreprocessSpec("ratio", (30, 30), (33, 36), HALF, HALF, fill=(9, 200, 30), longest=1.0)
    blob = encoded(picture(1, *size), "JPEG")
    batch = make(path, spec)([blob])
    expected = make("pillow", spec)([blob])
    assert (batch.pixels.cpu().int() - expected.pixels.int()).abs().max() <= 2
    assert batch.pixels[0, :, 0, 0].tolist() == [9, 200, 30]


def test_every_format_and_mode(path: str) -> None:
    image = picture(1)
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    ramp = Image.fromarray(np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64))
    blobs = [
        *(encoded(image, kind) for kind in ("PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF")),
        *(encoded(image.convert(mode)) for mode in ("L", "CMYK")),
        *(encoded(image, "JPEG", **options) for options in ({"progressive": True}, {"subsampling": 1})),
        encoded(alpha, "PNG"),
        encoded(ramp, "PNG"),
        encoded(image, "PNG", save_all=True, append_images=[picture(2)]),
        encoded(image.convert("P"), "PNG"),
    ]
    found, expected = make(path, SMALL)(blobs), make("pillow", SMALL)(blobs)
    assert found.errors == expected.errors == [None] * len(blobs)
    assert (found.pixels.cpu().int() - expected.pixels.int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((3000, 1), "bomb: 3000 x 1 pixels would be resized to 108000 x 36, more than max_pixels=100000"),
        ((400, 300), "bomb: 400 x 300 pixels, more than max_pixels=100000"),
    ],
)
def test_sizes_are_limited_before_and_after_resizing(path: str, size: tuple[int, int], reason: str) -> None:
    batch = make(path, SMALL, max_pixels=100_000)([encoded(Image.new("RGB", size), "JPEG")])
    assert batch.errors == [reason]


def test_a_side_may_not_vanish(path: str) -> None:
    spec = PreprocessSpec("ratio", (32, 32), (32, 32), HALF, HALF, longest=1.0)
    batch = make(path, spec)([encoded(Image.new("RGB", (3000, 1)), "PNG")])
    assert batch.errors == ["unsupported: 3000 x 1 pixels would be resized to 32 x 0"]


# --------------------------------------------------------------------------------------------------------- normalizing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize_is_to_tensor_and_normalize(dtype: torch.dtype) -> None:
    spec = PreprocessSpec("exact", (9, 9), (9, 9), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    values = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3), dtype=np.uint8)
    steps = tv.Compose([tv.ToTensor(), tv.Normalize(spec.mean, spec.std)])
    expected = torch.stack([steps(value) for value in values])
    found = normalize(torch.from_numpy(values).permute(0, 3, 1, 2), spec, dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)  # as decoders give pixels and models take them
    assert torch.equal(found, expected.to(dtype))


# --------------------------------------------------------------------------------------- transforms that do not convert


def test_other_transforms_run_as_they_are() -> None:
    transform = tv.Compose([tv.Resize((20, 30)), tv.Grayscale(3), tv.ToTensor(), tv.Normalize(HALF, HALF)])
    assert spec_from_transform(transform) is None
    blobs = [encoded(picture(1), "PNG"), b"", encoded(picture(2), "PNG")]
    preprocessor = make_preprocessor(transform, decoder="pillow", num_threads=2)
    batch = preprocessor(blobs)
    assert (batch.rows, batch.normalized, preprocessor.spec) == ([0, 2], True, None)
    assert batch.errors == [None, "empty: the file has no bytes", None]
    assert torch.equal(batch.pixels, torch.stack([transform(picture(1)), transform(picture(2))]))


def test_a_transform_that_fails_on_one_picture_costs_that_picture() -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        if image.width > 64:
            raise ZeroDivisionError("too wide")
        return torch.zeros(3, 4, 4)

    batch = PillowPreprocessor(transform)([encoded(picture(1)), encoded(picture(2, 65, 40))])
    assert batch.errors == [None, "transform: ZeroDivisionError: too wide"]
    assert batch.pixels.shape == (1, 3, 4, 4)
    assert PillowPreprocessor(transform)([None]).rows == []


@pytest.mark.parametrize(
    ("transform", "message"),
    [(tv.ToTensor(), "several shapes"), (lambda image: [image], "returns list, not a tensor")],
)
def test_a_transform_that_gives_no_batch_is_an_error(transform: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PillowPreprocessor(transform)([encoded(picture(1)), encoded(picture(2, 65, 40))])


# ------------------------------------------------------------------------------------------------------------- choosing


def test_the_decoder_is_chosen_by_name() -> None:
    assert type(make_preprocessor(SMALL)) is TorchvisionPreprocessor
    assert type(make_preprocessor(SMALL, decoder="pillow")) is PillowPreprocessor
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert type(make_preprocessor(SMALL, decoder="dali")) is DaliPreprocessor


@pytest.mark.parametrize("decoder", ["torchvision", "dali"])
@pytest.mark.parametrize(
    "transform",
    [
        tv.Compose([tv.Resize((32, 32)), tv.Grayscale(3), tv.ToTensor(), tv.Normalize(HALF, HALF)]),
        PreprocessSpec("exact", (32, 32), (32, 32), HALF, HALF, interpolation="lanczos"),
    ],
    ids=["a step", "a filter"],
)
def test_what_a_decoder_cannot_follow_is_run_with_pillow(
    transform: Any, decoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        preprocessor = make_preprocessor(transform, decoder=decoder)
    assert type(preprocessor) is PillowPreprocessor
    assert "cannot follow" in caplog.text
    assert preprocessor([encoded(picture(1))]).errors == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "opencv"}, "torchvision, dali, pillow"),
        ({"num_threads": 0}, "num_threads=0: must be at least 1"),
        ({"max_pixels": -1}, "max_pixels=-1: must be at least 1"),
    ],
)
def test_unusable_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_preprocessor(SMALL, **options)


def test_paths_refuse_a_filter_that_they_lack() -> None:
    spec = PreprocessSpec("exact", (32, 32), (32, 32), HALF, HALF, interpolation="lanczos")
    with pytest.raises(ArgumentError, match="use decoder='pillow'"):
        TorchvisionPreprocessor(spec)
    with pytest.raises(ArgumentError, match="use decoder='pillow'"):
        DaliPreprocessor(spec)
    with pytest.raises(ArgumentError, match="'cpu', 'cuda' or 'cuda:N'"):
        DaliPreprocessor(SMALL, device="tpu")


def test_missing_dali_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingDependencyError, match=r"pip install nemo-image\[image_cuda12\]"):
        make_preprocessor(SMALL, decoder="dali")


# ---------------------------------------------------------------------------------------------------------------- DALI


def damaged_tables(data: bytes) -> bytes:
    """Empty the first Huffman table: the header stays plain, and no decoder can go on."""
    start = data.index(b"\xff\xc4")
    assert start < scan_jpeg(data).start
    return data[: start + 5] + bytes([255] * 16) + data[start + 21 :]


def test_a_refused_batch_is_decoded_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    good = [encoded(picture(seed, 60, 45 + seed)) for seed in range(5)]
    bad = damaged_tables(good[1])
    assert read_header(bad).plain_jpeg
    preprocessor = DaliPreprocessor(SMALL, num_threads=2)
    expected = preprocessor(good)
    with caplog.at_level(logging.WARNING):
        batch = preprocessor([*good[:2], bad, *good[2:]])
    assert "DALI refused a batch of 6 pictures" in caplog.text
    assert batch.rows == [0, 1, 3, 4, 5]
    assert batch.errors[2] is not None
    assert batch.errors[2].startswith("corrupt: ")
    assert (batch.pixels.int() - expected.pixels.int()).abs().max() <= 2
    again: PreprocessedBatch = preprocessor(good)  # on a graph that is built anew
    assert torch.equal(again.pixels, expected.pixels)


def test_dali_is_given_plain_jpegs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    plain = [encoded(picture(1)), encoded(picture(2).convert("L"))]
    others = [encoded(picture(3).convert("CMYK")), encoded(picture(4), "PNG"), plain[0][:-2], plain[0][:60]]
    preprocessor = DaliPreprocessor(SMALL, num_threads=2)
    seen, run = [], preprocessor._graph.run

    def spy(jobs: Any) -> Any:
        seen.extend(blob for blob, _, _ in jobs)
        return run(jobs)

    monkeypatch.setattr(preprocessor._graph, "run", spy)
    batch = preprocessor([*others, *plain])
    assert seen == plain
    assert batch.rows == [0, 1, 4, 5]
    assert decode_rgb(others[0])[0].mode == "CMYK"
