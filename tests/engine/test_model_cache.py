from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace

import dask
import pytest

from nemo_image.engine import model_cache
from nemo_image.engine.model_cache import ModelSpec, clear_models, get_model

SPEC = ModelSpec("custom", "net", "00", "float32", "cpu")
THREADS = 16


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    clear_models()
    yield
    clear_models()


class Loader:
    """Counts its calls; the first one lasts until every other thread has asked for the model."""

    def __init__(self, asking: int) -> None:
        self.calls = 0
        self.count = threading.Lock()
        self.asked = threading.Semaphore(0)
        self.asking = asking

    def load(self) -> object:
        with self.count:
            self.calls += 1
            first = self.calls == 1
        if first:
            for _ in range(self.asking - 1):
                assert self.asked.acquire(timeout=30)
        return object()

    def get(self) -> object:
        # Released before the call: a thread may still be on its way to the cache when the load ends, and gets the
        # copy then; without a lock, those that are in time load copies of their own.
        self.asked.release()
        return get_model(SPEC, self.load)


def _everywhere(function: Callable[[], object], threads: int = THREADS) -> list[object]:
    start = threading.Barrier(threads)

    def work() -> object:
        start.wait(timeout=30)
        return function()

    with ThreadPoolExecutor(threads) as pool:
        return [future.result(timeout=60) for future in [pool.submit(work) for _ in range(threads)]]


def test_many_threads_load_one_copy() -> None:
    loader = Loader(THREADS)
    models = _everywhere(loader.get)
    assert loader.calls == 1
    assert len({id(model) for model in models}) == 1


def test_the_check_finds_copies_where_the_cache_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: the same threads over a plain check-then-load."""
    found: dict[ModelSpec, object] = {}
    looked = threading.Barrier(THREADS)

    def without_lock(spec: ModelSpec, load: Callable[[], object]) -> object:
        if spec not in found:
            looked.wait(timeout=30)
            found[spec] = load()
        return found[spec]

    monkeypatch.setitem(globals(), "get_model", without_lock)
    loader = Loader(THREADS)
    _everywhere(loader.get)
    assert loader.calls == THREADS


def test_equal_specs_share_and_every_field_separates() -> None:
    first = get_model(SPEC, object)
    assert get_model(ModelSpec("custom", "net", "00", "float32", "cpu", ()), object) is first
    others = {
        "kind": "timm",
        "name": "other",
        "weights_sha256": "01",
        "dtype": "bfloat16",
        "device": "cuda",
        "extra": (1,),
    }
    models = [first, *(get_model(replace(SPEC, **{field: value}), object) for field, value in others.items())]
    assert len({id(model) for model in models}) == 1 + len(others)


def test_a_spec_cannot_be_changed_under_the_cache() -> None:
    with pytest.raises(FrozenInstanceError):
        SPEC.name = "x"  # type: ignore[misc]


def test_none_is_a_model_too() -> None:
    calls: list[int] = []
    for _ in range(2):
        assert get_model(SPEC, lambda: calls.append(1)) is None
    assert calls == [1]


def test_different_models_load_at_the_same_time() -> None:
    both = threading.Barrier(2)
    specs = iter([SPEC, replace(SPEC, name="other")])
    taken = threading.Lock()

    def load_one() -> object:
        with taken:
            spec = next(specs)
        # Breaks (and fails) unless the other load runs meanwhile.
        return get_model(spec, lambda: both.wait(timeout=30))

    assert sorted(map(str, _everywhere(load_one, 2))) == ["0", "1"]


def test_a_load_may_ask_for_another_model() -> None:
    outer = get_model(SPEC, lambda: ["outer", get_model(replace(SPEC, name="inner"), lambda: "inner")])
    assert outer == ["outer", "inner"]


def test_a_failing_load_raises_in_every_waiter_and_is_forgotten() -> None:
    loading, release = threading.Event(), threading.Event()
    waiting = threading.Semaphore(0)
    calls: list[int] = []

    def load() -> object:
        calls.append(1)
        loading.set()
        assert release.wait(timeout=30)
        raise ValueError("no weights")

    class Watched(model_cache.Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> object:
            waiting.release()
            return super().result(timeout)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(model_cache, "Future", Watched)
        first = pool.submit(get_model, SPEC, load)
        assert loading.wait(timeout=30)
        others = [pool.submit(get_model, SPEC, load) for _ in range(3)]
        for _ in others:
            assert waiting.acquire(timeout=30)
        release.set()
        for future in [first, *others]:
            with pytest.raises(ValueError, match="no weights"):
                future.result(timeout=30)
    assert calls == [1]
    assert get_model(SPEC, lambda: "better") == "better"


def test_clearing_during_a_load_leaves_that_load_alone() -> None:
    def load() -> str:
        clear_models()
        return "old"

    assert get_model(SPEC, load) == "old"
    assert get_model(SPEC, lambda: "new") == "new"


def test_a_failure_does_not_remove_a_later_load_of_the_same_model() -> None:
    def load() -> str:
        clear_models()
        assert get_model(SPEC, lambda: "later") == "later"
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        get_model(SPEC, load)
    assert get_model(SPEC, lambda: "again") == "later"


def _pid_of_model() -> tuple[int, str]:
    return os.getpid(), get_model(SPEC, lambda: uuid.uuid4().hex)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_one_copy_a_process_under_each_scheduler(scheduler: str) -> None:
    tasks = [dask.delayed(_pid_of_model, pure=False)() for _ in range(8)]
    seen = dask.compute(*tasks, scheduler=scheduler, num_workers=2)
    assert len(set(seen)) == len({pid for pid, _ in seen})
