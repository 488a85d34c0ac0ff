"""Where the workers compute, asked once on the client and passed to tasks as an argument.

Tasks do not ask: what is set in a client's configuration is not seen by workers that run already.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

from nemo_image import backend
from nemo_image.engine.gpu_share import gpu_share
from nemo_image.engine.run import current_client
from nemo_image.errors import ClusterError

logger = logging.getLogger("nemo_image")

T = TypeVar("T")
Device = Literal["cpu", "cuda"]

TASKS_A_GPU = 4
"""Tasks that share a GPU: while one waits for its pictures, others compute."""

_NAMED = 3  # workers that a message names

_task_device: ContextVar[Device] = ContextVar("nemo_image_device", default="cpu")


def worker_device() -> Device:
    """Return torch's name of the device that tasks compute on: each worker's own GPU if all workers have one.

    The workers are those of the current client; without one, this process. Dask's configuration decides otherwise with
    ``nemo-image.backend``: ``"cpu"`` leaves GPUs alone, ``"gpu"`` takes no other.

    Raises
    ------
    ArgumentError
        If the configuration names no such backend.
    ClusterError
        If it says ``"gpu"``, and a worker has none.
    """
    choice = backend.chosen_backend()
    if choice == "cpu":
        return "cpu"
    seen = _seen()
    blind = sorted(name for name, sees in seen.items() if not sees)
    if seen and not blind:
        return "cuda"
    shown = ", ".join(blind[:_NAMED]) + (f" and {len(blind) - _NAMED} more" if len(blind) > _NAMED else "")
    if choice == "gpu":
        raise ClusterError(
            f"{backend.BACKEND_KEY} is 'gpu', but no GPU is seen by {shown or 'any worker'}: see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES there, and that its torch is built for CUDA"
        )
    if len(blind) < len(seen):
        logger.warning(
            "some workers have a GPU, but not %s: all compute on their CPU. Leave those workers out to use the GPUs",
            shown,
        )
    return "cpu"


def require_gpus(client: Any) -> None:
    """Raise if a worker of `client` has no GPU.

    Raises
    ------
    ClusterError
        Naming the first few.
    """
    blind = sorted(name for name, sees in client.run(backend.sees_gpu).items() if not sees)
    if blind:
        raise ClusterError(
            f"cluster_type='gpu', but no GPU is seen by {len(blind)} workers, the first {', '.join(blind[:_NAMED])}: "
            "start them with dask cuda worker, see nvidia-smi there, or give cluster_type='cpu'"
        )


def where_device_is(device: str, function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, which needs `device`: called here if this process has it, else on a worker."""
    client = current_client()
    if client is None or device == "cpu" or backend.sees_gpu():
        return function(*args)
    result: T = client.submit(function, *args, pure=False).result()
    return result


def _seen() -> dict[str, bool]:
    """Return for each worker whether it has a GPU."""
    client = current_client()
    if client is None:
        return {"this process": backend.sees_gpu()}
    # One that dies while it is asked is replaced by one like it.
    return dict(client.run(backend.sees_gpu, on_error="ignore"))


def local_cluster_type() -> Literal["cpu", "gpu"]:
    """Return the kind of cluster that this machine is best used by: of its GPUs, if it has any."""
    if not backend.sees_gpu():
        return "cpu"
    if importlib.util.find_spec("dask_cuda") is None:
        logger.warning(
            "this machine's GPU is left alone, because dask-cuda, which starts a process a GPU, is not installed: "
            "pip install 'nemo-image[image_cuda13]' (or image_cuda12)"
        )
        return "cpu"
    return "gpu"


@contextmanager
def computing_on(device: Device) -> Iterator[None]:
    """Have a task compute on `device` in the ``with`` block. Of a GPU it holds a share, so that few do at once."""
    token = _task_device.set(device)
    try:
        with gpu_share(0.0 if device == "cpu" else 1 / TASKS_A_GPU):
            yield
    finally:
        _task_device.reset(token)


def task_device() -> Device:
    """Return the device of :func:`computing_on`."""
    return _task_device.get()


def new_frames() -> Literal["pandas", "cudf"]:
    """Return what the metadata of a dataset that is opened now is to be held in.

    cuDF where all workers and this process, which plans with empty frames, have a GPU and RAPIDS is installed.
    """
    on_gpus = backend.has_cudf() and backend.sees_gpu() and worker_device() == "cuda"
    return "cudf" if on_gpus else "pandas"
