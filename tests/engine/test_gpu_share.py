"""Sharing a GPU inside a process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_image.engine.gpu_share import GpuShares


@pytest.mark.parametrize(("gpus", "at_once"), [(0.25, 4), (0.5, 2), (1.0, 1), (1 / 3, 3), (0.3, 3), (0.0, 8)])
def test_as_many_at_once_as_shares_fit(gpus: float, at_once: int) -> None:
    shares = GpuShares()
    full = threading.Barrier(at_once)
    inside = most = 0
    lock = threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with shares.share(gpus):
            with lock:
                inside += 1
                most = max(most, inside)
            full.wait(10)  # broken, and an error, if fewer than that get in
            with lock:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(at_once * 3)))
    assert most == at_once


def test_a_large_share_is_not_overtaken_for_ever() -> None:
    shares = GpuShares()
    order = []
    small_in, release = threading.Event(), threading.Event()

    def small(name: str) -> None:
        with shares.share(0.5):
            order.append(name)
            small_in.set()
            release.wait(10)

    def whole() -> None:
        with shares.share(1.0):
            order.append("whole")

    first = threading.Thread(target=small, args=("first",))
    first.start()
    small_in.wait(10)
    second = threading.Thread(target=whole)
    second.start()
    while len(shares._waiting) < 1:
        pass
    third = threading.Thread(target=small, args=("third",))
    third.start()
    while len(shares._waiting) < 2:
        pass
    release.set()
    for one in (first, second, third):
        one.join(10)
    assert order == ["first", "whole", "third"]


def test_a_share_is_given_back_when_the_work_fails() -> None:
    shares = GpuShares()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="it failed"), shares.share(1.0):
            raise RuntimeError("it failed")
