"""Every pixel mode against numpy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_image.shards.pixels import to_rgb
from tests.makers import picture


def rgb_of(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    converted = to_rgb(image)
    assert (converted.mode, converted.size) == ("RGB", image.size)
    return np.asarray(converted)


def over_white(colour: Any, alpha: Any) -> Any:
    """Exact, in float64; ties cannot occur: 255 is odd."""
    share = np.asarray(alpha, np.float64) / 255
    return np.rint(np.asarray(colour, np.float64) * share + 255 * (1 - share)).astype(np.uint8)


@pytest.fixture
def values() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (31, 17, 4), dtype=np.uint8)


def test_rgb_is_left_alone() -> None:
    image = picture(1)
    assert to_rgb(image) is image


def test_grey_and_bilevel(values: Any) -> None:
    grey = values[..., 0]
    assert (rgb_of(Image.fromarray(grey)) == grey[..., None]).all()
    bits = grey > 127
    assert (rgb_of(Image.fromarray(bits)) == np.where(bits, 255, 0)[..., None]).all()


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert rgb_of(image).tolist() == [[[200, 100, 50], [10, 20, 30]]]


def test_alpha_over_white(values: Any) -> None:
    expected = over_white(values[..., :3], values[..., 3:])
    assert (rgb_of(Image.fromarray(values)) == expected).all()
    grey = over_white(values[..., :1], values[..., 1:2])
    assert (rgb_of(Image.fromarray(values[..., :2].copy())) == grey).all()


def test_palette_with_alpha_channel(values: Any) -> None:
    palette, alpha = values[..., 0] % 2, values[..., 3]
    image = Image.frombytes("PA", (17, 31), np.stack([palette, alpha], axis=-1).tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50])
    colours = np.array([[10, 20, 30], [200, 100, 50]])
    assert (rgb_of(image) == over_white(colours[palette], alpha[..., None])).all()


def test_premultiplied_alpha(values: Any) -> None:
    alpha = values[..., 3:]
    stored = np.concatenate([np.minimum(values[..., :3], alpha), alpha], axis=-1)
    expected = stored[..., :3] + (255 - alpha)
    image = Image.frombytes("RGBa", (17, 31), stored.tobytes())
    assert (rgb_of(image) == expected).all()
    grey = Image.frombytes("La", (17, 31), stored[..., [0, 3]].tobytes())
    assert (rgb_of(grey) == expected[..., :1]).all()


def test_transparent_colour() -> None:
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    grey.info["transparency"] = 7
    assert rgb_of(grey).tolist() == [[[255] * 3, [8] * 3]]
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    colour.info["transparency"] = (1, 2, 3)
    assert rgb_of(colour).tolist() == [[[255] * 3, [1, 2, 4]]]
    bits = Image.fromarray(np.array([[True, False]]))
    bits.info["transparency"] = 0
    assert rgb_of(bits).tolist() == [[[255] * 3, [255] * 3]]


def test_transparent_palette_entries() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.putdata([0, 1, 2])
    image.info["transparency"] = bytes([255, 0, 128])
    assert rgb_of(image).tolist() == [[[10, 20, 30], [255] * 3, over_white([0] * 3, 128).tolist()]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str) -> None:
    stored = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (7, 1), stored.astype(order).tobytes())
    expected = np.rint(stored / 257)
    assert expected.max() == 255
    assert (rgb_of(image)[0, :, 0] == expected).all()


def test_sixteen_bits_with_a_transparent_value() -> None:
    image = Image.fromarray(np.array([[1000, 1001]], np.uint16))
    image.info["transparency"] = 1001
    assert rgb_of(image)[0, :, 0].tolist() == [round(1000 / 257), 255]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([-5, 0, 257, 65535], [0, 0, 1, 255]),
        ([-5, 0, 2**30, 2**31 - 1], [0, 0, 128, 255]),
    ],
)
def test_integers(stored: list[int], expected: list[int]) -> None:
    assert rgb_of(Image.fromarray(np.array([stored], np.int32)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([-1.0, 0.0, 0.5, 1.0, np.nan], [0, 0, 128, 255, 0]),
        ([-1.0, 0.4, 100.0, 300.0, np.inf], [0, 0, 100, 255, 255]),
        ([-np.inf, 0.2, 0.4, 0.6, 0.8], [0, 51, 102, 153, 204]),
    ],
)
def test_floats(stored: list[float], expected: list[int]) -> None:
    assert rgb_of(Image.fromarray(np.array([stored], np.float32)))[0, :, 0].tolist() == expected


def test_cmyk() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [51, 102, 0, 51]]], np.uint8)
    colours = rgb_of(Image.frombytes("CMYK", (4, 1), inks.tobytes()))[0].tolist()
    # (1 - ink)(1 - black), in parts of 255
    assert colours == [[255] * 3, [0, 255, 255], [0, 0, 0], [163, 122, 204]]


def test_video_and_hue_colours() -> None:
    assert rgb_of(Image.new("YCbCr", (1, 1), (76, 85, 255)))[0, 0].tolist() == pytest.approx([254, 0, 0], abs=1)
    assert rgb_of(Image.new("HSV", (1, 1), (85, 255, 255)))[0, 0].tolist() == [0, 255, 0]


def test_lab() -> None:
    white, grey = rgb_of(Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 137, 0, 0])))[0].tolist()
    assert min(white) >= 254
    # L* = 137 / 2.55 = 53.7: (L* + 16) / 116 cubed is a luminance of 0.218, which sRGB's curve encodes as 128
    assert grey == pytest.approx([128] * 3, abs=3)


def test_rgbx_drops_its_fourth_channel(values: Any) -> None:
    assert (rgb_of(Image.frombytes("RGBX", (17, 31), values.tobytes())) == values[..., :3]).all()


def test_no_mode_that_an_image_can_have_is_forgotten() -> None:
    modes = ["1", "L", "La", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in [*modes, "I;16", "I;16L", "I;16B", "I;16N"]:
            assert rgb_of(Image.new(mode, (1, 3))).shape == (3, 1, 3)
