"""Run one function over many shards through a window of tasks, on the current Dask client or in local threads.

A task returns a small record and never raises for what is wrong with its shard: a raising task would hide the
others' results. What does escape (a dead worker, a bug) is turned into a record by `on_error`.
"""

from __future__ import annotations

import contextvars
import io
import itertools
import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import cloudpickle

from nemo_image.engine import threads
from nemo_image.engine.allocator import give_back
from nemo_image.errors import ClusterError

logger = logging.getLogger("nemo_image")

Item = TypeVar("Item")
Record = TypeVar("Record")

_unpickling = threading.RLock()
_no_client: contextvars.ContextVar[bool] = contextvars.ContextVar("nemo_image_no_client", default=False)

TASKS_PER_THREAD = 3
"""Submitted tasks for each thread of the cluster: enough that no thread waits for the client."""

WINDOW_S = 2.0
"""Where tasks are so short that the client is what they wait for, the window grows to the tasks of so many seconds."""

STUCK_S = 60.0
"""So long no task may end before it is looked whether any can."""

LINGER_S = 0.2
"""Such tasks are fetched and submitted all at once after so many seconds: each exchange costs the client as much as
several tasks."""


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
        with threads.local_share(share, workers):
            result = function(item)
        give_back()
        return result

    with ThreadPoolExecutor(workers, thread_name_prefix="nemo-image") as pool:
        yield from _windowed(_LocalTasks(pool, task, workers + 1), items, on_error, should_stop)


def _run_on_cluster(
    client: Any,
    function: Callable[[Item], Record],
    items: Iterable[Item],
    on_error: Callable[[Item, BaseException], Record],
    should_stop: Callable[[], bool],
) -> Iterator[Record]:
    tasks = _ClusterTasks(client, function, getattr(function, "task_name", "nemo-image"))
    yield from _windowed(tasks, items, on_error, should_stop)


class _Tasks(Protocol):
    """Where tasks run; `window` is how many of them may be under way."""

    window: int

    def submit(self, items: Sequence[Any]) -> Sequence[Any]:
        """Start tasks; return their futures."""

    def finished(self, pending: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
        """Wait for some of the futures; return them with their results, or with the exceptions that they raised."""


class _LocalTasks:
    """Tasks in threads of this process."""

    def __init__(self, pool: ThreadPoolExecutor, function: Callable[[Any], Any], window: int) -> None:
        self.window = window
        self._pool = pool
        self._function = function

    def submit(self, items: Sequence[Any]) -> Sequence[Future[Any]]:
        return [self._pool.submit(contextvars.copy_context().run, self._function, item) for item in items]

    def finished(self, pending: Mapping[Future[Any], Any]) -> Iterable[tuple[Future[Any], Any]]:
        return [(one, _outcome(one)) for one in wait(pending, return_when=FIRST_COMPLETED).done]


class _ClusterTasks:
    """Tasks on a Dask cluster, exchanged with it in batches that grow where tasks are short.

    Function and items travel as bytes, which the scheduler need not understand: it would unpickle and pickle each.
    """

    def __init__(self, client: Any, function: Callable[[Any], Any], name: str) -> None:
        self._client = client
        self._function = cloudpickle.dumps(function)
        self._name = name
        self._run = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._smallest = self.window = TASKS_PER_THREAD * max(1, sum(client.nthreads().values()))
        self._done = 0
        self._since = time.monotonic()

    def submit(self, items: Sequence[Any]) -> Sequence[Any]:
        keys = [f"{self._name}-{next(self._numbers)}-{self._run}" for _ in items]
        shared: list[Shared] = []
        texts = [_dumps(item, shared) for item in items]
        futures: Sequence[Any] = self._client.map(_Unpickled(self._function, shared), texts, key=keys, pure=False)
        return futures

    def finished(self, pending: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
        while not any(future.done() for future in pending):
            self._wait(list(pending))
        if self.window > self._smallest:
            time.sleep(LINGER_S)
        done = [future for future in pending if future.done()]
        if any(future.cancelled() for future in done):
            raise self._lost()
        self._resize(len(done))
        try:
            return list(zip(done, self._client.gather(done), strict=True))
        except Exception:  # of any of them
            return [(future, _outcome(future)) for future in done]

    def _wait(self, futures: list[Any]) -> None:
        """Wait for one of the futures, or until it is time to say why none ends."""
        from distributed import wait as wait_for
        from distributed.client import FuturesCancelledError

        try:
            wait_for(futures, timeout=STUCK_S, return_when="FIRST_COMPLETED")
        except TimeoutError:
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
            if all(worker["status"] == "paused" for worker in workers):
                logger.warning(
                    "no task can run: %s", "all workers are out of memory" if workers else "no worker is left"
                )
        except FuturesCancelledError as error:
            raise self._lost() from error

    def _lost(self) -> ClusterError:
        return ClusterError(
            "the scheduler is lost, or the client was closed: start it again and run the same; finished shards are kept"
        )

    def _resize(self, done: int) -> None:
        """Fit the window to the speed of the tasks, once a whole one of them is done."""
        self._done += done
        if self._done < self.window:
            return
        now = time.monotonic()
        fitting = int(self._done / max(now - self._since, 1e-9) * WINDOW_S)
        self.window = max(self._smallest, min(fitting, 2 * self.window))
        self._done, self._since = 0, now


class Shared(bytes):
    """Bytes that many items hold: what goes to the scheduler at once has them once.

    Dask's client keeps its last thousand messages, whatever their size.
    """


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves shared bytes out, and collects them in `shared`."""

    def __init__(self, file: io.BytesIO, shared: list[Shared]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not Shared:
            return None
        for number, known in enumerate(self._shared):
            if known is value:
                return number
        self._shared.append(value)
        return len(self._shared) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Sequence[Shared]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, number: int) -> Shared:
        return self._shared[number]


def _dumps(item: Any, shared: list[Shared]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, shared).dump(item)
    return file.getvalue()


class _Unpickled:
    """Calls a pickled function with a pickled item."""

    def __init__(self, function: bytes, shared: Sequence[Shared]) -> None:
        self._function = function
        self._shared = shared

    def __call__(self, item: bytes) -> Any:
        with _unpickling:
            given = _Unpickler(io.BytesIO(item), self._shared).load()
        result = unpickled(self._function)(given)
        give_back()
        return result


def unpickled(data: bytes) -> Any:
    """Return what was pickled, by one thread of the process at a time.

    The first task imports our modules by it. Two threads that import the same modules in another order see each other's
    halves: Python lets one of them go on, where both would wait for ever.
    """
    with _unpickling:
        return pickle.loads(data)


class _Raised:
    """What a task raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _outcome(future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        return _Raised(error)


def _windowed(
    tasks: _Tasks,
    items: Iterable[Item],
    on_error: Callable[[Item, BaseException], Record],
    should_stop: Callable[[], bool],
) -> Iterator[Record]:
    source = iter(items)
    pending: dict[Any, Item] = {}
    try:
        while True:
            # `islice` takes no item beyond the window; `zip(source, range(n))` would lose one each time.
            room = 0 if should_stop() else max(0, tasks.window - len(pending))
            drawn = list(itertools.islice(source, room))
            if drawn:
                pending.update(zip(tasks.submit(drawn), drawn, strict=True))
            if not pending:
                return
            for future, outcome in tasks.finished(pending):
                item = pending.pop(future)
                yield on_error(item, outcome.error) if isinstance(outcome, _Raised) else outcome
    finally:
        for future in pending:
            future.cancel()
