"""Files of a dataset on any file system: names, identities, atomic writes.

A URL is a local path or whatever `fsspec <https://filesystem-spec.readthedocs.io>`_ understands.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.errors import ArgumentError

TEMPORARY_PREFIX = ".nemo-image-tmp-"
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"[0-9a-f]{32}-.")
_NAME_BYTES = 255  # the longest file name of the usual file systems

Url = str | os.PathLike[str]
StorageOptions = Mapping[str, Any] | None


def open_fs(url: Url, storage_options: StorageOptions = None) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, and the path there.

    Parameters
    ----------
    url : str or path
        A local path or any fsspec URL.
    storage_options : mapping, optional
        Credentials and settings of the file system.
    """
    fs, path = url_to_fs(os.fspath(url), **dict(storage_options or {}))
    return fs, str(path)


def join(root: Url, *parts: str) -> str:
    """Return the URL of something below a folder.

    Raises
    ------
    ArgumentError
        If a part would lead out of the folder: names come from data, and data may be hostile.
    """
    url = os.fspath(root)
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise ArgumentError(f"{part!r} leads out of {url}: give a path below the folder")
        url = part if not url else url + part if url.endswith("/") else f"{url}/{part}"
    return url


def list_files(root: Url, suffix: str, storage_options: StorageOptions = None) -> list[str]:
    """Return the sorted names of the files directly in a folder that end in a suffix.

    Dot files, our own unfinished ones among them, and folders are left out.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    NotADirectoryError
        If it is a file.
    """
    fs, path = open_fs(root, storage_options)
    fs.invalidate_cache(path)  # another worker may have written since the last look
    names = []
    for info in fs.ls(path, detail=True):
        if info["type"] == "directory":
            continue
        if info["name"].rstrip("/") == path.rstrip("/"):
            raise NotADirectoryError(f"{os.fspath(root)} is a file: give a folder")
        name = info["name"].rpartition("/")[2]
        if name.endswith(suffix) and not name.startswith("."):
            names.append(name)
    return sorted(names)


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from its later versions.

    Attributes
    ----------
    size : int
        In bytes.
    modified : str or None
        Time of the last change, ISO 8601 in UTC; None where the file system keeps none.
    etag : str or None
        The object store's tag of the content.
    """

    size: int
    modified: str | None = None
    etag: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FileIdentity:
        """Rebuild an identity from :meth:`to_dict`'s result."""
        return cls(int(data["size"]), data.get("modified"), data.get("etag"))


def identify(url: Url, storage_options: StorageOptions = None) -> FileIdentity:
    """Return a file's identity as it is now.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    fs, path = open_fs(url, storage_options)
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
        moment = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return FileIdentity(status.st_size, f"{moment}.{nanoseconds:09d}Z")
    fs.invalidate_cache(fs._parent(path))
    info = fs.info(path)
    etag = info.get("ETag") or info.get("etag")
    return FileIdentity(int(info["size"]), _modified(fs, path), None if etag is None else str(etag))


def _modified(fs: AbstractFileSystem, path: str) -> str | None:
    try:
        moment = fs.modified(path)
    except NotImplementedError:
        return None
    if not isinstance(moment, datetime):
        return None if moment is None else str(moment)
    return moment.astimezone(UTC).isoformat() if moment.tzinfo else moment.isoformat()


@contextmanager
def atomic_writer(url: Url, storage_options: StorageOptions = None) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is whole.

    A local file is written under a temporary name in the same folder (made if it is missing), synced, and moved over
    the target, whose permissions it takes. Elsewhere the upload is completed at the end or given up. After an
    exception in the ``with`` block, the target is what it was.

    Yields
    ------
    binary file, open for writing
    """
    fs, path = open_fs(url, storage_options)
    writer = _write_local(path) if isinstance(fs, LocalFileSystem) else _write_remote(fs, path)
    with writer as file:
        yield file


@contextmanager
def _write_local(path: str) -> Iterator[BinaryIO]:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    unique = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-"
    temporary = os.path.join(folder, unique + os.fsdecode(os.fsencode(name)[len(unique) - _NAME_BYTES :]))
    try:
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
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # some network file systems cannot sync a folder
        _sync(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _write_remote(fs: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
    if isinstance(fs, AsyncFileSystem):
        # Object stores: nothing is visible before close() completes the upload.
        file = fs.open(path, "wb")
        try:
            yield file
            file.close()
        except BaseException:
            with suppress(Exception):
                file.discard()
            file.closed = True  # or the garbage collector would complete the upload
            raise
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{name}"
    fs.makedirs(folder, exist_ok=True)
    try:
        with fs.open(temporary, "wb") as file:
            yield file
        fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(temporary)
        raise


def sweep_temporaries(root: Url, older_than_s: float = 0, storage_options: StorageOptions = None) -> list[str]:
    """Remove what killed writers of ours left directly in a folder.

    A temporary file that a living process of this machine still writes is locked and stays; `older_than_s` protects
    those of other machines where the file system does not share locks.

    Parameters
    ----------
    root : str or path
        A folder; one that does not exist is fine.
    older_than_s : float
        Only files not changed for so many seconds.

    Returns
    -------
    list of str
        The names removed.
    """
    fs, path = open_fs(root, storage_options)
    fs.invalidate_cache(path)
    try:
        found = [info["name"] for info in fs.ls(path, detail=True) if info["type"] == "file"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    removed = []
    for file in sorted(found):
        name = file.rpartition("/")[2]
        if _TEMPORARY.match(name) and _is_left_over(fs, file, older_than_s):
            with suppress(FileNotFoundError):
                fs.rm_file(file)
                removed.append(name)
    return removed


def _is_left_over(fs: AbstractFileSystem, path: str, older_than_s: float) -> bool:
    try:
        if older_than_s > 0 and time.time() - fs.modified(path).timestamp() < older_than_s:
            return False
        if not isinstance(fs, LocalFileSystem):
            return True
        with open(path, "r+b") as file:  # some network file systems lock only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True  # no locks here
    return True
