"""Writing a file so that it appears under its name only when it is whole: on local disks, and elsewhere."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.errors import one_line
from nemo_image.shards import retries
from nemo_image.shards.machine import is_running, machine_id

TEMPORARY_PREFIX = ".nemo-image-tmp-"
ONE_REQUEST = 8 * 2**20
"""Bytes: a file up to this size is uploaded at once."""
FOREIGN_AGE_S = 3600
"""Seconds for which a temporary file of another machine is left alone where no lock tells that it is dead."""

# What follows the prefix: the writer's machine (16 digits) and process (8), and 8 random ones.
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<machine>[0-9a-f]{16})(?P<pid>[0-9a-f]{8})[0-9a-f]{8}-.")
_NAME_BYTES = 255  # the longest file name of the usual file systems
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ADVICE = {
    errno.ENOSPC: "make room there, then run again",
    errno.EDQUOT: "make room within the quota, then run again",
    errno.EFBIG: "give a folder on a file system that takes larger files",
    errno.EROFS: "give a folder that can be written to",
    errno.EACCES: "give a folder that you may write to, or change its permissions",
    errno.EPERM: "give a folder that you may write to, or change its permissions",
    errno.ENOTDIR: "a part of the path is a file: give another folder",
    errno.EEXIST: "a part of the path is a file: give another folder",
}


def is_left_over(fs: AbstractFileSystem, path: str, older_than_s: float) -> bool:
    """Tell whether a file is a temporary one of ours, of a writer that is dead."""
    writer = _TEMPORARY.match(path.rpartition("/")[2])
    if writer is None:
        return False
    is_ours = writer["machine"] == machine_id()
    if not isinstance(fs, LocalFileSystem):
        if is_ours and is_running(int(writer["pid"], 16)):
            return False
        older_than_s = older_than_s if is_ours else max(older_than_s, FOREIGN_AGE_S)
    try:
        if older_than_s > 0 and time.time() - fs.modified(path).timestamp() < older_than_s:
            return False
        if not isinstance(fs, LocalFileSystem):
            return True
        with open(path, "r+b") as file:  # some network file systems lock only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError, NotImplementedError):
        return False
    except OSError:
        return not (is_ours and is_running(int(writer["pid"], 16)))  # no locks here
    return True


def _temporary_name(name: str) -> str:
    """Return a name that says who writes; of the target's as much as fits."""
    unique = f"{TEMPORARY_PREFIX}{machine_id()}{os.getpid():08x}{secrets.token_hex(4)}-"
    return unique + os.fsdecode(os.fsencode(name)[len(unique) - _NAME_BYTES :])


@contextmanager
def write_local(path: str) -> Iterator[BinaryIO]:
    """Write a temporary file beside `path`, sync it, and move it there."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, _temporary_name(name))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as file:
            with suppress(OSError):  # not every file system has locks
                # Tells sweep_temporaries that somebody is still writing.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            if not file.closed:
                file.flush()
            _sync(temporary)
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and _is_about(error, temporary, folder):
            raise _named(error, path) from error
        raise
    with suppress(OSError):  # some network file systems cannot sync a folder
        _sync(folder)


def _is_about(error: OSError, temporary: str, folder: str) -> bool:
    """Tell whether an error is about the temporary file, or a folder to be made for it, not about what is copied."""
    name = error.filename
    if name is None:
        return error.errno in _FULL
    return name == temporary or (isinstance(name, str) and f"{folder}/".startswith(f"{name.rstrip('/')}/"))


def _named(error: OSError, path: str) -> OSError:
    """Return the error as one of the file that the user knows, with what to do."""
    code = error.errno or errno.EIO
    advice = f": {_ADVICE[code]}" if code in _ADVICE else ""
    return OSError(code, f"cannot be written ({os.strerror(code)}){advice}", path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path  # the kernel knows the file by its number only
        raise
    finally:
        os.close(descriptor)


class _Upload(io.RawIOBase):
    """A file that is being uploaded: counts the bytes, and names the URL in errors.

    What is small is uploaded at once at the end, and again if that fails for a moment.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, url: str) -> None:
        self._fs, self._path, self._url = fs, path, url
        self._small = io.BytesIO()
        self._large: Any = None
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        if self.size <= ONE_REQUEST:
            self._small.write(data)
            return size
        with self._failing():
            if self._large is None:
                self._large = self._fs.open(self._path, "wb")
                self._large.write(self._small.getvalue())
                self._small = io.BytesIO()
            self._large.write(data)
        return size

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def complete(self) -> None:
        with self._failing():
            if self._large is None:
                content = self._small.getvalue()
                retries.call(self._url, lambda: self._fs.pipe_file(self._path, content))
            else:
                self._large.close()

    def discard(self) -> None:
        if self._large is not None:
            with suppress(Exception):
                self._large.discard()
            self._large.closed = True  # or the garbage collector would complete the upload

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:
            raise OSError(f"{self._url}: this storage can only be read: give another output folder") from error
        except Exception as error:
            kind = PermissionError if isinstance(error, PermissionError) else OSError
            advice = "check the store and your rights there"
            raise kind(f"{self._url}: the upload failed ({one_line(error)}): {advice}") from error


@contextmanager
def write_remote(fs: AbstractFileSystem, path: str, url: str) -> Iterator[BinaryIO]:
    """Upload `path`, and make sure that the store has all of it."""
    if isinstance(fs, AsyncFileSystem):
        # Object stores: nothing is visible before the upload is completed.
        upload = _Upload(fs, path, url)
        try:
            yield cast(BinaryIO, upload)
            upload.complete()
        except BaseException:
            upload.discard()
            raise
        _verify(fs, path, url, upload.size)
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/{_temporary_name(name)}"
    fs.makedirs(folder, exist_ok=True)
    try:
        with fs.open(temporary, "wb") as file:
            yield file
            size = file.tell() if not file.closed else None
        fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(temporary)
        raise
    if size is not None:
        _verify(fs, path, url, size)


def _verify(fs: AbstractFileSystem, path: str, url: str, size: int) -> None:
    """Make sure that a store has all bytes of what was written; what is cut off is removed."""

    def check() -> None:
        found = fs.info(path)["size"]
        if found != size:
            raise retries.CutOffError(f"{size} bytes were written, but the store has {found}")

    try:
        retries.call(url, check)
    except retries.GaveUpError as error:
        if isinstance(error.__cause__, retries.CutOffError):
            with suppress(Exception):
                fs.rm_file(path)
        raise
    except FileNotFoundError as error:
        raise OSError(f"{url}: was written, but the store does not have it: run again, and check the store") from error
