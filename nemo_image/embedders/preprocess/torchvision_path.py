"""Preprocessing on the CPU with torchvision's decoder and torch's uint8 resize, or ours that equals it; in threads."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_image.embedders.preprocess.batch import (
    PreprocessedBatch,
    collect,
    empty_pixels,
    plan_picture,
    preprocess_each,
)
from nemo_image.embedders.preprocess.resize import INTERPOLATIONS, resize_into
from nemo_image.embedders.preprocess.spec import PreprocessSpec
from nemo_image.errors import ArgumentError
from nemo_image.shards.decode import MAX_PIXELS, ImageHeader, decode_rgb

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
