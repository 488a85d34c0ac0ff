"""The window's own resize against torchvision's whole one, and JPEGs decoded at part of their size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nemo_image.embedders.preprocess import PreprocessSpec, ResizePlan, TorchvisionPreprocessor, make_preprocessor
from nemo_image.embedders.preprocess.resize import resize_into
from nemo_image.errors import ArgumentError
from nemo_image.shards.decode import decode_rgb
from tests.makers import encoded, picture

SPEC = PreprocessSpec("shortest", (64, 64), (64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_window_is_what_the_whole_resize_gives(interpolation: Any) -> None:
    rng = np.random.default_rng(3)
    # A window that ends where the picture did: the operator would leave that side as it is.
    cases = [(401, 67, 75, 122, 123, 11), (640, 480, 298, 224, 224, 224), (50, 50, 50, 50, 50, 50)]
    cases += [tuple(int(one) for one in rng.integers(1, (900, 700, 400, 400, 300, 300))) for _ in range(60)]
    for width, height, resize_w, resize_h, crop_w, crop_h in cases:
        left, top = round((resize_w - crop_w) / 2), round((resize_h - crop_h) / 2)
        pixels = torch.from_numpy(rng.integers(0, 256, (height, width, 3), np.uint8)).permute(2, 0, 1)
        plan = ResizePlan(resize_w, resize_h, left, top, crop_w, crop_h)
        spec = PreprocessSpec("exact", (resize_h, resize_w), (crop_h, crop_w), (0, 0, 0), (1, 1, 1), interpolation)
        made = torch.empty(3, crop_h, crop_w, dtype=torch.uint8)
        resize_into(pixels, plan, spec, made)

        mode = InterpolationMode(interpolation)
        whole = resize(pixels, [resize_h, resize_w], interpolation=mode, antialias=True)
        expected = torch.zeros(3, crop_h, crop_w, dtype=torch.uint8)
        window = whole[:, max(top, 0) : top + crop_h, max(left, 0) : left + crop_w]
        y, x = max(-top, 0), max(-left, 0)
        expected[:, y : y + window.shape[1], x : x + window.shape[2]] = window
        assert torch.equal(made, expected), (width, height, plan)


@pytest.mark.parametrize(
    ("size", "smallest", "scale"),
    [
        ((640, 480), (320, 240), 2),
        ((640, 480), (321, 240), 1),
        ((641, 481), (80, 60), 8),
        ((641, 481), (10, 10), 8),
        ((500, 375), (125, 93), 4),
        ((500, 375), (10, 188), 1),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_size_that_is_asked_for(
    size: tuple[int, int], smallest: tuple[int, int], scale: int
) -> None:
    data = encoded(picture(3, *size), "JPEG", quality=95)
    header, pixels = decode_rgb(data, smallest=lambda _: smallest)
    assert (header.width, header.height) == size
    assert tuple(pixels.shape[:0:-1]) == tuple(-(-side // scale) for side in size)
    # What a scaled DCT gives is near the means of squares of that many pixels.
    full = Image.open(io.BytesIO(data)).reduce(scale)
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(full, int))
    assert difference.mean() < 3


def test_what_is_no_plain_jpeg_is_decoded_whole() -> None:
    for data in (encoded(picture(3, 80, 60), "PNG"), encoded(picture(3, 80, 60).convert("CMYK"), "JPEG")):
        _, pixels = decode_rgb(data, smallest=lambda _: (10, 10))
        assert torch.equal(pixels, decode_rgb(data)[1])


@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_reduced_pictures_stay_close_and_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(5, 600, 400), "JPEG", quality=95, exif=exif)
    whole, reduced = (TorchvisionPreprocessor(SPEC, reduced_decode=reduced)([data]) for reduced in (False, True))
    assert (reduced.widths, reduced.heights) == ([600], [400])
    assert not torch.equal(whole.pixels, reduced.pixels)
    difference = (whole.pixels.int() - reduced.pixels.int()).abs().float()
    assert difference.mean() < 2


def test_pictures_less_than_four_times_as_large_are_not_reduced() -> None:
    data = encoded(picture(5, 255, 255), "JPEG")
    whole, reduced = (TorchvisionPreprocessor(SPEC, reduced_decode=reduced)([data]) for reduced in (False, True))
    assert torch.equal(whole.pixels, reduced.pixels)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_only_torchvisions_decoder_reduces(decoder: Any) -> None:
    with pytest.raises(ArgumentError, match="reduced_decode=True works with decoder='torchvision' alone"):
        make_preprocessor(SPEC, decoder, reduced_decode=True)
