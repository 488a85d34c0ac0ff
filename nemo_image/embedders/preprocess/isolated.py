"""Preprocessing in a child process: see `nemo_image.engine.decoding.isolated`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from nemo_image.embedders.preprocess.batch import PreprocessedBatch, Preprocessor, empty_pixels
from nemo_image.embedders.preprocess.spec import PreprocessSpec
from nemo_image.engine.decoding.isolated import Guarded, Isolated, Parts
from nemo_image.errors import ArgumentError


class IsolatedPreprocessor(Isolated[PreprocessedBatch]):
    """Do what a preprocessor does, in a child process, and name the pictures that crash or hang it.

    Parameters
    ----------
    preprocessor : Preprocessor
        What the child does; it must be picklable (by `cloudpickle`).
    seconds : float, optional
        Longest time for one picture.
    memory : int, optional
        Bytes that a decoder may allocate, for all the pictures that it decodes at the same time.
    """

    def __init__(self, preprocessor: Preprocessor, *, seconds: float | None = None, memory: int | None = None) -> None:
        super().__init__(preprocessor, partial(_merged, preprocessor.spec), seconds=seconds, memory=memory)
        self.preprocessor = preprocessor

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures in the child; None stands for a sample without a picture."""
        return super().__call__(list(blobs))  # the child cannot read them

    @property
    def spec(self) -> PreprocessSpec | None:
        """How to normalise what comes out; None if that is done."""
        return self.preprocessor.spec


class GuardedPreprocessor(Guarded[PreprocessedBatch]):
    """Run a preprocessor in this process until a picture hangs it; from then on, isolated.

    Parameters
    ----------
    preprocessor : Preprocessor
        What to run.
    """

    def __init__(self, preprocessor: Preprocessor) -> None:
        super().__init__(preprocessor, lambda: IsolatedPreprocessor(preprocessor))
        self.preprocessor = preprocessor

    @property
    def spec(self) -> PreprocessSpec | None:
        """How to normalise what comes out; None if that is done."""
        return self.preprocessor.spec


def _merged(spec: PreprocessSpec | None, count: int, parts: Parts[PreprocessedBatch]) -> PreprocessedBatch:
    """Put parts together; each says which rows it is of, and later ones count."""
    errors: list[str | None] = [None] * count
    widths: list[int | None] = [None] * count
    heights: list[int | None] = [None] * count
    pictures: dict[int, torch.Tensor] = {}
    normalized = False
    for rows, part in parts:
        if isinstance(part, str):
            errors[rows[0]] = part
            continue
        for place, row in enumerate(rows):
            errors[row], widths[row], heights[row] = part.errors[place], part.widths[place], part.heights[place]
        pictures |= {rows[place]: part.pixels[index] for index, place in enumerate(part.rows)}
        normalized |= part.normalized
    shapes = {tuple(picture.shape) for picture in pictures.values()}
    if len(shapes) > 1:
        raise ArgumentError(f"transform: its tensors have several shapes, {sorted(shapes)}; it must end in a crop")
    if pictures:
        pixels = torch.stack([pictures[row] for row in sorted(pictures)])
    else:
        pixels = torch.empty(0) if spec is None else empty_pixels(0, spec)
    return PreprocessedBatch(pixels, sorted(pictures), errors, widths, heights, normalized)
