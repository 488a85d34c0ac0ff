"""What the filters of `nemo_image.filters` say of one image, for the stages that keep images by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from nemo_image import schema
from nemo_image.filters.caption_stats import LANGUAGES, LENGTHS, caption_language, caption_lengths
from nemo_image.filters.image_quality import QUALITIES
from nemo_image.filters.image_size import SIZES, with_ratio
from nemo_image.filters.luma import laplacian_variance, luma_of, mean_luma
from nemo_image.stages.image_object import ImageObject

MEASURES: dict[str, pa.DataType] = {
    name: pa.type_for_alias(kind) for name, kind in {**SIZES, **QUALITIES, **LENGTHS, **LANGUAGES}.items()
}
"""The columns that can be made of one image, and their types."""

_NEEDS = ((SIZES, "width"), (QUALITIES, "image_data"), (LENGTHS, "caption"), (LANGUAGES, "caption"))


def measure(image: ImageObject, names: Iterable[str]) -> dict[str, Any]:
    """Return those of an image's measures that are asked for; None for what it has not.

    Raises
    ------
    ImageError
        If its pixels are needed and cannot be decoded; from then on ``image_error`` says why.
    """
    wanted = set(names)
    found: dict[str, Any] = {}
    if wanted & SIZES.keys():
        size = image.stored_size()
        found |= dict.fromkeys(SIZES) if size is None else dict(zip(SIZES, with_ratio(*size), strict=True))
    if wanted & QUALITIES.keys():
        pixels = image.image_data
        luma = None if pixels is None else luma_of(pixels)
        values = (None, None) if luma is None else (laplacian_variance(luma), mean_luma(luma))
        found |= dict(zip(QUALITIES, values, strict=True))
    if wanted & LENGTHS.keys():
        found |= dict(zip(LENGTHS, caption_lengths(image.caption or ""), strict=True))
    if wanted & LANGUAGES.keys():
        found |= dict(zip(LANGUAGES, caption_language(image.caption or ""), strict=True))
    return {name: _as_column(value) for name, value in found.items() if name in wanted}


def _as_column(value: Any) -> Any:
    """Return a number as the filters' columns of float32 hold it."""
    return float(np.float32(value)) if isinstance(value, float) else value


def needs(names: Iterable[str]) -> list[str]:
    """Return the attributes of an image that measures are made of."""
    wanted = set(names)
    made_of = [attribute for columns, attribute in _NEEDS if wanted & columns.keys()]
    return list(dict.fromkeys([*made_of, *([schema.HEIGHT] if schema.WIDTH in made_of else [])]))
