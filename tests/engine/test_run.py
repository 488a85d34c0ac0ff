"""The window of tasks: every item once, failures as records, stopping early."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nemo_image.engine.run import TASKS_PER_THREAD, run_tasks


def double(number: int) -> int:
    return 2 * number


def fail_on_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def die_on_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


@pytest.mark.parametrize("count", [1, 2, 5, TASKS_PER_THREAD * 2 + 1, 50])
def test_every_item_once(scheduler: Any, count: int) -> None:
    results = list(run_tasks(double, iter(range(count)), on_error=lambda *_: -1, count=count))
    assert sorted(results) == [2 * number for number in range(count)]


def test_no_items(scheduler: Any) -> None:
    assert list(run_tasks(double, [], on_error=lambda *_: -1, count=0)) == []


def test_a_raising_task_is_a_record(scheduler: Any) -> None:
    results = list(run_tasks(fail_on_three, range(6), on_error=lambda item, error: (item, str(error)), count=6))
    assert (3, "three") in results
    assert len(results) == 6


def test_a_window_of_items_is_drawn_at_a_time(scheduler: Any) -> None:
    drawn: list[int] = []

    def items() -> Any:
        for number in range(1000):
            drawn.append(number)
            yield number

    running = run_tasks(double, items(), on_error=lambda *_: -1, count=1000)
    for _ in range(5):
        next(running)
    assert len(drawn) < 100
    running.close()


def test_stopping_starts_no_further_task(scheduler: Any) -> None:
    done: list[int] = []
    results = run_tasks(double, range(1000), on_error=lambda *_: -1, count=1000, should_stop=lambda: len(done) >= 3)
    done.extend(results)
    assert 3 <= len(done) < 100


def test_a_dead_worker_is_a_record() -> None:
    from dask import config
    from distributed import Client, LocalCluster

    with (
        config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
        client.as_current(),
    ):
        results = list(run_tasks(die_on_three, range(5), on_error=lambda item, error: type(error).__name__, count=5))
    # Tasks that waited on the same worker may be counted as its victims too; none is missing, and the first, which
    # was done before the deadly one was submitted, is whole.
    assert len(results) == 5
    assert {0} <= {one for one in results if isinstance(one, int)} <= {0, 1, 2, 4}
    assert "KilledWorker" in results
