"""Read a transform object of timm's or open_clip's as a `PreprocessSpec`.

The object itself is read, not the configuration that made it, so that what is converted is what the reference runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from nemo_image.embedders.preprocess.spec import Interpolation, PreprocessSpec, ResizeRule


class _Resize(NamedTuple):
    rule: ResizeRule
    size: tuple[int, int]
    interpolation: Interpolation
    longest: float = 0.0


class _Crop(NamedTuple):
    size: tuple[int, int]
    fill: tuple[int, int, int] = (0, 0, 0)


class _Normalize(NamedTuple):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _ToRgb(NamedTuple):
    pass


class _ToTensor(NamedTuple):
    pass


_Step = _Resize | _Crop | _Normalize | _ToRgb | _ToTensor


def spec_from_transform(transform: Any) -> PreprocessSpec | None:
    """Convert an evaluation transform, if it does nothing but what a `PreprocessSpec` can say.

    Parameters
    ----------
    transform : callable
        What ``timm.data.create_transform(..., is_training=False)`` or open_clip's ``image_transform(...,
        is_train=False)`` returns: a `torchvision.transforms.Compose`.

    Returns
    -------
    PreprocessSpec or None
        None if a step, its setting or the order of the steps is not known.
    """
    from torchvision.transforms import Compose

    if type(transform) is not Compose:
        return None
    steps = [_read(step) for step in transform.transforms]
    if None in steps:
        return None
    # Decoding already gives RGB. Steps that only ask for it may stand anywhere.
    return _assemble([step for step in cast("list[_Step]", steps) if not isinstance(step, _ToRgb)])


def _assemble(steps: list[_Step]) -> PreprocessSpec | None:
    match steps:
        case [_Resize() as resize, _Crop() as crop, _ToTensor(), _Normalize() as normalize]:
            pass
        case [_Resize(rule="exact") as resize, _ToTensor(), _Normalize() as normalize]:
            crop = _Crop(resize.size)
        case _:
            return None
    return PreprocessSpec(
        resize=resize.rule,
        resize_size=resize.size,
        crop=crop.size,
        mean=normalize.mean,
        std=normalize.std,
        interpolation=resize.interpolation,
        fill=crop.fill,
        longest=resize.longest,
    )


def _read(step: Any) -> _Step | None:
    # By the exact class: a subclass may do something else. timm and open_clip are named, not imported.
    kind = step if inspect.isfunction(step) else type(step)
    reader = _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    return reader(step) if reader is not None else None


def _read_resize(step: Any) -> _Step | None:
    interpolation = _interpolation(step.interpolation)
    if interpolation is None or step.max_size is not None:
        return None
    size = (step.size,) if isinstance(step.size, int) else tuple(step.size)
    if len(size) == 1:
        return _Resize("shortest", (size[0], size[0]), interpolation)
    return _Resize("exact", (size[0], size[1]), interpolation)


def _read_keep_ratio(step: Any) -> _Step | None:
    interpolation = _interpolation(step.interpolation)
    if interpolation is None or step.random_scale_prob or step.random_aspect_prob:
        return None
    return _Resize("ratio", _pair(step.size), interpolation, float(step.longest))


def _read_crop_or_pad(step: Any) -> _Step | None:
    if getattr(step, "padding_mode", "constant") != "constant":
        return None
    fill = step.fill if isinstance(step.fill, Sequence) else (step.fill,) * 3
    return _Crop(_pair(step.size), (int(fill[0]), int(fill[1]), int(fill[2]))) if len(fill) == 3 else None


def _read_normalize(step: Any) -> _Step | None:
    mean, std = _triple(step.mean), _triple(step.std)
    return _Normalize(mean, std) if mean is not None and std is not None else None


def _read_convert_mode(step: Any) -> _Step | None:
    return _ToRgb() if step.mode == "RGB" else None


def _interpolation(mode: Any) -> Interpolation | None:
    from torchvision.transforms import InterpolationMode

    known = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
    return mode.value if isinstance(mode, InterpolationMode) and mode.value in known else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _triple(values: Any) -> tuple[float, float, float] | None:
    numbers = values.tolist() if hasattr(values, "tolist") else list(values)
    return (float(numbers[0]), float(numbers[1]), float(numbers[2])) if len(numbers) == 3 else None


_READERS: dict[str, Callable[[Any], _Step | None]] = {
    "torchvision.transforms.transforms.Resize": _read_resize,
    "timm.data.transforms.ResizeKeepRatio": _read_keep_ratio,
    "open_clip.transform.ResizeKeepRatio": _read_keep_ratio,
    "torchvision.transforms.transforms.CenterCrop": lambda step: _Crop(_pair(step.size)),
    "timm.data.transforms.CenterCropOrPad": _read_crop_or_pad,
    "open_clip.transform.CenterCropOrPad": _read_crop_or_pad,
    "open_clip.transform.MaybeConvertMode": _read_convert_mode,
    "open_clip.transform._convert_to_rgb": lambda _: _ToRgb(),
    "torchvision.transforms.transforms.ToTensor": lambda _: _ToTensor(),
    "timm.data.transforms.MaybeToTensor": lambda _: _ToTensor(),
    "open_clip.transform.MaybeToTensor": lambda _: _ToTensor(),
    "torchvision.transforms.transforms.Normalize": _read_normalize,
}
