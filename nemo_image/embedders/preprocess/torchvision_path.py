"""Preprocessing on the CPU with torchvision's uint8 operators: decode, antialiased resize, crop, in threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_image.embedders.preprocess.batch import (
    PreprocessedBatch,
    collect,
    empty_pixels,
    plan_picture,
    preprocess_each,
)
from nemo_image.embedders.preprocess.spec import PreprocessSpec, ResizePlan
from nemo_image.errors import ArgumentError
from nemo_image.shards.decode import MAX_PIXELS, ImageHeader, decode_rgb

INTERPOLATIONS = frozenset({"bilinear", "bicubic"})
"""Filters that torch's antialiased uint8 resize has, in every version that we run with."""


class TorchvisionPreprocessor:
    """Preprocess pictures with torchvision's decoder and uint8 resize.

    Parameters
    ----------
    spec : PreprocessSpec
        Its interpolation must be bilinear or bicubic.
    num_threads : int
        Pictures that are decoded at the same time.
    max_pixels : int
        Largest picture, before and after it is resized.

    Raises
    ------
    ArgumentError
        If torch has no antialiased uint8 resize with the spec's interpolation.
    """

    def __init__(self, spec: PreprocessSpec, num_threads: int = 4, max_pixels: int = MAX_PIXELS) -> None:
        if spec.interpolation not in INTERPOLATIONS:
            raise ArgumentError(
                f"decoder='torchvision' cannot resize with {spec.interpolation!r}: use decoder='pillow'"
            )
        self.spec: PreprocessSpec = spec
        self.num_threads = num_threads
        self.max_pixels = max_pixels

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture."""
        pixels = empty_pixels(len(blobs), self.spec)

        def preprocess(row: int, blob: bytes) -> ImageHeader:
            header, picture = decode_rgb(blob, max_pixels=self.max_pixels)
            plan = plan_picture(self.spec, header, self.max_pixels)
            resize_into(picture, plan, self.spec, pixels[row])
            return header

        return collect(pixels, preprocess_each(blobs, preprocess, self.num_threads))


def resize_into(picture: torch.Tensor, plan: ResizePlan, spec: PreprocessSpec, out: torch.Tensor) -> None:
    """Resize and crop an upright picture, uint8 [3, height, width], into [3, crop height, crop width]."""
    _write_window(_resize(picture, plan, spec.interpolation), plan, spec.fill, out)


def _resize(picture: torch.Tensor, plan: ResizePlan, interpolation: str) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    # uint8 and channels last stay: torch's fast path, and within one of 255 of Pillow's.
    size = [plan.resize_h, plan.resize_w]
    resized: torch.Tensor = resize(picture, size, interpolation=InterpolationMode(interpolation), antialias=True)
    return resized


def _write_window(picture: torch.Tensor, plan: ResizePlan, fill: tuple[int, int, int], out: torch.Tensor) -> None:
    """Copy the plan's window of a resized [3, h, w] picture into [3, crop_h, crop_w]."""
    left, top = plan.crop_left, plan.crop_top
    window = picture[:, max(top, 0) : top + plan.crop_h, max(left, 0) : left + plan.crop_w]
    if not plan.needs_padding:
        out.copy_(window)
        return
    out.copy_(torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).expand_as(out))
    x, y = max(-left, 0), max(-top, 0)
    out[:, y : y + window.shape[1], x : x + window.shape[2]].copy_(window)
