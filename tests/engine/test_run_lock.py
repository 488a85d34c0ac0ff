from __future__ import annotations

import contextvars
import errno
import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nemo_image.engine import lease, run_lock
from nemo_image.engine.lease import Holder, Lease
from nemo_image.errors import ArgumentError, OutputBusyError
from nemo_image.shards import files
from tests.makers import make_dataset

Part = tuple[int, int] | None
LOCK = "_nemo_image/run.lock"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield
    memory.store.clear()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture(params=["flock", "lease on a local disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output folder on each kind of file system."""
    if request.param == "memory":
        return "memory://bucket/out"
    if request.param == "lease on a local disk":
        request.getfixturevalue("no_flock")
    return str(tmp_path / "out")


def _take(root: str, part: Part = None, what: str = "curate", wait_s: float = 0) -> None:
    """Take and free the lock, in a context of its own: within one, a hold is the same hold."""

    def take() -> None:
        with run_lock.run_lock(root, what, part=part, wait_s=wait_s):
            pass

    contextvars.Context().run(take)


def _text(root: str, name: str = LOCK) -> bytes:
    fs, path = files.open_fs(files.join(root, name))
    return bytes(fs.cat_file(path))


def _put(root: str, text: bytes, name: str = LOCK) -> None:
    with files.atomic_writer(files.join(root, name)) as file:
        file.write(text)


def _wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to pass in 30 s")


# One run at a time ----------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused(root: str) -> None:
    with run_lock.run_lock(root, "curate") as lock:
        with pytest.raises(OutputBusyError) as caught:
            _take(root, what="to_webdataset")
        assert not lock.is_lost
    message = str(caught.value)
    assert message.startswith(f"{root}: another run is writing there: curate on {os.uname().nodename}, process ")
    assert f"process {os.getpid()}, since 20" in message
    assert f"`{shlex.join(sys.argv)[:300]}`" in message
    assert "Wait for it to end, stop it, or give another output folder" in message
    _take(root)


def test_two_threads_exclude_each_other(root: str) -> None:
    refused = []

    def second() -> None:
        try:
            _take(root)
        except OutputBusyError as error:
            refused.append(error)

    with run_lock.run_lock(root, "curate"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_another_folder_is_another_lock(root: str) -> None:
    with run_lock.run_lock(root, "curate"):
        _take(files.join(root, "_nemo_image/enriched"))


def test_an_exception_frees_the_folder(root: str) -> None:
    with pytest.raises(RuntimeError, match="mine"), run_lock.run_lock(root, "curate"):
        raise RuntimeError("mine")
    _take(root)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ((1, 4), (2, 4), True),
        ((1, 4), (1, 4), False),
        ((1, 4), None, False),
        (None, (1, 4), False),
        ((1, 4), (2, 8), False),
        ((1, 1), None, False),
    ],
)
def test_parts(root: str, first: Part, second: Part, together: bool) -> None:
    with run_lock.run_lock(root, "curate", part=first):
        if together:
            _take(root, second)
        else:
            with pytest.raises(OutputBusyError, match=r"curate \(part 1/4\) on|curate on|part 1/1"):
                _take(root, second)
        third = (first[1], first[1]) if first is not None else None
        if third not in (None, first, second):
            _take(root, third)  # a refused one leaves nothing behind that others trip over
    _take(root, second)


def test_the_same_context_holds_it_already(root: str) -> None:
    with run_lock.run_lock(root, "curate") as outer:
        for part in (None, (1, 2)):
            with run_lock.run_lock(f"{root}/", "to_webdataset", part=part) as inner:
                assert inner is outer
        with pytest.raises(OutputBusyError):
            _take(root)  # the inner ones freed nothing
    _take(root)
    with run_lock.run_lock(root, "curate", part=(1, 2)) as outer:
        with run_lock.run_lock(root, "save_metadata", part=(1, 2)) as inner:
            assert inner is outer
        with pytest.raises(OutputBusyError), run_lock.run_lock(root, "to_webdataset"):
            pass


def test_waiting_for_another_run(root: str) -> None:
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (_take(root, wait_s=1e6), taken.set()))
    with run_lock.run_lock(root, "curate"):
        thread.start()
        with pytest.raises(OutputBusyError):
            _take(root, wait_s=0.01)
        assert not taken.is_set()
    assert taken.wait(60)
    thread.join()


@pytest.mark.parametrize("part", [(0, 4), (5, 4), (1, 0)])
def test_no_part(tmp_path: Path, part: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match=rf"part {part[0]}/{part[1]}: give i/n with i from 1 to n"):
        _take(str(tmp_path), part)
    assert not list(tmp_path.iterdir())


def test_nothing_of_it_is_in_the_dataset(root: str) -> None:
    with run_lock.run_lock(root, "curate", part=(1, 2)):
        assert files.list_files(root, "") == []
        fs, path = files.open_fs(root)
        assert [name.rpartition("/")[2] for name in fs.ls(path, detail=False)] == ["_nemo_image"]


