"""Share a worker's GPU between the tasks that it runs at the same time.

A semaphore inside the worker's process, no resource of Dask's: a cluster that was not started with such a resource
would leave tasks that ask for it pending for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

UNITS = 1000
"""A GPU's parts: shares are rounded to them, so that three thirds are one."""


class GpuShares:
    """The shares of one GPU, given out in the order in which they are asked for."""

    def __init__(self) -> None:
        self._free = UNITS
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def share(self, gpus: float) -> Iterator[None]:
        """Hold a share inside the ``with`` block, waiting until there is one.

        Parameters
        ----------
        gpus : float
            In [0, 1]; 0 waits for nothing.
        """
        units = int(gpus * UNITS)
        me = object()
        with self._changed:
            self._waiting.append(me)
            self._changed.wait_for(lambda: self._waiting[0] is me and self._free >= units)
            self._waiting.popleft()
            self._free -= units
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += units
                self._changed.notify_all()


_shares = GpuShares()


def gpu_share(gpus: float) -> AbstractContextManager[None]:
    """Hold a share of this process's GPU inside a ``with`` block; see :meth:`GpuShares.share`."""
    return _shares.share(gpus)
