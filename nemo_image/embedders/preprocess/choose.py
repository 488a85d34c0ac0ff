"""The preprocessor for a model's transform, a decoder and a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

from nemo_image.embedders.preprocess.batch import Preprocessor
from nemo_image.embedders.preprocess.convert import spec_from_transform
from nemo_image.embedders.preprocess.pillow_path import PillowPreprocessor
from nemo_image.embedders.preprocess.resize import INTERPOLATIONS
from nemo_image.embedders.preprocess.spec import PreprocessSpec
from nemo_image.embedders.preprocess.torchvision_path import TorchvisionPreprocessor
from nemo_image.errors import ArgumentError
from nemo_image.shards.decode import MAX_PIXELS

PreprocessDecoder = Literal["torchvision", "dali", "pillow"]

_log = logging.getLogger(__name__)


def make_preprocessor(
    transform: PreprocessSpec | Callable[..., Any],
    decoder: PreprocessDecoder = "torchvision",
    device: str = "cpu",
    num_threads: int = 4,
    max_pixels: int = MAX_PIXELS,
    reduced_decode: bool = False,
) -> Preprocessor:
    """Return the preprocessor that does with `decoder` what a model's evaluation transform does.

    A transform that the decoder cannot follow (a step that does not convert, a filter that it lacks) is run with
    Pillow, and the log says so. A preprocessor may be kept for as long as the process: DALI's holds a built graph.

    Parameters
    ----------
    transform : callable or PreprocessSpec
        The model's evaluation transform, or its specification.
    decoder : {"torchvision", "dali", "pillow"}
        What decodes and resizes.
    device : str
        torch's name of the device that the model runs on. DALI works, and leaves its batches, there; the others always
        on the CPU.
    num_threads : int
        Pictures that are decoded at the same time.
    max_pixels : int
        Largest picture, before and after it is resized.
    reduced_decode : bool
        See `TorchvisionPreprocessor`; of no other decoder.

    Raises
    ------
    ArgumentError
        If there is no such decoder or device, a number is not positive, or the decoder cannot do `reduced_decode`.
    MissingDependencyError
        If DALI is asked for and not installed.
    """
    if decoder not in get_args(PreprocessDecoder):
        raise ArgumentError(f"decoder={decoder!r}: use one of {', '.join(get_args(PreprocessDecoder))}")
    for name, value in (("num_threads", num_threads), ("max_pixels", max_pixels)):
        if value < 1:
            raise ArgumentError(f"{name}={value}: must be at least 1")
    spec = transform if isinstance(transform, PreprocessSpec) else spec_from_transform(transform)
    if decoder != "pillow" and (spec is None or spec.interpolation not in INTERPOLATIONS):
        _log.warning("decoder=%r cannot follow this transform, Pillow runs it instead: %r", decoder, transform)
        decoder = "pillow"
    if reduced_decode and decoder != "torchvision":
        raise ArgumentError(f"reduced_decode=True works with decoder='torchvision' alone, not with {decoder!r}")
    if decoder == "pillow" or spec is None:
        return PillowPreprocessor(transform, num_threads, max_pixels)
    if decoder == "torchvision":
        return TorchvisionPreprocessor(spec, num_threads, max_pixels, reduced_decode=reduced_decode)
    from nemo_image.embedders.preprocess.dali_path import DaliPreprocessor

    return DaliPreprocessor(spec, device, num_threads, max_pixels)
