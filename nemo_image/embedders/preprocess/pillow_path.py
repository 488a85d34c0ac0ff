"""Preprocessing with Pillow alone: the reference of the other paths, and the one for whatever they cannot do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from nemo_image.embedders.preprocess.batch import (
    PreprocessedBatch,
    collect,
    empty_pixels,
    plan_picture,
    preprocess_each,
)
from nemo_image.embedders.preprocess.convert import spec_from_transform
from nemo_image.embedders.preprocess.spec import PreprocessSpec, ResizePlan
from nemo_image.errors import ArgumentError, ImageError
from nemo_image.shards.decode import MAX_PIXELS, ImageHeader, decode_pillow


class PillowPreprocessor:
    """Preprocess pictures with Pillow.

    Parameters
    ----------
    transform : PreprocessSpec or callable
        A spec, or the model's transform. A transform that converts to a spec is run as its spec, with the same pixels;
        any other is called with each upright RGB picture, must return tensors of one shape, and the batch is then
        `normalized`.
    num_threads : int
        Pictures that are decoded at the same time.
    max_pixels : int
        Largest picture, before and after it is resized.
    """

    def __init__(
        self,
        transform: PreprocessSpec | Callable[[Image.Image], Any],
        num_threads: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.transform = transform
        self.spec = transform if isinstance(transform, PreprocessSpec) else spec_from_transform(transform)
        self.num_threads = num_threads
        self.max_pixels = max_pixels

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture."""
        return self._by_transform(blobs) if self.spec is None else self._by_spec(blobs, self.spec)

    def _by_spec(self, blobs: Sequence[bytes | None], spec: PreprocessSpec) -> PreprocessedBatch:
        pixels = empty_pixels(len(blobs), spec)

        def preprocess(row: int, blob: bytes) -> ImageHeader:
            header, picture = decode_pillow(blob, max_pixels=self.max_pixels)
            plan = plan_picture(spec, header, self.max_pixels)
            window = _window(picture, plan, spec)
            pixels[row].copy_(torch.from_numpy(np.array(window)).permute(2, 0, 1))
            return header

        return collect(pixels, preprocess_each(blobs, preprocess, self.num_threads))

    def _by_transform(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        tensors: dict[int, torch.Tensor] = {}

        def preprocess(row: int, blob: bytes) -> ImageHeader:
            header, picture = decode_pillow(blob, max_pixels=self.max_pixels)
            tensors[row] = self._transformed(picture)
            return header

        outcomes = preprocess_each(blobs, preprocess, self.num_threads)
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if len(shapes) > 1:
            raise ArgumentError(f"transform: its tensors have several shapes, {sorted(shapes)}; it must end in a crop")
        stacked = torch.stack([tensors[row] for row in sorted(tensors)]) if tensors else torch.empty(0)
        return collect(stacked, outcomes, normalized=True)

    def _transformed(self, picture: Image.Image) -> torch.Tensor:
        try:
            tensor = self.transform(picture)  # type: ignore[operator]
        except Exception as error:  # one odd picture must not stop a shard
            raise ImageError("transform", f"{type(error).__name__}: {error}") from error
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"transform: it returns {type(tensor).__name__}, not a tensor")
        return tensor


def _window(picture: Image.Image, plan: ResizePlan, spec: PreprocessSpec) -> Image.Image:
    size = (plan.resize_w, plan.resize_h)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling[spec.interpolation.upper()])
    window = Image.new("RGB", (plan.crop_w, plan.crop_h), spec.fill)
    window.paste(picture, (-plan.crop_left, -plan.crop_top))
    return window
