"""Resize and crop on the CPU, with torch's antialiased uint8 filters: by our own compiled loops, or by torch itself.

Both give the same pixels to the last bit, within one of 255 of Pillow's. The compiled loops need four tenths of
the time with AVX-512, half with AVX2, a third of torch's without either: they make the window alone and write it where
it belongs. They are there where a C compiler was when the package was installed.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch

from nemo_image.embedders.preprocess.spec import PreprocessSpec, ResizePlan

_compiled: ModuleType | None
try:
    from nemo_image.embedders.preprocess import _resize as _compiled
except ImportError:  # not built
    _compiled = None
else:
    if not hasattr(_compiled, "axis"):  # built of an earlier source
        _compiled = None

Resizer = Literal["avx512", "avx2", "portable", "torch"]

OPERATORS = {"bilinear": "_upsample_bilinear2d_aa", "bicubic": "_upsample_bicubic2d_aa"}
INTERPOLATIONS = frozenset(OPERATORS)
"""Filters that torch's antialiased uint8 resize has, in every version that we run with."""


LONGEST_KEPT = 2**12
"""Pixels: weights of longer axes are made anew for every picture; those of shorter ones take some ten KiB."""

LEVELS: tuple[Resizer, ...] = ("portable", "avx2", "avx512")
"""What the compiled loops are for, by the extension's numbers."""


def resizer() -> Resizer:
    """Tell what resizes in this process: our compiled loops, for AVX-512, AVX2 or any processor, or torch."""
    return "torch" if _compiled is None else LEVELS[_compiled.LEVEL]


def resize_into(picture: torch.Tensor, plan: ResizePlan, spec: PreprocessSpec, out: torch.Tensor) -> None:
    """Resize and crop an upright picture.

    Parameters
    ----------
    picture : torch.Tensor
        uint8 [3, height, width], in memory best with the channels last.
    plan : ResizePlan
    spec : PreprocessSpec
        Its `interpolation`, one of `INTERPOLATIONS`, and its `fill` are used.
    out : torch.Tensor
        uint8 [3, crop height, crop width] to write into, in memory best with the channels last.
    """
    left, top = max(plan.crop_left, 0), max(plan.crop_top, 0)
    height = min(plan.crop_top + plan.crop_h, plan.resize_h) - top
    width = min(plan.crop_left + plan.crop_w, plan.resize_w) - left
    if plan.needs_padding:
        out.copy_(torch.tensor(spec.fill, dtype=torch.uint8).view(3, 1, 1).expand_as(out))
        y, x = top - plan.crop_top, left - plan.crop_left
        out = out[:, y : y + height, x : x + width]
    if _compiled is None:
        resized = _resize(picture, plan, spec.interpolation)
        out.copy_(resized[:, top : top + height, left : left + width])
    else:
        _resize_compiled(picture, plan, spec.interpolation, out)


def _resize_compiled(picture: torch.Tensor, plan: ResizePlan, interpolation: str, out: torch.Tensor) -> None:
    """Write the part of the window that the picture covers; it begins at the window's start, or at the picture's."""
    assert _compiled is not None
    source, target = picture.permute(1, 2, 0), out.permute(1, 2, 0)
    if not source.is_contiguous():
        source = source.contiguous()
    made = target if target.stride(2) == 1 else torch.empty(target.shape, dtype=torch.uint8)
    bicubic = interpolation == "bicubic"
    across = _axis(source.shape[1], plan.resize_w, max(plan.crop_left, 0), made.shape[1], bicubic, True)
    down = _axis(source.shape[0], plan.resize_h, max(plan.crop_top, 0), made.shape[0], bicubic, False)
    _compiled.resize(source.numpy(), made.numpy(), across, down, _compiled.LEVEL)
    if made is not target:
        target.copy_(made)


def _axis(length: int, resized: int, start: int, count: int, bicubic: bool, aligned: bool) -> object:
    """Return the weights of an axis: photographs come in few sizes. Those of large pictures are not kept."""
    make = _kept_axis if length <= LONGEST_KEPT else _kept_axis.__wrapped__
    return make(length, resized, start, count, bicubic, aligned)


@lru_cache(maxsize=256)
def _kept_axis(*numbers: Any) -> object:
    assert _compiled is not None
    return _compiled.axis(*numbers)


def _resize(picture: torch.Tensor, plan: ResizePlan, interpolation: str) -> torch.Tensor:
    """Resize a picture; what lies right of and below the window is left out.

    The operator that torchvision's own resize ends in, on uint8 and channels last: torch's fast path. Called by itself
    it need not make the columns and rows beyond the window, a sixth of the work where a landscape loses both ends; the
    scales keep the rest as it was.
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
