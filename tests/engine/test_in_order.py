"""Several calls at once, results in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nemo_image.engine.in_order import map_in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 30])
def test_results_are_in_order(workers: int, count: int) -> None:
    assert list(map_in_order(lambda one: one * one, range(count), workers)) == [one * one for one in range(count)]


def test_calls_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=30)
    places = list(map_in_order(lambda _: meeting.wait(), range(3), 3))
    assert sorted(places) == [0, 1, 2]


def test_few_items_are_drawn_ahead() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    found = map_in_order(lambda one: one, items(), 2)
    assert next(found) == 0
    assert len(drawn) == 3
    found.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_comes_at_its_place(workers: int) -> None:
    def inverse(number: int) -> float:
        return 1 / number

    found = map_in_order(inverse, [2, 1, 0, 1], workers)
    assert [next(found), next(found)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_threads_are_prepared_once_each() -> None:
    prepared: list[str] = []
    names = set(
        map_in_order(
            lambda _: threading.current_thread().name,
            range(50),
            2,
            lambda: prepared.append(threading.current_thread().name),
        )
    )
    assert names <= set(prepared)
    assert len(prepared) == len(set(prepared)) <= 2
