"""Torch's number of threads: one thread's own, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_image.engine.threads import (
    cpu_count,
    local_share,
    set_own_torch_threads,
    task_share,
    tasks_at_once,
    torch_threads,
)


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_new_thread(function: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as one:
        return one.submit(function).result()


def test_inside_and_after() -> None:
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        assert in_new_thread(torch.get_num_threads) == 3
        with torch_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_many_threads_at_once_leave_the_others_alone() -> None:
    barrier = threading.Barrier(8)

    def task(count: int) -> int:
        barrier.wait()
        with torch_threads(count):
            barrier.wait()
            return torch.get_num_threads()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(task, range(1, 9))) == list(range(1, 9))
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_for_good_in_one_thread() -> None:
    def task() -> int:
        set_own_torch_threads(1)
        return torch.get_num_threads()

    assert in_new_thread(task) == 1
    assert in_new_thread(torch.get_num_threads) == 3


def test_shares() -> None:
    assert task_share() == cpu_count()
    assert in_new_thread(task_share) == 1
    assert tasks_at_once() == 1
    with local_share(5):
        assert (task_share(), tasks_at_once()) == (5, 1)
    with local_share(2, at_once=3):
        assert (task_share(), tasks_at_once()) == (2, 3)
