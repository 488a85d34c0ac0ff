from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nemo_image.engine.prefetch import prefetch


def test_order_and_content() -> None:
    assert list(prefetch(range(100), depth=3)) == list(range(100))


def test_an_error_comes_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    running = prefetch(items())
    assert [next(running), next(running)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(running)


def test_no_more_than_depth_is_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    running = prefetch(items(), depth=2)
    next(running)
    # One taken, two queued, one in the producer's hand.
    assert len(made) <= 4
    running.close()


def test_leaving_early_stops_the_thread() -> None:
    before = threading.active_count()
    running = prefetch(iter(range(1000)))
    next(running)
    assert threading.active_count() == before + 1
    running.close()
    assert threading.active_count() == before
