"""The compiled resize: equal to torchvision's to the last bit, inside its memory, and dispensable."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize as torchvision_resize

import nemo_image.embedders.preprocess
from nemo_image.embedders.preprocess import PreprocessSpec, TorchvisionPreprocessor, resize
from nemo_image.embedders.preprocess.batch import empty_pixels
from nemo_image.embedders.preprocess.resize import resize_into, resizer
from tests.images import PHOTOGRAPHS, photograph
from tests.makers import encoded, picture

Pixels = npt.NDArray[np.uint8]

compiled = resize._compiled
needs_it = pytest.mark.skipif(compiled is None, reason="the extension is not built: there was no C compiler")
SPEC = PreprocessSpec("shortest", (64, 64), (64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

levels = range(1 + (0 if compiled is None else compiled.LEVEL))

side = st.integers(1, 40) | st.integers(1, 400)
share = st.floats(0, 1)


def noise(seed: int, height: int, width: int) -> Pixels:
    """Pixels of which a third are black and a third white: the filters overshoot."""
    drawn = np.random.default_rng(seed).integers(-255, 511, (height, width, 3))
    return drawn.clip(0, 255).astype(np.uint8)


def whole(pixels: Pixels, height: int, width: int, bicubic: bool) -> Pixels:
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    made = torchvision_resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1), [height, width], mode, antialias=True)
    found: Pixels = made.permute(1, 2, 0).numpy()
    return found


def axes(shape: tuple[int, ...], size: tuple[int, int], box: tuple[int, int, int, int], bicubic: bool) -> Any:
    assert compiled is not None
    across = compiled.axis(shape[1], size[1], box[1], box[3], bicubic, True)
    return across, compiled.axis(shape[0], size[0], box[0], box[2], bicubic, False)


def window(pixels: Pixels, size: tuple[int, int], box: tuple[int, int, int, int], bicubic: bool, level: int) -> Pixels:
    """Resize with the extension, and check that nothing is written around the window."""
    assert compiled is not None
    height, width = box[2:]
    paper = np.full((height + 2, width + 2, 3), 77, np.uint8)
    made = paper[1:-1, 1:-1]
    compiled.resize(pixels, made, *axes(pixels.shape, size, box, bicubic), level)
    rim = paper.copy()
    rim[1:-1, 1:-1] = 77
    assert (rim == 77).all()
    return made


# ----------------------------------------------------------------------------------------------------------- equality


@needs_it
@settings(max_examples=300, deadline=None)
@given(side, side, side, side, st.tuples(share, share, share, share), st.booleans(), st.integers(0, 9))
@example(480, 640, 224, 298, (0.0, 0.5, 1.0, 0.75), True, 0)  # a photograph's window
@example(1, 1, 7, 9, (0.0, 0.0, 1.0, 1.0), True, 0)
@example(400, 3, 1, 1, (0.0, 0.0, 1.0, 1.0), False, 0)
def test_any_window_of_any_size_is_torchvisions(
    height: int,
    width: int,
    resized_h: int,
    resized_w: int,
    shares: tuple[float, float, float, float],
    bicubic: bool,
    seed: int,
) -> None:
    crop_h, crop_w = 1 + int(shares[2] * (resized_h - 1)), 1 + int(shares[3] * (resized_w - 1))
    top, left = int(shares[0] * (resized_h - crop_h)), int(shares[1] * (resized_w - crop_w))
    pixels = noise(seed, height, width)
    expected = whole(pixels, resized_h, resized_w, bicubic)[top : top + crop_h, left : left + crop_w]
    for level in levels:
        made = window(pixels, (resized_h, resized_w), (top, left, crop_h, crop_w), bicubic, level)
        assert np.array_equal(made, expected), level


@needs_it
@pytest.mark.parametrize("level", levels)
def test_lines_of_many_pixels(level: int) -> None:
    for shape, size in (((2, 70_000), (2, 50)), ((70_000, 2), (50, 2)), ((1, 40), (1, 70_000))):
        pixels = noise(1, *shape)
        made = window(pixels, size, (0, 0, *size), True, level)
        assert np.array_equal(made, whole(pixels, *size, True)), (shape, size)


@needs_it
@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("filter_", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_photographs_are_within_one_of_pillows(name: str, filter_: Image.Resampling) -> None:
    image = photograph(name)
    expected = np.asarray(image.resize((100, 75), filter_), int)
    made = window(np.asarray(image), (75, 100), (0, 0, 75, 100), filter_ is Image.Resampling.BICUBIC, levels[-1])
    assert np.abs(made - expected).max() <= 1


@needs_it
def test_any_layout_of_pictures_and_batches() -> None:
    pixels = noise(2, 90, 131)
    turned = torch.from_numpy(pixels).permute(2, 0, 1)
    layouts = [
        turned,
        turned.contiguous(),
        turned.transpose(1, 2).contiguous().transpose(1, 2),
        torch.from_numpy(np.pad(pixels, ((3, 1), (2, 5), (0, 0)))).permute(2, 0, 1)[:, 3:-1, 2:-5],
    ]
    plan = SPEC.plan(131, 90)
    expected = whole(pixels, plan.resize_h, plan.resize_w, True)[:, plan.crop_left : plan.crop_left + 64]
    for layout in layouts:
        for out in (empty_pixels(1, SPEC)[0], torch.empty(3, 64, 64, dtype=torch.uint8)):
            resize_into(layout, plan, SPEC, out)
            assert np.array_equal(out.permute(1, 2, 0).numpy(), expected)


@needs_it
def test_threads_do_not_meet() -> None:
    jobs = [(noise(seed, 150 + 9 * seed, 90 + 20 * seed), (40 + seed, 70 - seed)) for seed in range(8)] * 12
    expected = [whole(pixels, *size, True) for pixels, size in jobs[:8]] * 12
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda job: window(job[0], job[1], (0, 0, *job[1]), True, levels[-1]), jobs))
    assert all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------- arguments

GOOD = np.zeros((5, 6, 3), np.uint8)


@needs_it
@pytest.mark.parametrize(
    "bad",
    [
        GOOD.astype(np.int16),
        GOOD[..., :2],
        GOOD[0],
        GOOD[:0],
        GOOD[::-1],
        GOOD[:, ::2],
        GOOD[..., ::-1],
        np.zeros((3, 5, 6), np.uint8).transpose(1, 2, 0),
        np.broadcast_to(GOOD[:1], (5, 6, 3)),
    ],
    ids=["16 bits", "2 channels", "2 axes", "empty", "upside down", "gaps", "BGR", "planes", "one row again and again"],
)
def test_other_memory_is_refused(bad: Any) -> None:
    assert compiled is not None
    with pytest.raises(ValueError, match=r"source must be uint8 \[height, width, 3\]"):
        compiled.resize(bad, GOOD.copy(), *axes(GOOD.shape, (5, 6), (0, 0, 5, 6), True), 0)
    if bad.flags.writeable:
        with pytest.raises(ValueError, match=r"target must be uint8 \[height, width, 3\]"):
            compiled.resize(GOOD, bad, *axes(GOOD.shape, (5, 6), (0, 0, 5, 6), True), 0)


@needs_it
def test_memory_that_must_not_be_written_is_refused() -> None:
    assert compiled is not None
    fixed = GOOD.copy()
    fixed.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        compiled.resize(GOOD, fixed, *axes(GOOD.shape, (5, 6), (0, 0, 5, 6), True), 0)
    with pytest.raises(TypeError):
        compiled.resize(3, GOOD.copy(), *axes(GOOD.shape, (5, 6), (0, 0, 5, 6), True), 0)


@needs_it
@pytest.mark.parametrize(
    "numbers",
    [
        (0, 6, 0, 0),
        (5, -1, 0, 0),
        (4, 6, 0, 0),
        (5, 5, 0, 0),
        (5, 6, 1, 0),
        (5, 6, 0, 1),
        (5, 6, -1, 0),
        (5, 6, 0, -1),
        (2**40, 6, 0, 0),
        (5, 2**62, 2**61, 2**61),
        (9, 9, 2**63 - 1, 0),
    ],
)
def test_a_window_beyond_the_picture_is_refused(numbers: tuple[int, int, int, int]) -> None:
    height, width, top, left = numbers
    with pytest.raises(ValueError, match="the window must lie inside the resized picture"):
        axes(GOOD.shape, (height, width), (top, left, 5, 6), True)


@needs_it
def test_axes_of_other_pictures_are_refused() -> None:
    assert compiled is not None
    across, down = axes(GOOD.shape, (5, 6), (0, 0, 5, 6), True)
    others = [axes(*sizes, True) for sizes in (((5, 7), (5, 6), (0, 0, 5, 6)), ((5, 6), (5, 6), (0, 0, 5, 5)))]
    others += [(across, axes((4, 6), (5, 6), (0, 0, 5, 6), True)[1]), (down, down), (across, across), (down, across)]
    others += [(across, axes((5, 6), (5, 6), (0, 0, 4, 6), True)[1])]
    for pair in others:
        with pytest.raises(ValueError, match="the axes must be those of source and target"):
            compiled.resize(GOOD, GOOD.copy(), *pair, 0)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        compiled.resize(GOOD, GOOD.copy(), None, down, 0)


@needs_it
def test_weights_are_kept_but_not_those_of_large_pictures() -> None:
    resize._kept_axis.cache_clear()
    for pixels in (noise(1, 60, 70), noise(2, 60, 70), noise(3, 60, resize.LONGEST_KEPT + 1)):
        plan, out = SPEC.plan(pixels.shape[1], 60), empty_pixels(1, SPEC)[0]
        resize_into(torch.from_numpy(pixels).permute(2, 0, 1), plan, SPEC, out)
        expected = whole(pixels, plan.resize_h, plan.resize_w, True)[:, plan.crop_left : plan.crop_left + 64]
        assert np.array_equal(out.permute(1, 2, 0).numpy(), expected)
    kept = resize._kept_axis.cache_info()
    assert (kept.hits, kept.currsize) == (2 + 1, 2)


# ------------------------------------------------------------------------------------------------------- doing without


def test_without_the_extension_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(131, 90), (64, 64), (40, 70), (20, 31)]
    blobs = [encoded(picture(seed, *size), "JPEG") for seed, size in enumerate(sizes)]
    preprocessor = TorchvisionPreprocessor(
        PreprocessSpec("ratio", (50, 50), (64, 60), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    )
    before = preprocessor(blobs).pixels
    monkeypatch.setattr(resize, "_compiled", None)
    assert resizer() == "torch"
    assert torch.equal(preprocessor(blobs).pixels, before)


def test_the_extension_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nemo_image.embedders.preprocess, "_resize", raising=False)
    monkeypatch.setitem(sys.modules, "nemo_image.embedders.preprocess._resize", None)
    spec = importlib.util.spec_from_file_location("imported_again", resize.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.resizer() == "torch"


@needs_it
def test_the_processor_decides() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    best = "avx512" if {"avx2", "avx512bw", "avx512_vnni"} <= flags else "avx2" if "avx2" in flags else "portable"
    assert resizer() == best


@needs_it
def test_a_level_that_does_not_run_here_is_the_best_that_does() -> None:
    pixels = noise(3, 90, 131)
    for level in (-1, levels[-1] + 1, 2**31 - 1):
        made = window(pixels, (40, 60), (0, 0, 40, 60), True, level)
        assert np.array_equal(made, whole(pixels, 40, 60, True))


# -------------------------------------------------------------------------------------------------------------- memory


def test_a_batch_keeps_its_memory_as_long_as_anybody_looks() -> None:
    blobs = [encoded(picture(seed, 80, 70), "JPEG") for seed in range(6)]
    others = [encoded(picture(seed + 50, 80, 70), "JPEG") for seed in range(6)]
    preprocessor = TorchvisionPreprocessor(SPEC, 2)
    kept = preprocessor(blobs).pixels[2:3, 1]
    expected, place = kept.clone(), kept.data_ptr()
    for _ in range(6):
        preprocessor(others)
    assert torch.equal(kept, expected)
    del kept
    # Now it may be filled again, by a batch of this size.
    places = {batch.pixels[2:3, 1].data_ptr() for batch in [preprocessor(others) for _ in range(6)]}
    assert place in places
