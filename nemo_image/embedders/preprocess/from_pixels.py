"""A model's input from pixels that somebody else has decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from nemo_image.embedders.preprocess.batch import PreprocessedBatch, collect, empty_pixels, plan_picture
from nemo_image.embedders.preprocess.convert import spec_from_transform
from nemo_image.embedders.preprocess.resize import INTERPOLATIONS, resize_into
from nemo_image.embedders.preprocess.spec import PreprocessSpec
from nemo_image.errors import ImageError
from nemo_image.shards.decode import MAX_PIXELS, ImageHeader


def preprocess_pixels(
    transform: Callable[..., Any], pictures: Sequence[npt.NDArray[np.uint8]], max_pixels: int = MAX_PIXELS
) -> PreprocessedBatch:
    """Do what a model's evaluation transform does, from the resize on: torchvision's, or Pillow's where it must be.

    Parameters
    ----------
    transform : callable
        The model's evaluation transform.
    pictures : sequence of ndarray of uint8, shape (height, width, 3)
        Upright RGB.
    max_pixels : int
        Largest resized picture.
    """
    spec = spec_from_transform(transform)
    if spec is None or spec.interpolation not in INTERPOLATIONS:
        tensors = [transform(Image.fromarray(np.ascontiguousarray(picture))) for picture in pictures]
        stacked = torch.stack(tensors) if tensors else torch.empty(0)
        return collect(stacked, [_header(picture) for picture in pictures], normalized=True)
    pixels = empty_pixels(len(pictures), spec)
    outcomes = [_preprocess(picture, spec, out, max_pixels) for picture, out in zip(pictures, pixels, strict=True)]
    return collect(pixels, outcomes)


def _preprocess(
    picture: npt.NDArray[np.uint8], spec: PreprocessSpec, out: torch.Tensor, max_pixels: int
) -> ImageHeader | ImageError:
    header = _header(picture)
    try:
        plan = plan_picture(spec, header, max_pixels)
    except ImageError as error:
        return error.with_traceback(None)
    # torch warns of memory that it must not write to.
    owned = picture if picture.flags.writeable else picture.copy()
    resize_into(torch.from_numpy(owned).permute(2, 0, 1), plan, spec, out)
    return header


def _header(picture: npt.NDArray[np.uint8]) -> ImageHeader:
    height, width = picture.shape[:2]
    return ImageHeader("", width, height, 1, "RGB")
