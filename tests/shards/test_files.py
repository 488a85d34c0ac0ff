from __future__ import annotations

import errno
import fcntl
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile

from nemo_image.errors import ArgumentError
from nemo_image.shards import atomic, files, retries
from nemo_image.shards.machine import machine_id


class ObjectStore(AsyncFileSystem):
    """An object store in memory, which keeps what is uploaded to the end, as S3 does."""

    protocol = "teststore"
    cachable = False
    objects: dict[str, bytes] = {}  # noqa: RUF012 -- one store for all instances, as stores are
    requests: list[str] = []  # noqa: RUF012

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        content = self.objects[path]
        return {"name": path, "size": len(content), "type": "file", "ETag": f'"{hash(content)}"'}

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = [await self._info(name) for name in self.objects if name.rpartition("/")[0] == path]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [info["name"] for info in found]

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.requests.append("put")
        self.objects[self._strip_protocol(path)] = value

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        del self.objects[self._strip_protocol(path)]

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return self.objects[self._strip_protocol(path)][start:end]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.objects[self._strip_protocol(path)])
        return Upload(self, self._strip_protocol(path), mode, block_size=8)


class Upload(AbstractBufferedFile):
    """An upload in parts."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []
        ObjectStore.requests.append("begin")

    def _upload_chunk(self, final: bool = False) -> bool:
        if b"refuse" in self.buffer.getvalue():
            raise OSError("no space in the bucket")
        self.parts.append(self.buffer.getvalue())
        if final:
            ObjectStore.requests.append("complete")
            ObjectStore.objects[self.path] = b"".join(self.parts)
        return True

    def discard(self) -> None:
        ObjectStore.requests.append("abort")


@pytest.fixture(autouse=True)
def _fresh_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(atomic, "ONE_REQUEST", 4)  # bytes: nearly all files here are large
    fsspec.register_implementation("teststore", ObjectStore, clobber=True)
    ObjectStore.objects.clear()
    ObjectStore.requests.clear()
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield
    memory.store.clear()


@pytest.fixture(params=["local", "memory", "teststore"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "dataset") if request.param == "local" else f"{request.param}://bucket/dataset"


def _content(url: str) -> bytes:
    fs, path = files.open_fs(url)
    return bytes(fs.cat_file(path))


def _names(root: str) -> set[str]:
    fs, path = files.open_fs(root)
    return {str(info["name"]).rpartition("/")[2] for info in fs.ls(path, detail=True)}


@pytest.mark.parametrize(
    ("root", "parts", "expected"),
    [
        ("/data", ["00000.tar"], "/data/00000.tar"),
        ("/data/", ["a/00000.tar"], "/data/a/00000.tar"),
        ("data", ["_nemo_image", "x.jsonl"], "data/_nemo_image/x.jsonl"),
        ("", ["x.tar"], "x.tar"),
        ("/", ["x.tar"], "/x.tar"),
        ("s3://bucket", ["x.tar"], "s3://bucket/x.tar"),
        ("memory://", ["x.tar"], "memory://x.tar"),
        ("s3://bucket/a", ["..x.tar"], "s3://bucket/a/..x.tar"),
    ],
)
def test_join(root: str, parts: list[str], expected: str) -> None:
    assert files.join(root, *parts) == expected


def test_join_takes_paths(tmp_path: Path) -> None:
    assert files.join(tmp_path, "a") == str(tmp_path / "a")


@pytest.mark.parametrize("part", ["/etc/passwd", "../x", "a/../../x", ".."])
def test_join_does_not_lead_out_of_the_folder(part: str) -> None:
    with pytest.raises(ArgumentError, match="leads out of data"):
        files.join("data", part)


def test_open_fs_passes_storage_options() -> None:
    fs, path = files.open_fs("teststore://bucket/x.tar", {"asynchronous": False, "anon": True})
    assert isinstance(fs, ObjectStore)
    assert path == "bucket/x.tar"
    assert fs.storage_options == {"asynchronous": False, "anon": True}


def test_list_files(root: str) -> None:
    for name in ("00010.tar", "00009.tar", "a.parquet", ".hidden.tar", f"{atomic.TEMPORARY_PREFIX}{'0' * 32}-b.tar"):
        with files.atomic_writer(files.join(root, name)) as file:
            file.write(b"x")
    with files.atomic_writer(files.join(root, "deeper", "c.tar")) as file:
        file.write(b"x")
    assert files.list_files(root, ".tar") == ["00009.tar", "00010.tar"]
    assert files.list_files(root + "/", ".parquet") == ["a.parquet"]
    assert files.list_files(root, ".idx") == []


def test_list_files_leaves_out_folders(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "file.tar").write_bytes(b"")
    (tmp_path / "lost.tar").symlink_to(tmp_path / "nowhere")  # a file that is named as unreadable later
    assert files.list_files(tmp_path, ".tar") == ["file.tar", "lost.tar"]


def test_list_files_of_what_is_no_folder(root: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.list_files(root, ".tar")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is a file"):
        files.list_files(tmp_path / "file", "file")


def test_identity_of_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    identity = files.identify(path)
    assert identity == files.FileIdentity(5, "2023-11-14T22:13:20.123456789Z", None)
    assert files.FileIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    os.utime(path, ns=(0, 1_700_000_000_123_456_790))
    assert files.identify(path) != identity


def test_identity_of_a_remote_file() -> None:
    for url in ("memory://d/x.tar", "teststore://d/x.tar"):
        with pytest.raises(FileNotFoundError):
            files.identify(url)
        with files.atomic_writer(url) as file:
            file.write(b"one")
        before = files.identify(url)
        assert before.size == 3
        assert files.identify(url) == before
        assert files.FileIdentity.from_dict(before.to_dict()) == before
        with files.atomic_writer(url) as file:
            file.write(b"two")
        assert files.identify(url) != before
    assert before.etag is not None
    assert before.modified is None


def test_identity_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.identify(tmp_path / "x")


def test_a_file_appears_when_it_is_whole(root: str) -> None:
    url = files.join(root, "x.tar")
    with files.atomic_writer(files.join(root, "other")) as file:
        file.write(b"other")
    with files.atomic_writer(url) as file:
        file.write(b"1234567890")
        assert "x.tar" not in _names(root)
        file.write(b"abc")
    assert _content(url) == b"1234567890abc"
    assert _names(root) == {"x.tar", "other"}


def _write_and_raise(url: str, error: BaseException) -> None:
    with files.atomic_writer(url) as file:
        file.write(b"much longer than a part of an upload")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"before"])
def test_an_exception_leaves_the_target_alone(root: str, before: bytes | None, error: type[BaseException]) -> None:
    url = files.join(root, "x.tar")
    with files.atomic_writer(files.join(root, "other")) as file:
        file.write(b"other")
    if before is not None:
        with files.atomic_writer(url) as file:
            file.write(before)
    with pytest.raises(error):
        _write_and_raise(url, error())
    gc.collect()  # a file that is collected must not be uploaded after all
    assert _names(root) == ({"other"} if before is None else {"other", "x.tar"})
    assert before is None or _content(url) == before


def test_an_upload_given_up_is_aborted() -> None:
    with pytest.raises(RuntimeError):
        _write_and_raise("teststore://bucket/x.tar", RuntimeError())
    assert ObjectStore.requests == ["begin", "abort"]


def test_an_upload_that_fails_at_the_end_leaves_the_target_alone() -> None:
    ObjectStore.objects["bucket/x.tar"] = b"before"
    with pytest.raises(OSError, match="no space"), files.atomic_writer("teststore://bucket/x.tar") as file:
        file.write(b"refuse")
    del file
    gc.collect()
    assert ObjectStore.objects == {"bucket/x.tar": b"before"}


def test_a_full_disk_leaves_the_target_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), files.atomic_writer(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"before"
    assert _names(str(tmp_path)) == {"x"}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("buffered", [False, True])
def test_a_disk_that_runs_full(tiny_disk: Path, buffered: bool) -> None:
    """While it is written, and when the last buffer is flushed."""
    path = tiny_disk / "x.parquet"
    path.write_bytes(b"before")
    (tiny_disk / "ballast").write_bytes(bytes(56 * 1024))
    size = 5_000 if buffered else 50_000  # the file's buffer holds 8 KiB
    with pytest.raises(OSError, match="No space left") as caught, files.atomic_writer(path) as file:
        file.write(bytes(size))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert "make room there, then run again" in str(caught.value)
    assert ".nemo-image-tmp" not in str(caught.value)
    assert path.read_bytes() == b"before"
    assert _names(str(tiny_disk)) == {"x.parquet", "ballast"}


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (errno.EROFS, OSError, "give a folder that can be written to"),
        (errno.EACCES, PermissionError, "give a folder that you may write to"),
        (errno.EDQUOT, OSError, "make room within the quota"),
        (errno.EIO, OSError, r"cannot be written \(Input/output error\)"),
    ],
)
@pytest.mark.parametrize("call", ["makedirs", "open", "fsync", "replace"])
def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: type[OSError], advice: str
) -> None:
    path = tmp_path / "deep" / "x"
    path.parent.mkdir()
    path.write_bytes(b"before")

    def refuse(name: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(name))

    if call == "open":
        monkeypatch.setattr(atomic, "open", refuse, raising=False)
    elif call == "fsync":
        monkeypatch.setattr(atomic, "_sync", refuse)
    else:
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(kind, match=advice) as caught, files.atomic_writer(path) as file:
        file.write(b"after")
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert _names(str(path.parent)) == {"x"}


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with (
        pytest.raises(OSError, match="a part of the path is a file") as caught,
        files.atomic_writer(tmp_path / "out" / "deep" / "x"),
    ):
        pass
    assert caught.value.filename == str(tmp_path / "out" / "deep" / "x")


def test_other_files_errors_are_not_the_targets(tmp_path: Path) -> None:
    """What is copied may be missing, or on a disk that fails."""
    with pytest.raises(FileNotFoundError) as caught, files.atomic_writer(tmp_path / "x"):
        (tmp_path / "source").read_bytes()
    assert caught.value.filename == str(tmp_path / "source")
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error") as other, files.atomic_writer(tmp_path / "x"):
        raise error
    assert other.value is error
    assert os.listdir(tmp_path) == []


# Uploads --------------------------------------------------------------------------------------------------------------


def test_an_upload_that_lost_bytes_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Upload._upload_chunk

    def lose(self: Upload, final: bool = False) -> bool:
        done = real(self, final)
        if final:
            ObjectStore.objects[self.path] = ObjectStore.objects[self.path][:-1]
        return done

    monkeypatch.setattr(Upload, "_upload_chunk", lose)
    monkeypatch.setenv("NEMO_IMAGE_RETRY_WAIT_S", "0")
    with pytest.raises(OSError, match=r"teststore://b/x.tar: .*10 bytes were written, but the store has 9") as caught:  # noqa: SIM117
        with files.atomic_writer("teststore://b/x.tar") as file:
            file.write(b"0123456789")
    assert ObjectStore.objects == {}
    assert retries.is_transient(caught.value) is False  # the question was asked again; the writing can be, as a whole


def test_an_upload_that_is_not_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Upload, "_upload_chunk", lambda self, final=False: True)
    with pytest.raises(OSError, match="was written, but the store does not have it") as caught:  # noqa: SIM117
        with files.atomic_writer("teststore://b/x.tar") as file:
            file.write(b"0123456789")
    assert not isinstance(caught.value, FileNotFoundError)  # it would read as a missing shard


def test_what_an_upload_fails_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Upload, final: bool = False) -> bool:
        raise PermissionError("Access Denied") if final else FileNotFoundError("The specified upload does not exist")

    monkeypatch.setattr(Upload, "_upload_chunk", refuse)
    with pytest.raises(PermissionError, match=r"teststore://b/x: the upload failed .*Access Denied"):  # noqa: SIM117
        with files.atomic_writer("teststore://b/x") as file:
            file.write(b"012345")
    with pytest.raises(OSError, match=r"teststore://b/x: the upload failed .*upload does not exist") as caught:  # noqa: SIM117
        with files.atomic_writer("teststore://b/x") as file:
            file.write(b"more than a part of it")
    assert not isinstance(caught.value, FileNotFoundError)
    assert ObjectStore.requests[-1] == "abort"


def test_a_small_file_is_one_request_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_IMAGE_RETRY_WAIT_S", "0")
    real, failing = ObjectStore._pipe_file, [TimeoutError(), OSError(errno.EBUSY, "SlowDown")]

    async def pipe_file(self: ObjectStore, path: str, value: bytes, **kwargs: Any) -> None:
        if failing:
            raise failing.pop()
        await real(self, path, value)

    monkeypatch.setattr(ObjectStore, "_pipe_file", pipe_file)
    with files.atomic_writer("teststore://b/x") as file:
        file.write(b"01")
        file.write(b"23")
    assert (ObjectStore.objects, ObjectStore.requests) == ({"b/x": b"0123"}, ["put"])
    with files.atomic_writer("teststore://b/y") as file:
        file.write(b"01")
        file.write(b"234")
    assert ObjectStore.objects["b/y"] == b"01234"
    assert ObjectStore.requests == ["put", "begin", "complete"]


def test_a_storage_that_can_only_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(ObjectStore, "_open", refuse)
    with pytest.raises(OSError, match="teststore://b/x: this storage can only be read: give another output folder"):  # noqa: SIM117
        with files.atomic_writer("teststore://b/x") as file:
            file.write(b"012345")


def test_a_consumer_may_close_an_upload() -> None:
    """It appears at the end of the block all the same: what comes after may fail."""
    with files.atomic_writer("teststore://b/x") as file:
        file.write(memoryview(b"0123456789"))
        file.close()
        assert ObjectStore.objects == {}
    assert ObjectStore.objects == {"b/x": b"0123456789"}


# Asking a storage that fails for a moment -----------------------------------------------------------------------------


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the store raises next, before it answers."""
    errors: list[Exception] = []
    monkeypatch.setenv("NEMO_IMAGE_RETRY_WAIT_S", "0")
    for name in ("_info", "_ls"):
        real = getattr(ObjectStore, name)

        async def ask(self: ObjectStore, path: str, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if errors:
                raise errors.pop()
            return await real(self, path, *args, **kwargs)

        monkeypatch.setattr(ObjectStore, name, ask)
    return errors


def test_questions_are_asked_again(shaky: list[Exception]) -> None:
    with files.atomic_writer("teststore://b/x.tar") as file:
        file.write(b"1")
        shaky[:] = [TimeoutError()] * 2  # and the question whether all has arrived
    assert not shaky
    for ask in (
        lambda: files.list_files("teststore://b", ".tar") == ["x.tar"],
        lambda: files.identify("teststore://b/x.tar").size == 1,
        lambda: files.exists("teststore://b/x.tar"),
        lambda: not files.exists("teststore://b/y.tar"),
    ):
        shaky[:] = [OSError(errno.EBUSY, "Please reduce your request rate.")] * 4
        assert ask()
        assert not shaky
        shaky[:] = [TimeoutError()] * 5
        with pytest.raises(OSError, match=r"teststore://b.*5 tries"):
            ask()


def test_exists(root: str) -> None:
    with files.atomic_writer(files.join(root, "x.tar")) as file:
        file.write(b"1")
    assert files.exists(files.join(root, "x.tar"))
    assert not files.exists(files.join(root, "y.tar"))
    assert not files.exists(files.join(root, "x.tar/y")) or "://" in root


def test_listings_are_not_remembered() -> None:
    """Another process may have written since."""

    class Remembering(ObjectStore):
        protocol = "remembering"
        cachable = True

        async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
            path = self._strip_protocol(path)
            found = self.dircache[path] if path in self.dircache else await super()._ls(path, True, **kwargs)
            self.dircache[path] = found
            return list(found)

    fsspec.register_implementation("remembering", Remembering, clobber=True)
    ObjectStore.objects["b/x"] = b""
    assert files.list_files("remembering://b", "") == ["x"]
    ObjectStore.objects["b/y"] = b""
    assert files.list_files("remembering://b", "") == ["x", "y"]


def test_the_file_and_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_replace(source: str, target: str) -> None:
        events.append(("replace", Path(target).name))
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with files.atomic_writer(tmp_path / "x") as file:
        file.write(b"1")
        [temporary] = os.listdir(tmp_path)
    assert temporary.startswith(".nemo-image-tmp-")
    assert temporary.endswith("-x")
    assert events == [("fsync", temporary), ("replace", "x"), ("fsync", tmp_path.name)]


def test_permissions_are_the_targets_or_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "old").chmod(0o640)
    (tmp_path / "plain").write_bytes(b"")
    for name in ("old", "new"):
        with files.atomic_writer(tmp_path / name) as file:
            file.write(b"1")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("a" * 251 + ".tar", "ü" * 125 + ".tar"):
        with files.atomic_writer(tmp_path / name) as file:
            file.write(name.encode())
        assert (tmp_path / name).read_bytes() == name.encode()


