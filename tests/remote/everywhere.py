"""What workers must know too, where a test's work is theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nemo_image.shards import retries


def set_environment(values: Mapping[str, str | None]) -> None:
    """Set environment variables; None removes one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def set_enough(seconds: float) -> None:
    """Set the time after which nothing is tried again."""
    retries.ENOUGH_S = seconds


@contextmanager
def environment(everywhere: Any, values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    everywhere(set_environment, values)
    try:
        yield
    finally:
        everywhere(set_environment, before)
