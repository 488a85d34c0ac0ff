"""One copy of a model per process.

A worker process runs several tasks at once, and a model of gigabytes must be loaded once for all of them.
:func:`get_model` is that one place. It needs no scheduler, so it works under every one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from nemo_image.engine.allocator import keep_freed_memory

T = TypeVar("T")

__all__ = ["ModelSpec", "clear_models", "get_model"]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that tells one loaded model from another.

    Parameters
    ----------
    kind : str
        The library or class that builds it, for example ``"timm"``, ``"aesthetic"`` or ``"custom"``.
    name : str
        The model's name within that kind.
    weights_sha256 : str
        SHA-256 of its weights in hexadecimal; ``""`` where they are not a file.
    dtype : str
        The type that it computes in, for example ``"float32"``.
    device : str
        The torch device that holds it, for example ``"cpu"`` or ``"cuda:0"``.
    extra : tuple
        Further hashable values that change the model.
    """

    kind: str
    name: str
    weights_sha256: str
    dtype: str
    device: str
    extra: tuple[Any, ...] = ()


_models: dict[ModelSpec, Future[Any]] = {}
_lock = threading.Lock()


def get_model(spec: ModelSpec, load: Callable[[], T]) -> T:
    """Return the process's one copy of a model, loading it on first use.

    Threads that ask for a model while another one loads it wait for that copy; different models load in parallel.
    A load that fails raises in every thread that waits for it and is forgotten, so that a later call tries again.

    Parameters
    ----------
    spec : ModelSpec
        Which model; equal specs share one copy.
    load : callable
        Builds the model; called without arguments. It must not ask for the same spec itself.

    Returns
    -------
    object
        What `load` returned for this spec in this process.

    Raises
    ------
    Exception
        Whatever `load` raised.
    """
    if spec.device == "cpu":
        keep_freed_memory()
    with _lock:
        future = _models.get(spec)
        mine = future is None
        if future is None:
            future = _models[spec] = Future()
    if mine:
        # The lock is not held here: other models can be looked up and loaded meanwhile.
        try:
            future.set_result(load())
        except BaseException as error:
            with _lock:
                if _models.get(spec) is future:
                    del _models[spec]
            future.set_exception(error)
    return cast("T", future.result())


def clear_models() -> None:
    """Forget every model of this process; memory is freed once no task holds one."""
    with _lock:
        _models.clear()
