"""Files of a dataset on any file system: names, identities, atomic writes.

A URL is a local path or whatever `fsspec <https://filesystem-spec.readthedocs.io>`_ understands.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO, TypeVar

import xxhash
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.dircache import DirCache
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.errors import ArgumentError
from nemo_image.shards import retries
from nemo_image.shards.atomic import is_left_over, write_local, write_remote

T = TypeVar("T")

Url = str | os.PathLike[str]
StorageOptions = Mapping[str, Any] | None


def open_fs(url: Url, storage_options: StorageOptions = None) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, and the path there.

    Parameters
    ----------
    url : str or path
        A local path or any fsspec URL.
    storage_options : mapping, optional
        Credentials and settings of the file system. Its listings are not cached: other processes write there too.
    """
    fs, path = url_to_fs(os.fspath(url), **dict(storage_options or {}))
    listings = getattr(fs, "dircache", None)
    if isinstance(listings, DirCache) and listings.use_listings_cache:
        listings.use_listings_cache = False
        listings.clear()
    return fs, str(path)


def _ask(fs: AbstractFileSystem, url: Url, question: Callable[[], T]) -> T:
    """Ask a file system something, again where a remote one fails for a moment."""
    return question() if isinstance(fs, LocalFileSystem) else retries.call(url, question)


def exists(url: Url, storage_options: StorageOptions = None) -> bool:
    """Tell whether there is a file or folder.

    Raises
    ------
    OSError
        If a remote file system does not say. (fsspec's own ``exists`` takes a failed request for a missing file.)
    """
    fs, path = open_fs(url, storage_options)
    try:
        _ask(fs, url, lambda: fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(url: Url, storage_options: StorageOptions = None) -> bool:
    """Tell whether there is a folder; on the web, whether the server lists anything there.

    Raises
    ------
    OSError
        If a remote file system does not say.
    """
    fs, path = open_fs(url, storage_options)
    return bool(_ask(fs, url, lambda: fs.isdir(path)))


def glob(pattern: Url, storage_options: StorageOptions = None) -> list[str]:
    """Return the sorted URLs of the files that a pattern of ``*``, ``?`` and ``[…]`` means."""
    fs, path = open_fs(pattern, storage_options)
    found = sorted(_ask(fs, pattern, lambda: fs.glob(path)))
    return [str(fs.unstrip_protocol(one)) if "://" in os.fspath(pattern) else str(one) for one in found]


def read_bytes(url: Url, storage_options: StorageOptions = None) -> bytes:
    """Return a small file's content.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    fs, path = open_fs(url, storage_options)
    return bytes(_ask(fs, url, lambda: fs.cat_file(path)))


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


def absolute(url: Url) -> str:
    """Return a path that means the same in every process: absolute, ``~`` replaced; "" and a URL stay as they are."""
    text = os.fspath(url)
    return text if "://" in text or not text else os.path.abspath(os.path.expanduser(text))


def folder(url: Url) -> str:
    """Return what `absolute` does, without a slash at its end."""
    text = absolute(url)
    return text.rstrip("/") or text[:1]


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
    names = []
    for info in _ask(fs, root, lambda: fs.ls(path, detail=True)):
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
        try:
            moment = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        except (ValueError, OverflowError):  # file systems know years that datetime does not
            moment = f"{seconds} s"
        return FileIdentity(status.st_size, f"{moment}.{nanoseconds:09d}Z")
    info = _ask(fs, url, lambda: fs.info(path))
    etag = info.get("ETag") or info.get("etag")
    modified = _ask(fs, url, lambda: _modified(fs, path, info))
    return FileIdentity(int(info["size"]), modified, None if etag is None else str(etag))


def _modified(fs: AbstractFileSystem, path: str, info: Mapping[str, Any]) -> str | None:
    moment = info.get("LastModified") or info.get("Last-Modified")  # S3, HTTP: no need to ask again
    if moment is None:
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
    the target, whose permissions it takes. Elsewhere the upload is completed at the end or given up, and the store is
    asked whether it has all bytes. After an exception in the ``with`` block, the target is what it was.

    Yields
    ------
    binary file, open for writing

    Raises
    ------
    OSError
        If it cannot be written; names the target, and what to do about a full or read-only file system.
    """
    fs, path = open_fs(url, storage_options)
    writer = write_local(path) if isinstance(fs, LocalFileSystem) else write_remote(fs, path, os.fspath(url))
    with writer as file:
        yield file


class HashedFile(io.RawIOBase):
    """Passes on what is written to a file, and hashes it (`hash`, XXH3-128)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = xxhash.xxh3_128()

    def writable(self) -> bool:
        """Tell that it can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Write and hash bytes; return how many."""
        self.hash.update(data)
        self._file.write(data)
        return len(data)


def sweep_temporaries(
    root: Url, older_than_s: float = 0, storage_options: StorageOptions = None, folders: Sequence[str] = ("",)
) -> list[str]:
    """Remove what killed writers of ours left directly in a folder, or in folders below it.

    A temporary file that a living process of this machine still writes stays. On local file systems its lock tells
    (where the file system shares locks, also of other machines); elsewhere the process named in the file's name, and
    files of other machines stay for an hour. Object stores show no unfinished file (what a killed writer uploaded is
    dropped by the bucket's rule for incomplete multipart uploads).

    Parameters
    ----------
    root : str or path
        A folder; one that does not exist is fine.
    older_than_s : float
        Only files not changed for so many seconds.
    folders : sequence of str
        Paths below `root`, ``""`` for itself.

    Returns
    -------
    list of str
        The names removed, below `root`.
    """
    removed = []
    for folder in folders:
        fs, path = open_fs(join(root, folder) if folder else root, storage_options)
        if isinstance(fs, AsyncFileSystem):
            break
        try:
            found = [info["name"] for info in fs.ls(path, detail=True) if info["type"] == "file"]
        except (FileNotFoundError, NotADirectoryError):
            continue
        for file in sorted(found):
            name = file.rpartition("/")[2]
            if is_left_over(fs, file, older_than_s):
                with suppress(FileNotFoundError):
                    fs.rm_file(file)
                    removed.append(f"{folder}/{name}" if folder else name)
    return removed
