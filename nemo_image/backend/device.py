"""Which backend a process is to use, and whether it can."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

from nemo_image.errors import ArgumentError

BACKEND_KEY = "nemo-image.backend"
"""Dask's configuration key: ``"auto"``, ``"cpu"`` or ``"gpu"``; as an environment variable
``DASK_NEMO_IMAGE__BACKEND``."""

Choice = Literal["auto", "cpu", "gpu"]


def chosen_backend() -> Choice:
    """Return what this process's configuration says of the backend.

    Raises
    ------
    ArgumentError
        If it says something else than there is.
    """
    import dask

    choice = dask.config.get(BACKEND_KEY, "auto")
    for known in get_args(Choice):
        if choice == known:
            return known  # type: ignore[no-any-return]
    raise ArgumentError(f"Dask's configuration has {BACKEND_KEY}={choice!r}: use 'auto', 'cpu' or 'gpu'")


def sees_gpu() -> bool:
    """Tell whether this process has a GPU that torch can use, and is to use it."""
    if chosen_backend() == "cpu" or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def has_cudf() -> bool:
    """Tell whether frames of cuDF can be made in this process's installation."""
    return all(importlib.util.find_spec(name) is not None for name in ("cudf", "dask_cudf"))
