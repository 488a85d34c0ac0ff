"""Freed memory is kept for the next layer or picture, unless somebody else decides about it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_image import get_client
from nemo_image.engine import allocator, model_cache, run
from nemo_image.engine.decoding import pool

pytestmark = pytest.mark.skipif(
    allocator._glibc() is None or bool(allocator._chosen_by_user()), reason="glibc with its own settings is needed"
)

DASKS = {"MALLOC_TRIM_THRESHOLD_": "65536"}
PAGES = 20 * 2**20 // 4096
"""Of a block of 20 MiB."""

FAULTS = """
import resource
import threading

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [b"x" * (20 * 2**20) for _ in range(5)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults_in_thread():
    found = []
    thread = threading.Thread(target=lambda: (faults(), found.append(faults())))
    thread.start()
    thread.join()
    return found[0]

"""


def huge_pages() -> bool:
    """Return whether the kernel maps memory in pages of 2 MiB unasked: then there are few faults anyway."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return not setting.exists() or "[always]" in setting.read_text()


def said(code: str, **variables: str) -> list[str]:
    """Return the words that a new process prints, with no setting of malloc's but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS + code],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.split()


@pytest.mark.parametrize("variables", [{}, DASKS], ids=["plain", "as Dask starts workers"])
def test_blocks_are_not_mapped_anew(variables: Mapping[str, str]) -> None:
    code = (
        "from nemo_image.engine.allocator import keep_freed_memory\n"
        "faults(); before = faults()\n"
        "print(keep_freed_memory()); faults(); print(before, faults(), faults_in_thread())\n"
    )
    done, before, after, in_thread = said(code, **variables)
    assert done == "True"
    assert max(int(after), int(in_thread)) < PAGES // 2  # not even those of one of fifty blocks
    if variables and not huge_pages():
        assert int(before) > 49 * PAGES  # what there is to save


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {**DASKS, "MALLOC_TOP_PAD_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=5"},
    ],
)
def test_the_users_own_settings_stand(variables: Mapping[str, str]) -> None:
    assert said("from nemo_image.engine.allocator import *\nprint(keep_freed_memory())\n", **variables) == ["False"]


def test_limited_processes_keep_nothing() -> None:
    code = (
        "resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))\n"
        "from nemo_image.engine.allocator import *\nprint(keep_freed_memory())\n"
    )
    assert said(code) == ["False"]


def test_what_is_kept_is_given_back() -> None:
    code = (
        "from pathlib import Path\n"
        "from nemo_image.engine import allocator\n"
        "def mib():\n"
        "    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 // 2**20\n"
        "allocator.keep_freed_memory()\n"
        "blocks = [b'x' * (2**20 + number) for number in range(300)]\n"
        "last = b'y' * 2**20\n"  # nothing before it is the top of the heap
        "del blocks; full = mib()\n"
        "allocator.give_back(); early = mib()\n"
        "allocator.SECONDS_BETWEEN = 0.0\n"
        "allocator.give_back(); print(full - early, early - mib())\n"
    )
    early, late = said(code)
    assert int(early) < 50
    assert int(late) > 250


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_models_on_the_cpu_ask_for_it(monkeypatch: pytest.MonkeyPatch, device: str, times: int) -> None:
    asked: list[int] = []
    monkeypatch.setattr(model_cache, "_models", {})
    monkeypatch.setattr(model_cache, "keep_freed_memory", lambda: asked.append(1))
    assert model_cache.get_model(model_cache.ModelSpec("", "", "", "", device), lambda: 3) == 3
    assert len(asked) == times


def test_decoders_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pool, "_pools", {})
    monkeypatch.setattr(pool, "keep_freed_memory", lambda: asked.append(1))
    pool.for_each_row(lambda _: None, 1, 1)
    assert asked == [1]


def test_in_a_worker_that_dask_started() -> None:
    def worker(_: int) -> tuple[str | None, Any]:
        from nemo_image.engine.allocator import keep_freed_memory

        return os.environ.get("MALLOC_TRIM_THRESHOLD_"), keep_freed_memory()

    with get_client("cpu", n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        assert client.submit(worker, 0).result() == ("65536", True)


def test_tasks_give_back_what_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(run, "give_back", lambda: asked.append(1))

    def failed(_: int, error: BaseException) -> int:
        raise error

    assert list(run.run_tasks(abs, [-1, 2], on_error=failed, count=2)) in ([1, 2], [2, 1])
    assert len(asked) == 2
    assert run._Unpickled(pickle.dumps(abs), [])(pickle.dumps(-3)) == 3
    assert len(asked) == 3


def test_giving_back_does_not_begin_to_keep() -> None:
    code = (
        "from nemo_image.engine import allocator\n"
        "allocator.SECONDS_BETWEEN = 0.0\n"
        "allocator.give_back(); print(allocator.keep_freed_memory.cache_info().currsize)\n"
    )
    assert said(code) == ["0"]