def test_a_locked_dataset_can_be_read(tmp_path: Path) -> None:
    from nemo_image.datasets import ImageTextPairDataset

    folder = make_dataset(tmp_path / "in", {"a": 2})
    with run_lock.run_lock(folder, "save_metadata"):
        assert len(ImageTextPairDataset.from_webdataset(str(folder)).metadata) == 2


def test_what_is_left_behind(root: str, request: pytest.FixtureRequest) -> None:
    _take(root)
    _take(root, (1, 2))
    fs, path = files.open_fs(files.join(root, "_nemo_image"))
    left = {info["name"].rpartition("/")[2]: info["size"] for info in fs.ls(path, detail=True)}
    assert left == ({"run.lock": 0, "part-1-of-2.lock": 0} if request.node.callspec.params["root"] == "flock" else {})


# flock ----------------------------------------------------------------------------------------------------------------

_HOLDER = """
import os, sys, time
from nemo_image.engine.run_lock import run_lock
with run_lock(sys.argv[1], "curate"):
    {then}
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def _other_process(root: str, then: str = "pass") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a process that holds the folder, until it is killed or the block ends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    script = _HOLDER.format(then=then)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, root], env=environment, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    with _other_process(str(tmp_path)) as (process, _):
        with pytest.raises(OutputBusyError, match=f"curate on .*, process {process.pid}, .*-c"):
            _take(str(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        _take(str(tmp_path))


def test_a_child_of_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    fork = (
        "r, w = os.pipe(); child = os.fork(); child or (os.write(w, b'x'), time.sleep(60)); os.read(r, 1); print(child)"
    )
    with _other_process(str(tmp_path), fork) as (process, child):
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            os.kill(child, 0)  # it lives
            _take(str(tmp_path))
        finally:
            os.kill(child, signal.SIGKILL)


def test_names_left_by_dead_runs_are_not_told(tmp_path: Path) -> None:
    for name in ("run.lock", "part-1-of-2.lock", "part-2-of-2.lock"):
        _put(str(tmp_path), Holder("dead-run").to_bytes(), f"_nemo_image/{name}")
    with (
        run_lock.run_lock(tmp_path, "curate", part=(2, 2)),
        pytest.raises(OutputBusyError, match=r"part 2/2") as caught,
    ):
        _take(str(tmp_path))
    assert "dead-run" not in str(caught.value)


def test_an_unnamed_holder_is_told_too(tmp_path: Path) -> None:
    with run_lock.run_lock(tmp_path, "curate"):
        (tmp_path / LOCK).write_bytes(b"{")
        with pytest.raises(OutputBusyError, match="a process that has left no name"):
            _take(str(tmp_path))


def _refuse_to_open(monkeypatch: pytest.MonkeyPatch, code: int, flags: int) -> None:
    real = os.open

    def refuse(path: Any, wanted: int, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".lock") and wanted & flags:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, wanted, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    _refuse_to_open(monkeypatch, code, os.O_CREAT)
    _take(str(tmp_path))
    assert f"{tmp_path} cannot be locked, so that two runs there could meet" in caplog.text


def test_another_users_lock_can_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _take(str(tmp_path))
    _refuse_to_open(monkeypatch, errno.EACCES, os.O_CREAT)
    with run_lock.run_lock(tmp_path, "curate"), pytest.raises(OutputBusyError):
        _take(str(tmp_path))


# Leases ---------------------------------------------------------------------------------------------------------------

MEMORY = "memory://bucket/out"


def _elsewhere(**changes: Any) -> Holder:
    """The holder of a lease on another machine."""
    return Holder("curate", **{"host": "node7", "machine": "0" * 16, "pid": 77, "command": "x", **changes})


def test_the_lease_of_a_dead_run_is_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    _put(MEMORY, _elsewhere().to_bytes(3))
    with caplog.at_level(logging.INFO), run_lock.run_lock(MEMORY, "curate"):
        assert Holder.from_bytes(_text(MEMORY)).pid == os.getpid()
    assert "is its run alive? Watching" in caplog.text
    assert "the lease of a dead run is taken over: curate on node7, process 77" in caplog.text
    assert not files.exists(files.join(MEMORY, LOCK))


@pytest.mark.parametrize("text", [b"", b"{", b'{"token": 1}'])
def test_a_garbled_lease_is_taken_over(text: bytes) -> None:
    _put(MEMORY, text)
    _take(MEMORY)


def test_the_lease_of_a_living_run_is_respected(caplog: pytest.LogCaptureFixture) -> None:
    """The clock of its machine plays no part, only that it changes."""
    holder = _elsewhere(started="1970-01-01T00:00:00+00:00")
    ending = threading.Event()

    def beat() -> None:
        number = 0
        while not ending.wait(0.01):
            number += 1
            _put(MEMORY, holder.to_bytes(number))

    _put(MEMORY, holder.to_bytes())
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OutputBusyError, match="curate on node7, process 77, since 1970"):
            _take(MEMORY)
    finally:
        ending.set()
        thread.join()
    assert Holder.from_bytes(_text(MEMORY)) == holder
    assert "taken over" not in caplog.text


def test_a_dead_process_of_this_machine_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    _put(MEMORY, Holder("curate", pid=process.pid, beat_s=1e6).to_bytes())
    with caplog.at_level(logging.INFO):
        _take(MEMORY)
    assert "Watching" not in caplog.text


def test_leases_of_dead_rivals_are_removed() -> None:
    for name in ("run.lock", "part-1-of-8.lock"):
        _put(MEMORY, _elsewhere().to_bytes(), f"_nemo_image/{name}")
    with run_lock.run_lock(MEMORY, "curate", part=(1, 4)):
        assert files.list_files(files.join(MEMORY, "_nemo_image"), "") == ["part-1-of-4.lock"]


def test_a_holder_beats() -> None:
    with run_lock.run_lock(MEMORY, "curate"):
        first = _text(MEMORY)
        _wait_for(lambda: _text(MEMORY) != first)
        assert Holder.from_bytes(_text(MEMORY)) == Holder.from_bytes(first)


def _run_and_lose(thief: Holder, then: BaseException | None = None) -> None:
    with run_lock.run_lock(MEMORY, "curate") as lock:
        lock.check()
        _put(MEMORY, thief.to_bytes())
        _wait_for(lambda: lock.is_lost)
        with pytest.raises(OutputBusyError):
            lock.check()
        if then is not None:
            raise then


def test_a_holder_is_told_that_its_lease_is_lost() -> None:
    thief = _elsewhere()
    with pytest.raises(OutputBusyError, match="another run has taken the output over"):
        _run_and_lose(thief)
    assert Holder.from_bytes(_text(MEMORY)) == thief


def test_what_went_wrong_in_the_run_is_what_is_raised() -> None:
    with pytest.raises(RuntimeError, match="mine"):
        _run_and_lose(_elsewhere(), RuntimeError("mine"))


def test_a_holder_outlives_a_storage_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with run_lock.run_lock(MEMORY, "curate") as lock:
        failed = threading.Event()
        real = Lease._read

        def away(self: Lease, path: str) -> bytes | None:
            failed.set()
            raise OSError("away")

        monkeypatch.setattr(Lease, "_read", away)
        assert failed.wait(30)
        monkeypatch.setattr(Lease, "_read", real)
        now = _text(MEMORY)
        _wait_for(lambda: _text(MEMORY) != now)
        assert not lock.is_lost


def test_a_storage_without_exclusive_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    real = fs.pipe_file

    def pipe_file(path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode != "overwrite":
            raise NotImplementedError("Exclusive write")
        real(path, value)

    monkeypatch.setattr(fs, "pipe_file", pipe_file)
    with run_lock.run_lock(MEMORY, "curate"), pytest.raises(OutputBusyError):
        _take(MEMORY)


class _Pause(threading.Event):
    """A pause in which somebody else writes."""

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            _put(MEMORY, _elsewhere(token="1").to_bytes())
        return super().wait(timeout)


@pytest.mark.parametrize("found", [None, _elsewhere(token="2", beat_s=0.0)])
def test_of_two_that_write_at_once_the_last_goes_on(monkeypatch: pytest.MonkeyPatch, found: Holder | None) -> None:
    """Where there is no exclusive writing, and where both have seen the same dead lease."""
    fs = fsspec.filesystem("memory")
    real, init = fs.pipe_file, Lease.__init__

    def pipe_file(path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode != "overwrite":
            raise NotImplementedError("Exclusive write")
        real(path, value)

    def interrupted(self: Lease, *args: Any) -> None:
        init(self, *args)
        self._ending = _Pause()

    if found is not None:
        _put(MEMORY, found.to_bytes())
    monkeypatch.setattr(fs, "pipe_file", pipe_file)
    monkeypatch.setattr(Lease, "__init__", interrupted)
    with pytest.raises(OutputBusyError, match="node7"):
        _take(MEMORY)
    assert _text(MEMORY) == _elsewhere(token="1", started=Holder.from_bytes(_text(MEMORY)).started).to_bytes()


def test_an_answer_that_was_lost_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own second try finds what its first one wrote."""
    fs = fsspec.filesystem("memory")
    real = fs.pipe_file

    def pipe_file(path: str, value: bytes, mode: str = "overwrite") -> None:
        real(path, value)
        if mode != "overwrite":
            raise FileExistsError(path)

    monkeypatch.setattr(fs, "pipe_file", pipe_file)
    _take(MEMORY)


def test_a_storage_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(error: Exception) -> None:
        def pipe_file(path: str, value: bytes, mode: str = "overwrite") -> None:
            raise error

        monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", pipe_file)

    refuse(PermissionError("Access Denied"))
    _take(MEMORY)
    assert "cannot be locked" in caplog.text
    refuse(FileNotFoundError("The specified bucket does not exist"))
    with pytest.raises(OSError, match=r"memory://bucket/out: cannot be written to .*bucket does not exist"):
        _take(MEMORY)
