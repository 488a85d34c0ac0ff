"""Threads that decode, and that can be given up.

A thread that hangs in a decoder cannot be ended. So a picture has a time limit; after it the caller goes on, another
thread takes the stuck one's place, and nobody joins it: all are daemons, and the process can exit.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from nemo_image.engine.allocator import keep_freed_memory
from nemo_image.engine.threads import set_own_torch_threads, tasks_at_once
from nemo_image.errors import ShardError

T = TypeVar("T")

SECONDS_A_PICTURE = 120.0
"""Longest time for a picture, or for a batch of DALI's. The largest pictures need seconds; a machine may be busy."""


class DecoderStalledError(ShardError):
    """A picture took longer than its time limit, and its thread was given up."""


def for_each_row(one: Callable[[int], None], count: int, num_threads: int, seconds: float | None = None) -> None:
    """Call ``one(row)`` for every row below `count`, in threads of the process's pool.

    Parameters
    ----------
    num_threads : int
        Threads for each of the tasks that run in the process at the same time. They share them all: what one leaves
        idle helps the others.
    seconds : float, optional
        Longest time for one row; `SECONDS_A_PICTURE` by default.

    Raises
    ------
    DecoderStalledError
        If a row takes longer. Threads that are still in a row then finish it unheard, or never.
    Exception
        The first that `one` raised; rows that had not begun by then are left out.
    """
    pool = _pool(num_threads * tasks_at_once())
    job = _Job(one, count)
    takers = min(num_threads, count)
    for _ in range(takers):
        pool.submit(job.take)
    try:
        job.wait(takers, SECONDS_A_PICTURE if seconds is None else seconds)
    except BaseException:
        for _ in range(job.give_up()):
            pool.add_thread()
        raise


def call_in_thread(function: Callable[[], T], seconds: float | None = None) -> T:
    """Call a function that has threads of its own, in one that can be given up.

    Parameters
    ----------
    seconds : float, optional
        Longest time for it; `SECONDS_A_PICTURE` by default.

    Raises
    ------
    DecoderStalledError
        If it takes longer. Its thread then finishes unheard, or never.
    Exception
        What the function raises.
    """
    results: list[T] = []
    job = _Job(lambda _: results.append(function()), 1)
    threading.Thread(target=job.take, name="nemo-image-decode", daemon=True).start()
    job.wait(1, SECONDS_A_PICTURE if seconds is None else seconds)
    return results[0]


class _Job:
    """Rows that threads take as they get free, because pictures differ in size."""

    def __init__(self, one: Callable[[int], None], count: int) -> None:
        self._one = one
        self._waiting = deque(range(count))
        self._since: dict[int, float] = {}
        self._given_up: set[int] = set()
        self._lock = threading.Lock()
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def take(self) -> bool:
        """Work in a thread of the pool; return whether the thread was given up meanwhile."""
        thread = threading.get_ident()
        failure = None
        try:
            while (row := self._next(thread)) is not None:
                self._one(row)
        except BaseException as error:  # handed to the caller, who raises it
            failure = error
        with self._lock:
            self._since.pop(thread, None)
            if failure is not None:
                self._waiting.clear()
        self._ended.put(failure)
        return thread in self._given_up

    def _next(self, thread: int) -> int | None:
        with self._lock:
            if not self._waiting:
                return None
            self._since[thread] = time.monotonic()
            return self._waiting.popleft()

    def wait(self, takers: int, seconds: float) -> None:
        failures = []
        while takers:
            try:
                failure = self._ended.get(timeout=self._left(seconds))
            except queue.Empty:
                if self._left(seconds) <= 0:
                    raise DecoderStalledError(
                        f"a picture was not decoded within {seconds:g} s: its decoder hangs, or the machine is "
                        "overloaded"
                    ) from None
                continue
            takers -= 1
            failures += [] if failure is None else [failure]
        if failures:
            raise failures[0]

    def _left(self, seconds: float) -> float:
        """Return the seconds that the slowest row may still take. Rows that wait for a thread have all their time."""
        with self._lock:
            now = time.monotonic()
            return max(0.0, min(self._since.values(), default=now) + seconds - now)

    def give_up(self) -> int:
        """Start no further row; return how many threads are still in one, and will leave the pool after it."""
        with self._lock:
            self._waiting.clear()
            self._given_up = set(self._since)
            return len(self._given_up)


class _Pool:
    def __init__(self, num_threads: int) -> None:
        keep_freed_memory()
        self._tasks: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        for _ in range(num_threads):
            self.add_thread()

    def submit(self, task: Callable[[], bool]) -> None:
        self._tasks.put(task)

    def add_thread(self) -> None:
        threading.Thread(target=self._work, name="nemo-image-decode", daemon=True).start()

    def _work(self) -> None:
        set_own_torch_threads(1)  # the threads are the parallelism: inside each of them torch works alone
        while not self._tasks.get()():
            pass


_pools: dict[tuple[int, int], _Pool] = {}
_pools_lock = threading.Lock()


def _pool(num_threads: int) -> _Pool:
    """Return the process's pool of that many threads: one for all preprocessors, and a new one after a fork."""
    key = (os.getpid(), num_threads)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = _Pool(num_threads)
        return _pools[key]
