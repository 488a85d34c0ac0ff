"""Keep the memory that a model's layers or a decoder free, for the next layer or picture.

glibc hands large blocks back to the kernel when they are freed, and the kernel maps and clears each page of the next
one anew: a fifth of a convolutional network's time on the CPU, and half of it in Dask's workers, which are started
with ``MALLOC_TRIM_THRESHOLD_=65536``. The parameters are those of mallopt(3).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_PARAMETERS = {
    _M_MMAP_THRESHOLD: 32 * 2**20,  # the most that glibc takes: larger blocks are mapped one by one
    _M_TRIM_THRESHOLD: 2**30,  # of the main thread; see `give_back`
    _M_TOP_PAD: 64 * 2**20,  # a thread's heap: none of them is unmapped; what is not touched takes no memory
}

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
"""Whoever sets one of them decides alone."""
_DASKS = {"MALLOC_TRIM_THRESHOLD_": "65536"}
"""What Dask gives its workers unasked."""

SECONDS_BETWEEN = 30.0
_keeps = threading.Event()


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process keep freed blocks of up to 32 MiB; return whether that was done.

    It is not where the user set one of :data:`VARIABLES`, or ``glibc.malloc`` in ``GLIBC_TUNABLES``; where the
    process's memory is limited; and where there is another allocator's C library.
    """
    library = _glibc()
    if library is None or _chosen_by_user() or _is_limited():
        return False
    if not all(library.mallopt(parameter, value) == 1 for parameter, value in _PARAMETERS.items()):
        return False
    _keeps.set()
    return True


class _Clock:
    """Says when it is time again, to one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def is_time(self) -> bool:
        """Return whether `SECONDS_BETWEEN` have passed since this was last true."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < SECONDS_BETWEEN:
                return False
            self._last = now
            return True


_clock = _Clock()


def give_back() -> None:
    """Give the kernel what is kept and not used, if anything is kept; at most every `SECONDS_BETWEEN`.

    For the end of a task: what many small blocks leave, freed here and there, must not add up.
    """
    library = _glibc()
    if library is not None and _keeps.is_set() and _clock.is_time():
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    known = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if known else None


def _chosen_by_user() -> bool:
    chosen = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return chosen not in ({}, _DASKS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _is_limited() -> bool:
    """Return whether the kernel counts the process's heaps against a limit, with what of them is not touched."""
    import resource

    limits = [resource.getrlimit(one)[0] for one in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return any(limit != resource.RLIM_INFINITY for limit in limits)
