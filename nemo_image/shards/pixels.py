"""Pillow's pixel modes as 8-bit RGB.

=============================== ==================================================================================
mode                            rule
=============================== ==================================================================================
RGB                             as it is
1, L, P, RGBX, CMYK, YCbCr, HSV Pillow's own conversion
LAB                             Pillow's, through LittleCMS: D50 Lab to sRGB
alpha (LA, RGBA, PA, RGBa, La)  over white: ``colour * alpha + white * (1 - alpha)``, rounded
tRNS in 1, L, P, RGB, I;16      the colour (or palette entry) that it names is transparent: over white
I;16, I;16L, I;16B, I;16N       divided by 257 and rounded, so that 65535 is white (Pillow itself clips at 255)
I                               as I;16 if no value is above 65535, else the range is taken as 0 to 2³¹ − 1
F                               0 to 1 if no value is above 1, else 0 to 255; NaN is black
=============================== ==================================================================================

Values outside a range are clipped. Colour profiles are not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB, alpha over white.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode that Pillow can open. ``info["transparency"]`` is honoured, on the scale of the pixels.

    Returns
    -------
    PIL.Image.Image
        Mode ``RGB``, the same size; the picture itself where there is nothing to convert.

    Raises
    ------
    ValueError
        If Pillow knows no conversion from the mode.
    """
    rule = _RULES.get(image.mode)
    if rule is not None:
        return rule(image)
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(rgba: Image.Image) -> Image.Image:
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _grey(values: npt.NDArray[Any]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _from_uint16(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = _divided_by_257(values)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return _grey(grey)


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.asarray(image).clip(0)
    if values.max(initial=0) <= 65535:
        return _grey(_divided_by_257(values))
    return _grey(np.rint(values * (255 / (2**31 - 1))))


def _divided_by_257(values: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    return (values.astype(np.uint32) + 128) // 257  # 65535 = 255 · 257, and + 128 rounds to the nearest


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0.0)  # infinities become huge and are clipped below
    white = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    return _grey(np.rint(values.clip(0.0, white) * (255.0 / white)))


def _from_premultiplied(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint16)
    colour = np.minimum(values[..., :-1] + (255 - values[..., -1:]), 255).astype(np.uint8)
    return Image.fromarray(colour if colour.shape[-1] == 3 else colour[..., 0]).convert("RGB")


_RULES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "I": _from_integers,
    "F": _from_floats,
    "RGBa": _from_premultiplied,
    "La": _from_premultiplied,
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), _from_uint16),
}
