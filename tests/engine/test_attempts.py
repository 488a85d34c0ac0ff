"""Breadcrumbs: what a death leaves, and what nothing else does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from nemo_image.engine import attempts as attempts_module
from nemo_image.engine.attempts import MAX_DEATHS, Attempts

SHARD = "folder/00007"
HOSTILE = ["../../etc/passwd", "a" * 10_000, "/absolute", "a\nb\0c", "\udc80", "*?[x]", "ü/ü"]


def crumbs(root: Path) -> list[Path]:
    return sorted((root / "_nemo_image" / "attempts").glob("*"))


def deaths(root: Path | str, shard: str = SHARD) -> int:
    """Look without changing anything: an attempt that raises leaves the deaths as they were."""
    seen = -1
    with contextlib.suppress(LookupError), Attempts(root).attempt(shard) as found:
        seen = found
        raise LookupError
    return seen


def die(root: Path, shard: str = SHARD) -> None:
    """Let a process die within an attempt."""
    code = (
        "import os, signal, sys\n"
        "from nemo_image.engine.attempts import Attempts\n"
        "with Attempts(sys.argv[1]).attempt(sys.argv[2]):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root), shard], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_good_end_leaves_nothing(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    with attempts.attempt(SHARD) as before:
        assert before == 0
        assert len(crumbs(tmp_path)) == 1
    assert crumbs(tmp_path) == []
    with attempts.attempt(SHARD) as before:
        assert before == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_is_no_death(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Attempts(tmp_path).attempt(SHARD):
        raise error
    assert crumbs(tmp_path) == []
    assert deaths(tmp_path) == 0


def test_deaths_are_counted_until_the_shard_is_done(tmp_path: Path) -> None:
    die(tmp_path)
    assert deaths(tmp_path) == 1
    assert deaths(tmp_path, "folder/00008") == 0
    die(tmp_path)
    assert deaths(tmp_path) == 2
    with Attempts(tmp_path).attempt(SHARD) as before:
        assert before == 2
    assert crumbs(tmp_path) == []
    assert deaths(tmp_path) == 0


def test_after_the_verdict_the_count_starts_afresh(tmp_path: Path) -> None:
    for number in range(MAX_DEATHS):
        assert deaths(tmp_path) == number
        die(tmp_path)
    assert deaths(tmp_path) == MAX_DEATHS
    assert deaths(tmp_path) == 0


def test_an_attempt_that_still_runs_is_no_death(tmp_path: Path) -> None:
    with Attempts(tmp_path).attempt(SHARD):
        assert deaths(tmp_path) == 0
        assert len(crumbs(tmp_path)) == 1


def test_without_locks_what_still_runs_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(attempts_module.fcntl, "flock", no_locks)
    with Attempts(tmp_path).attempt(SHARD):
        assert deaths(tmp_path) == 1


@pytest.mark.parametrize("shard", HOSTILE)
def test_hostile_names(tmp_path: Path, shard: str) -> None:
    root = tmp_path / "a" / "b" / "root"
    with Attempts(root).attempt(shard) as before:
        assert before == 0
        (crumb,) = crumbs(root)
        assert len(os.fsencode(crumb.name)) <= 255
    every = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(every) == ["a", "a/b", "a/b/root", "a/b/root/_nemo_image", "a/b/root/_nemo_image/attempts"]


def test_shards_with_the_same_tail_do_not_mix(tmp_path: Path) -> None:
    tail = "x" * 100
    die(tmp_path, "one" + tail)
    assert deaths(tmp_path, "one" + tail) == 1
    assert deaths(tmp_path, "two" + tail) == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "_nemo_image").write_text("a file where the folder should be")
    with pytest.raises(NotADirectoryError), Attempts(tmp_path).attempt(SHARD):
        pytest.fail("no work without a breadcrumb")


def test_a_full_disk_leaves_no_breadcrumb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attempts_module.os, "write", full)
    with pytest.raises(OSError, match="No space"), Attempts(tmp_path).attempt(SHARD):
        pytest.fail("no work without a breadcrumb")
    monkeypatch.undo()
    assert crumbs(tmp_path) == []


def test_clear(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.clear()
    die(tmp_path)
    attempts.clear()
    assert len(crumbs(tmp_path)) == 1
    with attempts.attempt(SHARD):
        attempts.clear()
    assert (tmp_path / "_nemo_image" / "attempts").is_dir()
    attempts.clear()
    assert not (tmp_path / "_nemo_image" / "attempts").exists()


def test_a_folder_that_is_cleared_under_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.makedirs
    cleared = []

    def make_and_lose(path: str, exist_ok: bool = False) -> None:
        make(path, exist_ok=exist_ok)
        if path.endswith("attempts") and not cleared:
            cleared.append(path)
            os.rmdir(path)

    monkeypatch.setattr(attempts_module.os, "makedirs", make_and_lose)
    with Attempts(tmp_path).attempt(SHARD) as before:
        assert before == 0
    assert cleared


def test_on_a_remote_store() -> None:
    root = "memory://attempts-test/root"
    fs = fsspec.filesystem("memory")
    attempts = Attempts(root)
    with attempts.attempt(SHARD) as before:
        assert before == 0
        # A store without locks cannot tell a living attempt from a dead one.
        assert deaths(root) == 1
        assert deaths(root, "another") == 0
        assert len(fs.find(root)) == 1
    assert fs.find(root) == []
    assert deaths(root) == 0
    attempts.clear()
    assert not fs.exists(root + "/_nemo_image/attempts")
    attempts.clear()


def test_a_worker_that_dies_is_seen_by_the_next(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    def work(root: str) -> int:
        with Attempts(root).attempt(SHARD) as before:
            if not before:
                os.kill(os.getpid(), signal.SIGKILL)
            return before

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # Dask runs a task again whose worker has died.
        assert client.submit(work, str(tmp_path)).result(timeout=120) == 1
    assert crumbs(tmp_path) == []
