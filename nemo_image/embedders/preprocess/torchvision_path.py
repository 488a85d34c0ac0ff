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

OPERATORS = {"bilinear": "_upsample_bilinear2d_aa", "bicubic": "_upsample_bicubic2d_aa"}
INTERPOLATIONS = frozenset(OPERATORS)
"""Filters that torch's antialiased uint8 resize has, in every version that we run with."""

REDUCED_MARGIN = 2
"""A reduced picture is at least so many times as large as what it is resized to: at 1, cosines fall below 0.99."""


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
    reduced_decode : bool
        Let libjpeg decode at 1/2, 1/4 or 1/8 of the size (a scaled inverse DCT) where the picture is then still twice
        as large as what it is resized to.

    Raises
    ------
    ArgumentError
        If torch has no antialiased uint8 resize with the spec's interpolation.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        num_threads: int = 4,
        max_pixels: int = MAX_PIXELS,
        *,
        reduced_decode: bool = False,
    ) -> None:
        if spec.interpolation not in INTERPOLATIONS:
            raise ArgumentError(
                f"decoder='torchvision' cannot resize with {spec.interpolation!r}: use decoder='pillow'"
            )
        self.spec: PreprocessSpec = spec
        self.num_threads = num_threads
        self.max_pixels = max_pixels
        self.reduced_decode = reduced_decode

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture."""
        pixels = empty_pixels(len(blobs), self.spec)

        def preprocess(row: int, blob: bytes) -> ImageHeader:
            smallest = self._smallest if self.reduced_decode else None
            header, picture = decode_rgb(blob, max_pixels=self.max_pixels, smallest=smallest)
            plan = plan_picture(self.spec, header, self.max_pixels)
            resize_into(picture, plan, self.spec, pixels[row])
            return header

        return collect(pixels, preprocess_each(blobs, preprocess, self.num_threads))

    def _smallest(self, header: ImageHeader) -> tuple[int, int]:
        """Return the least width and height in pixels that a stored picture is decoded to."""
        plan = plan_picture(self.spec, header, self.max_pixels).before_orientation(header.orientation)
        return REDUCED_MARGIN * plan.resize_w, REDUCED_MARGIN * plan.resize_h


def resize_into(picture: torch.Tensor, plan: ResizePlan, spec: PreprocessSpec, out: torch.Tensor) -> None:
    """Resize and crop an upright picture, uint8 [3, height, width], into [3, crop height, crop width]."""
    _write_window(_resize(picture, plan, spec.interpolation), plan, spec.fill, out)


def _resize(picture: torch.Tensor, plan: ResizePlan, interpolation: str) -> torch.Tensor:
    """Resize a picture; what lies right of and below the window is left out.

    The operator that torchvision's own resize ends in, on uint8 and channels last: torch's fast path, within one of 255
    of Pillow's. Called by itself it need not make the columns and rows beyond the window, a sixth of the work where a
    landscape loses both ends; the scales keep the rest as it was.
    """
    _, height, width = picture.shape
    # A batch of one whose strides say channels last, which indexing with None does not.
    batch = picture.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    size = [
        _needed(height, plan.resize_h, plan.crop_top + plan.crop_h),
        _needed(width, plan.resize_w, plan.crop_left + plan.crop_w),
    ]
    operator = getattr(torch.ops.aten, OPERATORS[interpolation])
    resized: torch.Tensor = operator(batch, size, False, plan.resize_h / height, plan.resize_w / width)
    return resized[0]


def _needed(length: int, resized: int, end: int) -> int:
    """Return how many pixels of a resized side to make."""
    needed = min(resized, end)
    return resized if needed == length else needed  # the operator leaves a side that keeps its length as it is


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