def test_a_consumer_may_close_the_file(tmp_path: Path) -> None:
    with files.atomic_writer(tmp_path / "x") as file:
        file.write(b"1")
        file.close()
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_killed_writer_leaves_a_temporary_that_is_swept(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from nemo_image.shards.files import atomic_writer\n"
        "with atomic_writer(sys.argv[1]) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "x").write_bytes(b"before")
    project = str(Path(files.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": project}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_bytes() == b"before"
    assert files.list_files(tmp_path, "x") == ["x"]
    assert len(_names(str(tmp_path))) == 2
    assert len(files.sweep_temporaries(tmp_path)) == 1
    assert _names(str(tmp_path)) == {"x"}


def test_a_file_still_being_written_is_not_swept(tmp_path: Path) -> None:
    with files.atomic_writer(tmp_path / "x") as file:
        file.write(b"1")
        assert files.sweep_temporaries(tmp_path) == []
    assert (tmp_path / "x").read_bytes() == b"1"


def _leftover(machine: str | None = None, pid: int | None = None) -> str:
    """Return the name of a temporary file of a process that has ended, or of the one given."""
    if pid is None:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            process.wait()
        pid = process.pid
    return f"{atomic.TEMPORARY_PREFIX}{machine or machine_id()}{pid:08x}01234567-x.tar"


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_only_our_own_leftovers_are_swept(kind: str, tmp_path: Path) -> None:
    root = str(tmp_path / "dataset") if kind == "local" else "memory://bucket/dataset"
    ours = _leftover()
    others = {"x.tar", ".nemo-image-tmp-", ".nemo-image-tmp-notes", f"{uuid.uuid4().hex}-x.tar", ours[1:]}
    fs, path = files.open_fs(root)
    fs.makedirs(path)
    for name in (ours, *others):
        fs.pipe_file(f"{path}/{name}", b"x")
    assert files.sweep_temporaries(root) == [ours]
    assert _names(root) == others


def test_folders_below_are_swept_too(tmp_path: Path) -> None:
    name = _leftover()
    for folder in ("a/b", "_nemo_image", "c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
    found = files.sweep_temporaries(tmp_path, folders=("", "a/b", "_nemo_image", "none"))
    assert found == [f"a/b/{name}", f"_nemo_image/{name}"]
    assert [path.parent.name for path in tmp_path.rglob(name)] == ["c"]
    with pytest.raises(ArgumentError, match="leads out"):
        files.sweep_temporaries(tmp_path, folders=["../c"])


def test_where_there_are_no_locks_the_writer_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A living process of this machine, one of another machine, which may be alive, and the same an hour later."""
    fs, path = files.open_fs("memory://bucket/dataset")
    alive, foreign = _leftover(pid=os.getpid()), _leftover(machine="0" * 16)
    for name in (alive, foreign):
        fs.pipe_file(f"{path}/{name}", b"x")
    assert files.sweep_temporaries("memory://bucket/dataset") == []
    now = time.time()
    monkeypatch.setattr(atomic, "time", SimpleNamespace(time=lambda: now + 3601))  # the event loops' clock goes on
    assert files.sweep_temporaries("memory://bucket/dataset") == [foreign]
    assert _names("memory://bucket/dataset") == {alive}


def test_object_stores_are_not_listed_for_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may hold 100,000 objects, and no unfinished one is ever seen there."""
    monkeypatch.setattr(ObjectStore, "_ls", None)
    assert files.sweep_temporaries("teststore://bucket/dataset", folders=("", "a")) == []


def test_a_local_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    dead = _leftover()
    (tmp_path / dead).touch()
    with files.atomic_writer(tmp_path / "x") as file:
        file.write(b"1")
        assert files.sweep_temporaries(tmp_path) == [dead]
    assert (tmp_path / "x").read_bytes() == b"1"


def test_young_leftovers_can_be_spared(tmp_path: Path) -> None:
    old, young = (tmp_path / f"{atomic.TEMPORARY_PREFIX}{digit * 32}-x" for digit in "01")
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (1_000_000_000, 1_000_000_000))
    assert files.sweep_temporaries(tmp_path, older_than_s=3600) == [old.name]
    assert _names(str(tmp_path)) == {young.name}


def test_a_folder_named_like_a_leftover_stays(tmp_path: Path) -> None:
    (tmp_path / f"{atomic.TEMPORARY_PREFIX}{'0' * 32}-x").mkdir()
    assert files.sweep_temporaries(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 1


def test_sweeping_no_folder_is_fine(root: str) -> None:
    assert files.sweep_temporaries(root) == []
