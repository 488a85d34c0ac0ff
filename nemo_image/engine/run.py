"""Run one function over many shards through a window of tasks, on the current Dask client or in local threads.

A task returns a small record and never raises for what is wrong with its shard: a raising task would hide the
others' results. What does escape (a dead worker, a bug) is turned into a record by `on_error`.
"""

from __future__ import annotations

import contextvars
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from nemo_image.engine import threads

Item = TypeVar("Item")
Record = TypeVar("Record")

_no_client: contextvars.ContextVar[bool] = contextvars.ContextVar("nemo_image_no_client", default=False)

TASKS_PER_THREAD = 3
"""Submitted tasks for each thread of the cluster: enough that no thread waits for the client."""


def current_client() -> Any | None:
    """Return the Dask client that the caller works with, or None."""
    if _no_client.get():
        return None
    try:
        from distributed import default_client

        return default_client()
    except (ImportError, ValueError):
        return None


@contextmanager
def without_client() -> Iterator[None]:
    """Have tasks run in threads of this process inside the ``with`` block, whether there is a client or not."""
    token = _no_client.set(True)
    try:
        yield
    finally:
        _no_client.reset(token)


def run_tasks(
    function: Callable[[Item], Record],
    items: Iterable[Item],
    *,
    on_error: Callable[[Item, BaseException], Record],
    count: int,
    client: Any | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Yield ``function(item)`` for each item, as tasks finish.

    Parameters
    ----------
    function : callable
        Runs on a worker; picklable.
    items : iterable
        Drawn lazily: only a window of tasks exists at any time.
    on_error : callable
        Makes the record of an item whose task raised or whose worker died.
    count : int
        The number of items.
    client : distributed.Client, optional
        The current client by default; without one, local threads.
    should_stop : callable
        Asked before each new task; once true, no further task is started and those under way are waited for.
    """
    if count == 0:
        return
    client = client if client is not None else current_client()
    if client is None:
        yield from _run_locally(function, items, on_error, count, should_stop)
    else:
        yield from _run_on_cluster(client, function, items, on_error, should_stop)


def _run_locally(
    function: Callable[[Item], Record],
    items: Iterable[Item],
    on_error: Callable[[Item, BaseException], Record],
    count: int,
    should_stop: Callable[[], bool],
) -> Iterator[Record]:
    cores = threads.cpu_count()
    workers = min(cores, count)
    share = cores // workers

    def task(item: Item) -> Record:
        with threads.local_share(share):
            return function(item)

    with ThreadPoolExecutor(workers, thread_name_prefix="nemo-image") as pool:

        def submit(item: Item) -> Future[Record]:
            return pool.submit(contextvars.copy_context().run, task, item)

        def finished(pending: Sequence[Future[Record]]) -> Iterable[Future[Record]]:
            return wait(pending, return_when=FIRST_COMPLETED).done

        yield from _windowed(submit, finished, items, workers + 1, on_error, should_stop)


def _run_on_cluster(
    client: Any,
    function: Callable[[Item], Record],
    items: Iterable[Item],
    on_error: Callable[[Item, BaseException], Record],
    should_stop: Callable[[], bool],
) -> Iterator[Record]:
    from distributed import wait as wait_for

    run_id = uuid.uuid4().hex
    numbers = itertools.count()

    def submit(item: Item) -> Any:
        key = f"{getattr(function, 'task_name', 'nemo-image')}-{next(numbers)}-{run_id}"
        return client.submit(function, item, key=key, pure=False)

    def finished(pending: Sequence[Any]) -> Iterable[Any]:
        done: Iterable[Any] = wait_for(list(pending), return_when="FIRST_COMPLETED").done
        return done

    window = TASKS_PER_THREAD * max(1, sum(client.nthreads().values()))
    yield from _windowed(submit, finished, items, window, on_error, should_stop)


def _windowed(
    submit: Callable[[Item], Any],
    finished: Callable[[Sequence[Any]], Iterable[Any]],
    items: Iterable[Item],
    window: int,
    on_error: Callable[[Item, BaseException], Record],
    should_stop: Callable[[], bool],
) -> Iterator[Record]:
    source = iter(items)
    pending: dict[Any, Item] = {}
    try:
        while True:
            # `islice` takes no item beyond the window; `zip(source, range(n))` would lose one each time.
            if not should_stop():
                for item in itertools.islice(source, window - len(pending)):
                    pending[submit(item)] = item
            if not pending:
                return
            for future in finished(list(pending)):
                item = pending.pop(future)
                yield _outcome(future, item, on_error)
    finally:
        for future in pending:
            future.cancel()


def _outcome(future: Any, item: Item, on_error: Callable[[Item, BaseException], Record]) -> Record:
    try:
        record: Record = future.result()
    except Exception as error:
        return on_error(item, error)
    return record
