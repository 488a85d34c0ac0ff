"""What was found out about the last few source shards, for the tasks of an export that follow each other on a worker.

An input shard may go into a hundred output shards. Each of their tasks needs its index and the rows that pass.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps the values last used, up to a sum of weights. Threads that want the same value wait.

    Parameters
    ----------
    weigh : callable
        The weight of a value.
    at_most : int
        Sum of the weights kept.
    last_anyway : bool, default True
        Keep the last value though it weighs more.
    """

    def __init__(self, weigh: Callable[[T], int], at_most: int, *, last_anyway: bool = True) -> None:
        self._weigh = weigh
        self._at_most = at_most
        self._least = int(last_anyway)
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._weights: dict[Hashable, int] = {}
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `key`, made now if it is not there."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]
            try:
                value = make()
            finally:
                with self._lock:
                    self._making.pop(key, None)
            weight = self._weigh(value)
            with self._lock:
                self._values[key] = value
                self._weights[key] = weight
                while len(self._values) > self._least and sum(self._weights.values()) > self._at_most:
                    del self._weights[self._values.popitem(last=False)[0]]
            return value
