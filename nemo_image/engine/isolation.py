"""Tells whether the present task must keep its decoders away from its own process.

A picture that crashes its decoder takes the process with it, and every task of that process. What such a task was
working on is tried again inside `isolate`, where decoding belongs in a child process.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_isolated: contextvars.ContextVar[bool] = contextvars.ContextVar("nemo_image_isolated", default=False)


def isolated() -> bool:
    """Return whether pictures must be decoded in a child process."""
    return _isolated.get()


@contextlib.contextmanager
def isolate() -> Iterator[None]:
    """Have pictures decoded in a child process inside the ``with`` block, and in the threads that copy its context."""
    token = _isolated.set(True)
    try:
        yield
    finally:
        _isolated.reset(token)
