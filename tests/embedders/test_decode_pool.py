"""The threads that decode: they share rows, hand on what goes wrong, and can be given up."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from nemo_image import get_client
from nemo_image.engine import threads
from nemo_image.engine.decoding import pool
from nemo_image.engine.decoding.pool import DecoderStalledError, call_in_thread, for_each_row
from nemo_image.engine.run import run_tasks
from nemo_image.engine.threads import task_share

BRIEFLY = 0.2
"""Seconds; the rows that must not run out of them end at once."""


@pytest.fixture(autouse=True)
def _own_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_pools", {})


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What a decoder waits for that hangs; set at the end, so that its thread ends too."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_every_row_once(count: int, num_threads: int) -> None:
    seen: Counter[int] = Counter()
    for_each_row(lambda row: seen.update([row]), count, num_threads)
    assert seen == Counter(range(count))


def test_rows_are_worked_on_at_the_same_time() -> None:
    together = threading.Barrier(3)
    for_each_row(lambda _: together.wait(60), 6, 3)


def test_tasks_of_one_thread_each_decode_beside_each_other() -> None:
    together = threading.Barrier(3)

    def task(_: int) -> int:
        for_each_row(lambda _: together.wait(60), 1, 1)  # broken, if one thread decodes for all
        return task_share()

    def failed(_: int, error: BaseException) -> int:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "cpu_count", lambda: 3)
        assert list(run_tasks(task, range(3), on_error=failed, count=3)) == [1, 1, 1]


def test_tasks_of_one_dask_worker_decode_beside_each_other() -> None:
    def task(_: int) -> bool:
        together = sys.modules.setdefault("together", threading.Barrier(2))  # type: ignore[arg-type]
        for_each_row(lambda _: together.wait(60), 1, 1)  # type: ignore[attr-defined]
        return True

    with get_client("cpu", n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        assert client.gather(client.map(task, range(2), pure=False)) == [True, True]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_exception_comes_to_the_caller(error: BaseException) -> None:
    seen = []

    def one(row: int) -> None:
        seen.append(row)
        if row == 2:
            raise error

    with pytest.raises(type(error)):
        for_each_row(one, 100, 1)
    assert seen == [0, 1, 2]
    for_each_row(seen.append, 3, 1)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_row_that_hangs_is_given_up_and_its_thread_replaced(hang: threading.Event) -> None:
    def one(row: int) -> None:
        if row == 1:
            hang.wait()

    with pytest.raises(DecoderStalledError, match=r"0\.2 s"):
        for_each_row(one, 4, 2, seconds=BRIEFLY)
    # Two threads that work are needed to get past this.
    together = threading.Barrier(2)
    for_each_row(lambda _: together.wait(60), 2, 2)


def test_a_thread_that_comes_back_leaves_the_pool(hang: threading.Event) -> None:
    stuck = []

    def one(row: int) -> None:
        stuck.append(threading.current_thread())
        hang.wait()

    with pytest.raises(DecoderStalledError):
        for_each_row(one, 1, 1, seconds=BRIEFLY)
    hang.set()
    stuck[0].join(60)
    assert not stuck[0].is_alive()
    ran = []
    for_each_row(ran.append, 1, 1)
    assert ran == [0]


def test_rows_behind_one_that_hangs_are_not_begun(hang: threading.Event) -> None:
    begun = []

    def one(row: int) -> None:
        begun.append(row)
        hang.wait()

    with pytest.raises(DecoderStalledError):
        for_each_row(one, 3, 1, seconds=BRIEFLY)
    hang.set()
    for_each_row(lambda _: None, 1, 1)
    assert begun == [0]


def test_the_common_limit(monkeypatch: pytest.MonkeyPatch, hang: threading.Event) -> None:
    monkeypatch.setattr(pool, "SECONDS_A_PICTURE", BRIEFLY)
    with pytest.raises(DecoderStalledError):
        for_each_row(lambda _: hang.wait(), 1, 1)


def test_a_call_in_a_thread_of_its_own(hang: threading.Event) -> None:
    assert call_in_thread(threading.current_thread) is not threading.current_thread()
    assert call_in_thread(lambda: call_in_thread(lambda: 3)) == 3
    with pytest.raises(KeyError):
        call_in_thread(lambda: {}["nothing"])
    with pytest.raises(DecoderStalledError):
        call_in_thread(hang.wait, seconds=BRIEFLY)


def test_time_in_the_queue_does_not_count() -> None:
    begun, asked = threading.Event(), threading.Event()

    def keep_the_thread(row: int) -> None:
        begun.set()
        asked.wait(60)

    slow = threading.Thread(target=for_each_row, args=(keep_the_thread, 1, 1))
    slow.start()
    assert begun.wait(60)
    waits: list[float] = []
    left = pool._Job._left

    def seen(job: pool._Job, seconds: float) -> float:
        waits.append(seconds)
        if len(waits) > 3:  # it has waited longer than it may work
            asked.set()
        return left(job, seconds)

    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool._Job, "_left", seen)
        for_each_row(done.append, 1, 1, seconds=BRIEFLY)
    slow.join()
    assert done == [0]


def test_a_hanging_thread_does_not_keep_the_process() -> None:
    code = (
        "import threading\n"
        "from nemo_image.engine.decoding.pool import DecoderStalledError, call_in_thread, for_each_row\n"
        "try:\n"
        "    for_each_row(lambda row: threading.Event().wait(), 1, 2, seconds=0.2)\n"
        "except DecoderStalledError:\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "went on\n"
