"""Choose a model's number type once, on the client: reduced precision only where it is both harmless and faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("nemo_image")

MIN_COSINE = 0.9995
"""What the probe asks of reduced precision; half the promise's slack (0.999), because it sees few pictures."""

MIN_SPEEDUP = 1.1
TIMED_IMAGES = 4
TIMED_RUNS = 3
COMPARED_AT_ONCE = 16


def candidate_dtype(device: str) -> str | None:
    """Return the reduced number type that a device computes in hardware, or None."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def probe_dtype(forward: Callable[[Any, str], Any], pixels: Any, device: str) -> str:
    """Return ``"float32"`` or the reduced number type that keeps the embeddings of `pixels` and is faster.

    Parameters
    ----------
    forward : callable
        ``forward(pixels, dtype)`` gives float32 embeddings of shape (n, size).
    pixels : tensor, shape (n, 3, height, width)
        Real pictures, prepared for the model.
    device : str
        Where the model is.
    """
    dtype = candidate_dtype(device)
    if dtype is None or not len(pixels):
        return "float32"
    few = pixels[:TIMED_IMAGES]
    speedup = _seconds(forward, few, "float32", device) / _seconds(forward, few, dtype, device)
    if speedup < MIN_SPEEDUP:
        logger.info("autocast: float32, because %s is only %.2f times as fast here", dtype, speedup)
        return "float32"
    worst = worst_cosine(forward, pixels, dtype)
    chosen = dtype if worst >= MIN_COSINE else "float32"
    logger.info("autocast: %s, because %s keeps cosine %.5f at %.2f times the speed", chosen, dtype, worst, speedup)
    return chosen


def worst_cosine(forward: Callable[[Any, str], Any], inputs: Any, dtype: str) -> float:
    """Return the smallest cosine between embeddings in float32 and in `dtype`; not all are looked at once one fails.

    Parameters
    ----------
    forward : callable
        As for :func:`probe_dtype`.
    inputs : tensor, shape (n, ...)
    dtype : str
    """
    import torch

    worst = 1.0
    for part in inputs.split(COMPARED_AT_ONCE):
        exact, reduced = forward(part, "float32"), forward(part, dtype)
        worst = min(worst, float(torch.nn.functional.cosine_similarity(exact.double(), reduced.double()).min()))
        if worst < MIN_COSINE:
            break  # the others cannot save it
    return worst


def _seconds(forward: Callable[[Any, str], Any], pixels: Any, dtype: str, device: str) -> float:
    import torch

    taken = []
    for _ in range(1 + TIMED_RUNS):
        started = time.perf_counter()
        forward(pixels, dtype)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    # The first run pays for kernels and caches.
    return sorted(taken[1:])[TIMED_RUNS // 2]
