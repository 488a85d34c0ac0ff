"""A model's pass over batches of pictures: memory format, precision, transfers, and what to do when memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nemo_image.embedders.preprocess import PreprocessedBatch, Preprocessor, normalize
from nemo_image.errors import ArgumentError

logger = logging.getLogger("nemo_image")


def ready_to_run(model: Any, device: str, *, compiled: bool = False) -> Any:
    """Return a model on its device, in the memory format that it computes in.

    Channels last: on the CPU convolutional networks are a tenth faster, and transformers as fast as before.
    """
    placed = model.to(device, memory_format=torch.channels_last)
    return torch.compile(placed) if compiled else placed


def require_compiler(model: Any, shape: tuple[int, ...], device: str) -> None:
    """Compile a model by a first pass, over a batch of that shape.

    Raises
    ------
    ArgumentError
        If that fails, for want of a compiler mostly.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        forward(model, torch.zeros(shape, device=device), "float32", device)
    except (TorchDynamoException, RuntimeError, OSError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ArgumentError(
            f"compile_model=True: torch.compile fails here ({type(error).__name__}: {first}): it needs a C++ compiler "
            "(g++, or Triton's on a GPU); without one, leave compile_model out"
        ) from error


def on_device(prepare: Preprocessor, batch: PreprocessedBatch, device: str) -> Any:
    """Return a batch as the model takes it, on its device.

    Pinned pixels (see `prepared_batches`) travel to a GPU while it still works on the batch before.
    """
    pixels = batch.pixels.to(device, non_blocking=True)
    return pixels if batch.normalized or prepare.spec is None else normalize(pixels, prepare.spec)


def forward(model: Any, pixels: Any, dtype: str, device: str) -> Any:
    """Return float32 embeddings, [n, size], of normalised pixels; computed in `dtype` as far as autocast does."""
    kind = device.split(":", maxsplit=1)[0]
    with torch.inference_mode(), torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32"):
        return model(pixels.contiguous(memory_format=torch.channels_last)).float()


def forward_tokens(model: Any, tokens: Any, dtype: str, device: str) -> Any:
    """Return float32 embeddings, [n, size], of tokens; computed in `dtype` as far as autocast does."""
    kind = device.split(":", maxsplit=1)[0]
    with torch.inference_mode(), torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32"):
        return model(tokens).float()


def embed(run: Callable[[Any], Any], pixels: Any) -> npt.NDArray[Any]:
    """Run a model on pixels or tokens; a batch that does not fit the GPU's memory is halved and tried again.

    Parameters
    ----------
    run : callable
        From pixels to embeddings, [n, size].
    pixels : torch.Tensor
        Normalised, [n, 3, height, width]; or tokens, [n, context length].
    """
    try:
        result: npt.NDArray[Any] = run(pixels).cpu().numpy()
    except torch.cuda.OutOfMemoryError:
        if len(pixels) == 1:
            raise
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        logger.warning("out of GPU memory with %d images at once: trying %d", len(pixels), half)
        return np.concatenate([embed(run, part) for part in (pixels[:half], pixels[half:])])
    return result
