"""What every preprocessing path gives."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nemo_image.embedders.preprocess.spec import PreprocessSpec, ResizePlan
from nemo_image.engine.decoding.pool import for_each_row
from nemo_image.errors import ImageError
from nemo_image.shards.decode import ImageHeader


@dataclass(frozen=True, slots=True)
class PreprocessedBatch:
    """Pictures that are ready for a model, and what became of the others.

    Attributes
    ----------
    pixels : torch.Tensor
        [len(rows), 3, crop height, crop width] uint8, before normalising (see `normalize`); or, if `normalized`, what
        the model's own transform returned.
    rows : list of int
        Which of the blobs each picture is, ascending.
    errors : list of (str or None)
        For each blob, `ImageError.reason`, or None where the picture is good.
    widths, heights : list of (int or None)
        For each blob, the size of the stored picture in pixels; None where there is an error.
    normalized : bool
        Whether `pixels` are ready as they are.
    """

    pixels: torch.Tensor
    rows: list[int]
    errors: list[str | None]
    widths: list[int | None]
    heights: list[int | None]
    normalized: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # As an array: a tensor's own pickle shares memory through files.
        pixels = self.pixels.cpu().contiguous().numpy()
        return _from_array, (pixels, self.rows, self.errors, self.widths, self.heights, self.normalized)


def _from_array(pixels: Any, *fields: Any) -> PreprocessedBatch:
    return PreprocessedBatch(torch.from_numpy(pixels), *fields)


class Preprocessor(Protocol):
    """Bytes of pictures in, a batch for the model out; safe to call from several threads."""

    @property
    def spec(self) -> PreprocessSpec | None:
        """How to normalise what comes out; None if that is done."""

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture."""
        ...


def normalize(pixels: torch.Tensor, spec: PreprocessSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalise a batch on its own device, with the arithmetic of ``ToTensor`` and ``Normalize``.

    Parameters
    ----------
    pixels : torch.Tensor
        [n, 3, height, width] uint8.
    spec : PreprocessSpec
        Its `mean` and `std` are used.
    dtype : torch.dtype
        Of the result; computed in float32.

    Returns
    -------
    torch.Tensor
        [n, 3, height, width], in the memory format that the pixels came in.
    """
    mean = torch.tensor(spec.mean, device=pixels.device)
    std = torch.tensor(spec.std, device=pixels.device)
    last = pixels.permute(0, 2, 3, 1)
    if last.is_contiguous():
        # A row of the picture at once, mean and std repeated along it: channel by channel takes three times as long.
        count, height, width, channels = last.shape
        rows = last.view(count, height, width * channels).to(torch.float32)
        rows.div_(255.0).sub_(mean.repeat(width)).div_(std.repeat(width))
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2).to(dtype)
    values = pixels.to(torch.float32, memory_format=torch.preserve_format)
    return values.div_(255.0).sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1)).to(dtype)


def empty_pixels(count: int, spec: PreprocessSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return [count, 3, crop height, crop width] uint8 to write pictures into, channels last as decoders give them."""
    shape = (count, *spec.crop, 3)
    if torch.device(device).type == "cpu":
        pixels = torch.from_numpy(_recycled(math.prod(shape))).view(shape)
    else:
        pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    return pixels.permute(0, 3, 1, 2)


_spare: deque[npt.NDArray[np.uint8]] = deque(maxlen=4)


def _recycled(size: int) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of memory, those of an earlier batch where nobody holds it any more.

    Fresh memory costs a page fault every 4 KiB: 3% of what a photograph takes to be decoded.
    """
    block = np.empty(0, np.uint8)
    with contextlib.suppress(IndexError):  # none is left, or another thread was faster
        while block.size != size:
            block = _spare.popleft()  # one of another size is let go
    if block.size != size:
        block = np.empty(size, np.uint8)
    lent = block[:]  # lives as long as the tensor's storage
    weakref.finalize(lent, _spare.append, block).atexit = False
    return lent


def plan_picture(spec: PreprocessSpec, header: ImageHeader, max_pixels: int) -> ResizePlan:
    """Plan one picture, with the limit on its resized size: a line of 1 x 100,000 pixels would become a billion.

    Raises
    ------
    ImageError
        If the resized picture would have no pixels, or more than `max_pixels`.
    """
    width, height = header.upright_size
    plan = spec.plan(width, height)
    resized = f"{width} x {height} pixels would be resized to {plan.resize_w} x {plan.resize_h}"
    if min(plan.resize_w, plan.resize_h) < 1:
        raise ImageError("unsupported", resized)
    if plan.resize_w * plan.resize_h > max_pixels:
        raise ImageError("bomb", f"{resized}, more than max_pixels={max_pixels}")
    return plan


def preprocess_each(
    blobs: Sequence[bytes | None], preprocess: Callable[[int, bytes], ImageHeader], num_threads: int
) -> list[ImageHeader | ImageError]:
    """Call `preprocess` with the row and the bytes of every picture, in threads.

    Returns
    -------
    list of ImageHeader or ImageError
        What it returned or raised, in the blobs' order.

    Raises
    ------
    DecoderStalledError
        If a picture takes longer than its time limit.
    """
    outcomes: list[ImageHeader | ImageError] = [ImageError("missing", "the sample has no picture")] * len(blobs)

    def one(row: int) -> None:
        blob = blobs[row]
        if blob is not None:
            try:
                outcomes[row] = preprocess(row, blob)
            except ImageError as error:
                outcomes[row] = error.with_traceback(None)  # its frames would keep the picture alive

    for_each_row(one, len(blobs), num_threads)
    return outcomes


def collect(
    pixels: torch.Tensor, outcomes: Sequence[ImageHeader | ImageError], *, normalized: bool = False
) -> PreprocessedBatch:
    """Make a batch of pixels, one picture for every row or for every good row, and of what became of the rows."""
    rows = [row for row, outcome in enumerate(outcomes) if isinstance(outcome, ImageHeader)]
    if len(pixels) != len(rows):
        pixels = pixels[torch.tensor(rows, dtype=torch.long, device=pixels.device)]
    return PreprocessedBatch(
        pixels=pixels,
        rows=rows,
        errors=[outcome.reason if isinstance(outcome, ImageError) else None for outcome in outcomes],
        widths=[outcome.width if isinstance(outcome, ImageHeader) else None for outcome in outcomes],
        heights=[outcome.height if isinstance(outcome, ImageHeader) else None for outcome in outcomes],
        normalized=normalized,
    )
