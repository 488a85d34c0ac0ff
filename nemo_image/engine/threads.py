"""Share the machine's cores between the tasks that run at the same time.

Dask, torch and the decoders each start one thread a core by default, and their product is what makes a busy CPU slow.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

_torch_lock = threading.Lock()
_local_share: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "nemo_image_threads", default=None
)
"""Threads that a task may keep busy, and tasks that run at the same time."""


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def task_share() -> int:
    """Return how many threads the present task may keep busy, at least 1.

    A task on a Dask worker may use one core for each thread that its worker was given, divided by those threads: one.
    A task of our own local runner gets what the runner said; anything else (a plain ``compute()``) one core, or all
    of them on the main thread, where nothing else runs.
    """
    local = _local_share.get()
    if local is not None:
        return local[0]
    worker_threads = _worker_threads()
    if worker_threads is not None:
        cores = int(os.environ.get("NEMO_IMAGE_CPUS_PER_WORKER", worker_threads))
        return max(1, cores // worker_threads)
    return cpu_count() if threading.current_thread() is threading.main_thread() else 1


def tasks_at_once() -> int:
    """Return how many tasks may run in this process at the same time, the present one included."""
    local = _local_share.get()
    return local[1] if local is not None else _worker_threads() or 1


@contextlib.contextmanager
def local_share(threads: int, at_once: int = 1) -> Iterator[None]:
    """Say how many threads each task of this context may keep busy, and how many such tasks run at the same time."""
    token = _local_share.set((threads, at_once))
    try:
        yield
    finally:
        _local_share.reset(token)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for the operations of this task.

    torch keeps the number for each thread that calls it, so it must be set in the task itself.
    """
    import torch

    before = torch.get_num_threads()
    if before == count:
        yield
        return
    set_own_torch_threads(count)
    try:
        yield
    finally:
        set_own_torch_threads(before)


def set_own_torch_threads(count: int) -> None:
    """Set torch's number of threads for the calling thread, and for no other.

    torch also gives the number last set anywhere to threads that are new to it. Those get what they got before.
    """
    import torch

    with _torch_lock:
        # A thread takes the common number at its first question; asked before it is set, not after.
        torch.get_num_threads()
        others = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        _in_new_thread(lambda: torch.set_num_threads(others))


def _in_new_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def _worker_threads() -> int | None:
    try:
        from distributed import get_worker

        return int(get_worker().state.nthreads)
    except (ImportError, ValueError, AttributeError):
        return None
