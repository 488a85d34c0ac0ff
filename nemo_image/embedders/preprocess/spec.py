"""A model's evaluation transform as data: what to resize to, where to crop, how to normalise.

Sizes and offsets are the integers that torchvision and timm compute, because a picture that is resized to 341 pixels
instead of 342, or cropped one pixel beside, no longer gives the reference's embedding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

ResizeRule = Literal["shortest", "exact", "ratio"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """What happens to one picture: resize, then cut out a window.

    Attributes
    ----------
    resize_w, resize_h : int
        Size in pixels that the upright picture is resized to.
    crop_left, crop_top : int
        Place of the window in the resized picture, in pixels. Negative where the picture is smaller than the window;
        what lies outside the picture is filled.
    crop_w, crop_h : int
        Size of the window, in pixels.
    """

    resize_w: int
    resize_h: int
    crop_left: int
    crop_top: int
    crop_w: int
    crop_h: int

    @property
    def needs_padding(self) -> bool:
        """Whether the window reaches beyond the resized picture."""
        return self.resize_w < self.crop_w or self.resize_h < self.crop_h

    def before_orientation(self, orientation: int) -> ResizePlan:
        """Return the plan for the stored picture, whose window becomes this plan's once it is turned upright.

        Parameters
        ----------
        orientation : int
            EXIF orientation, 1 to 8, of the stored picture.
        """
        left, top = self.crop_left, self.crop_top
        if orientation in (2, 3, 6, 7):  # the upright picture is mirrored left to right, last of all
            left = self.resize_w - left - self.crop_w
        if orientation in (3, 4, 7, 8):  # … top to bottom
            top = self.resize_h - top - self.crop_h
        if orientation < 5:
            return ResizePlan(self.resize_w, self.resize_h, left, top, self.crop_w, self.crop_h)
        return ResizePlan(self.resize_h, self.resize_w, top, left, self.crop_h, self.crop_w)


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """The steps of an evaluation transform.

    Attributes
    ----------
    resize : {"shortest", "exact", "ratio"}
        ``"shortest"``: the shorter side becomes ``resize_size[0]``, the other keeps the ratio, rounded down
        (`torchvision.transforms.Resize` of an int). ``"exact"``: to ``resize_size``, whatever the ratio (`Resize` of
        a pair). ``"ratio"``: keeps the ratio, both sides rounded (timm's and open_clip's ``ResizeKeepRatio``).
    resize_size : (int, int)
        Height and width in pixels.
    crop : (int, int)
        Height and width in pixels of the model's input, cut from the middle.
    mean, std : tuple of float
        Subtracted from, then divided into, each channel's values between 0 and 1.
    interpolation : str
        Pillow's name of the filter; always antialiased.
    fill : (int, int, int)
        RGB, 0 to 255, around a picture that is smaller than `crop`.
    longest : float
        For ``"ratio"``: 0 fills `resize_size` with the shorter side, 1 fits the longer one into it.
    """

    resize: ResizeRule
    resize_size: tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)
    longest: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, for fingerprints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def plan(self, width: int, height: int) -> ResizePlan:
        """Compute sizes and offsets for one picture.

        Parameters
        ----------
        width, height : int
            Size of the upright picture in pixels, both positive.

        Returns
        -------
        ResizePlan
            A side of the resized size may be 0 for a picture that is hundreds of times longer than wide.
        """
        resize_w, resize_h = self._resized(width, height)
        crop_h, crop_w = self.crop
        return ResizePlan(resize_w, resize_h, _offset(resize_w, crop_w), _offset(resize_h, crop_h), crop_w, crop_h)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        target_h, target_w = self.resize_size
        if self.resize == "exact":
            return target_w, target_h
        if self.resize == "shortest":  # torchvision.transforms.functional._compute_resized_output_size
            if width <= height:
                return target_h, int(target_h * height / width)
            return int(target_h * width / height), target_h
        ratio_h, ratio_w = height / target_h, width / target_w  # timm.data.transforms.ResizeKeepRatio.get_params
        ratio = max(ratio_h, ratio_w) * self.longest + min(ratio_h, ratio_w) * (1.0 - self.longest)
        return round(width / ratio), round(height / ratio)


def _offset(size: int, window: int) -> int:
    """Where a centred window starts: torchvision's center_crop, which pads before it rounds half to even."""
    if window > size:
        return -((window - size) // 2)
    return round((size - window) / 2.0)
