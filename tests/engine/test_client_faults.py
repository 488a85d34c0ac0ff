"""Faults of a real cluster in the middle of a save: what the user sees, and that a rerun is right."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_image import get_client
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ClusterError, RunError
from tests.makers import make_dataset

SHARDS = {f"{number:05d}": 3 for number in range(6)}
HALF = 9  # the first sample of the fourth shard
PATIENCE_S = 60.0
GROUP_BYTES = 1 << 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "in", SHARDS)


def enrich(source: Path, output: Path, step: Callable[[Any], Any]) -> None:
    """Save a column that is computed from rows that `step` has seen, and may have waited with."""
    dataset = ImageTextPairDataset.from_webdataset(source)
    dataset.metadata = dataset.metadata.map_partitions(step, meta=dataset.metadata._meta)
    dataset.metadata["twice"] = dataset.metadata["seed"] * 2
    dataset.save_metadata(output)


def twice(output: Path) -> list[int]:
    return [one for path in sorted(output.glob("*.parquet")) for one in pq.read_table(path)["twice"].to_pylist()]


def in_second_half(frame: Any) -> bool:
    return len(frame) > 0 and frame["seed"].iloc[0] >= HALF


def wait_for_file(frame: Any, name: str) -> Any:
    while in_second_half(frame) and not os.path.exists(name):
        time.sleep(0.05)
    return frame


def hog_once(frame: Any, name: str) -> Any:
    """Take memory until somebody ends this process; the first time only."""
    if in_second_half(frame) and not os.path.exists(name):
        Path(name).touch()
        taken = []
        while True:
            taken.append(bytearray(b"x" * (16 << 20)))
            time.sleep(0.01)
    return frame


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def saved(output: Path) -> int:
    return len(list(output.glob("*.parquet")))


def test_a_worker_that_takes_too_much_memory(source: Path, tmp_path: Path) -> None:
    """It is ended and started again, its shard is computed again, and the save succeeds."""
    with get_client("cpu", n_workers=2, threads_per_worker=1, memory_limit="1 GiB") as client:
        before = set(client.run(os.getpid).values())
        enrich(source, tmp_path / "out", partial(hog_once, name=str(tmp_path / "hogged")))
        assert (tmp_path / "hogged").exists()
        assert before - set(client.run(os.getpid).values()), "no worker was ended"
    assert twice(tmp_path / "out") == [2 * seed for seed in range(18)]


def test_the_kernel_kills_a_worker(source: Path, tmp_path: Path, memory_group: MemoryGroup) -> None:
    """As where a job's memory is bounded and the workers' is not: nothing warns, and the process is gone."""
    with get_client("cpu", n_workers=2, threads_per_worker=1, memory_limit=0) as client:
        before = set(client.run(os.getpid).values())
        for pid in before:
            memory_group.add(pid)
        enrich(source, tmp_path / "out", partial(hog_once, name=str(tmp_path / "hogged")))
        # The kernel may choose the other one first.
        assert memory_group.kills() >= 1
        assert before - set(client.run(os.getpid).values())
    assert twice(tmp_path / "out") == [2 * seed for seed in range(18)]


def test_the_kernel_kills_every_worker_that_takes_a_shard(
    source: Path, tmp_path: Path, memory_group: MemoryGroup
) -> None:
    with get_client("cpu", n_workers=2, threads_per_worker=1, memory_limit=0) as client:
        join_group = partial(hog_in_group, group=memory_group, names=str(tmp_path / "hogged"))
        with pytest.raises(RunError, match=r"1 of 6 shards failed, the others are finished.*00003: ") as caught:
            enrich(source, tmp_path / "out", join_group)
        assert list(caught.value.failures) == ["00003"]
        assert memory_group.kills() > 1
        assert len(list(tmp_path.glob("hogged-*"))) > 1
        # With the memory that it needs, the same again.
        enrich(source, tmp_path / "out", lambda frame: frame)
        assert client.status == "running"
    assert twice(tmp_path / "out") == [2 * seed for seed in range(18)]


def hog_in_group(frame: Any, group: MemoryGroup, names: str) -> Any:
    """Take memory in one shard, each time that it is tried, in a process of bounded memory."""
    if len(frame) > 0 and frame["seed"].iloc[0] == HALF:
        group.add(os.getpid())
        return hog_once(frame, f"{names}-{os.getpid()}")
    return frame


class MemoryGroup:
    """A control group of processes whose memory the kernel bounds (cgroups of version 1 or 2)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def limit(self, size: int) -> None:
        one = self.folder / "memory.limit_in_bytes"
        (one if one.exists() else self.folder / "memory.max").write_text(str(size))

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        one = self.folder / "memory.oom_control"
        text = (one if one.exists() else self.folder / "memory.events").read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])


@pytest.fixture
def memory_group() -> Iterator[MemoryGroup]:
    parent = Path("/sys/fs/cgroup/memory")
    folder = (parent if parent.is_dir() else parent.parent) / f"nemo-image-test-{os.getpid()}"
    group = MemoryGroup(folder)
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error}): needs root")
    try:
        try:
            group.limit(GROUP_BYTES)
            group.kills()
        except (OSError, KeyError) as error:
            pytest.skip(f"control groups do not bound memory here ({error})")
        yield group
    finally:
        # Empty once its processes are gone.
        until(lambda: not (folder / "cgroup.procs").read_text().split())
        folder.rmdir()


def test_a_slow_worker_holds_up_its_own_shard_only(source: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    seen: list[int] = []

    def open_when_others_are_done() -> None:
        until(lambda: saved(tmp_path / "out") == 5)
        seen.append(saved(tmp_path / "out"))
        gate.touch()

    opener = threading.Thread(target=open_when_others_are_done)
    opener.start()
    try:
        with get_client("cpu", n_workers=2, threads_per_worker=1):
            enrich(source, tmp_path / "out", partial(wait_for_last, name=str(gate)))
    finally:
        gate.touch()
        opener.join()
    assert seen == [5]
    assert twice(tmp_path / "out") == [2 * seed for seed in range(18)]


def wait_for_last(frame: Any, name: str) -> Any:
    while len(frame) > 0 and frame["seed"].iloc[0] == HALF and not os.path.exists(name):
        time.sleep(0.05)
    return frame


def test_a_scheduler_that_is_lost(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = partial(subprocess.Popen, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    dask = (sys.executable, "-m", "dask")
    scheduler = start([*dask, "scheduler", "--scheduler-file", file, "--port", "0", "--dashboard-address", ":0"])
    worker = start([*dask, "worker", "--scheduler-file", file, "--nthreads", "1", "--nworkers", "2", "--no-dashboard"])
    gate = tmp_path / "gate"
    step = partial(wait_for_file, name=str(gate))

    def kill_half_way() -> None:
        until(lambda: saved(tmp_path / "out") == 3)
        scheduler.kill()

    killer = threading.Thread(target=kill_half_way)
    try:
        until(file.exists)
        with get_client(scheduler_file=file, n_workers=2):
            killer.start()
            with pytest.raises(ClusterError, match=r"the scheduler is lost.*finished shards are kept"):
                enrich(source, tmp_path / "out", step)
            killer.join()
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert sorted(finished) == [f"{name}.parquet" for name in list(SHARDS)[:3]]
    gate.touch()
    enrich(source, tmp_path / "out", step)
    assert twice(tmp_path / "out") == [2 * seed for seed in range(18)]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert finished.items() <= kept.items()
