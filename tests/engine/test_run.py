"""The window of tasks: every item once, failures as records, stopping early."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_image.engine import run
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


def fail_on_fifties(number: int) -> int:
    if number % 50 == 0:
        raise ValueError(str(number))
    return number


def test_failures_among_tasks_that_are_fetched_together(scheduler: Any) -> None:
    results = list(run_tasks(fail_on_fifties, range(300), on_error=lambda item, error: f"{item} {error}", count=300))
    failed = [f"{number} {number}" for number in range(0, 300, 50)]
    assert sorted(map(str, results)) == sorted([*failed, *(str(number) for number in range(300) if number % 50)])


class Exchanges:
    """A client whose tasks are done at once; notes how many are submitted in each exchange."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def nthreads(self) -> dict[str, int]:
        return {"worker": 2}

    def map(self, function: Any, items: list[bytes], key: list[str], pure: bool) -> list[Any]:
        self.sizes.append(len(items))
        return [Done(function, item) for item in items]

    def gather(self, futures: list[Any]) -> list[Any]:
        return [future.made for future in futures]


class Done:
    def __init__(self, function: Any, item: bytes) -> None:
        self.made = function(item)

    def cancel(self) -> None:
        raise AssertionError("all are done")

    def done(self) -> bool:
        return True

    def cancelled(self) -> bool:
        return False


@pytest.mark.parametrize(("seconds", "largest"), [(0.001, 2000), (60.0, 6)])
def test_exchanges_grow_where_tasks_are_short(monkeypatch: pytest.MonkeyPatch, seconds: float, largest: int) -> None:
    client, now = Exchanges(), [0.0]

    def clock() -> float:
        return now[0]

    def doubled(number: int) -> int:
        now[0] += seconds
        return 2 * number

    # The function travels as bytes, which would copy the clock. The module's own names: other threads of this process,
    # an event loop with a cluster's messages among them, go by the real clock.
    monkeypatch.setattr(run, "cloudpickle", SimpleNamespace(dumps=lambda value: b"doubled"))
    monkeypatch.setattr(run, "pickle", SimpleNamespace(loads=lambda value: doubled))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=clock, sleep=lambda _: None))
    results = list(run_tasks(doubled, range(9000), on_error=lambda *_: -1, count=9000, client=client))
    assert results == [2 * number for number in range(9000)]
    assert max(client.sizes) == largest  # the tasks of two seconds, and three a thread at least


class Holds:
    """An item with bytes that others have too."""

    def __init__(self, number: int, text: run.Shared) -> None:
        self.number = number
        self.text = text


def number_and_length(item: Holds) -> tuple[int, int]:
    return item.number, len(item.text)


def test_shared_bytes_arrive_and_are_sent_once(scheduler: Any) -> None:
    text, other = run.Shared(b"x" * 5000), run.Shared(b"y" * 6000)
    items = [Holds(number, other if number % 3 else text) for number in range(20)]
    results = list(run_tasks(number_and_length, items, on_error=lambda *error: error, count=20))
    assert sorted(results) == [(number, 6000 if number % 3 else 5000) for number in range(20)]
    shared: list[run.Shared] = []
    assert all(len(run._dumps(item, shared)) < 500 for item in items)
    assert shared == [text, other]


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["paused", "paused"], ["no task can run: all workers are out of memory"]),
        ([], ["no task can run: no worker is left"]),
        (["paused", "running"], []),
    ],
)
def test_a_run_that_stands_still_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, states: list[str], said: list[str]
) -> None:
    class Cluster(Exchanges):
        def scheduler_info(self, n_workers: int) -> Any:
            return {"workers": {str(number): {"status": state} for number, state in enumerate(states)}}

    def never(futures: Any, timeout: float, return_when: str) -> None:
        raise TimeoutError

    monkeypatch.setattr("distributed.wait", never)
    with caplog.at_level(logging.WARNING):
        run._ClusterTasks(Cluster(), abs, "name")._wait([])
    assert caplog.messages == said
