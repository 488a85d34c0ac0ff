"""Weights of networks, whichever library builds them: a hash of their values, a seed for those that have none."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

RANDOM_SEED = 0
RANDOM_WEIGHTS = f"random weights, seed {RANDOM_SEED}"

_random_lock = threading.Lock()


@contextmanager
def seeded() -> Iterator[None]:
    """Seed torch for a ``with`` block, so that a network built in it is the same in every process."""
    import torch

    # The generator is the process's: two threads that seed it at once would get weights that nobody asked for.
    with _random_lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        yield


def state_sha256(state: Mapping[str, Any]) -> str:
    """Return one hash of a model's weights, whatever file they came from."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def hub_cache() -> str:
    """Return the folder in which the hub's client keeps what it has downloaded."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return "~/.cache/huggingface/hub"
    return str(HF_HUB_CACHE)
