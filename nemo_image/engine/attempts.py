"""Breadcrumbs that survive a process's death: how often has work on a shard killed the process that did it?

Each attempt leaves a small file below ``<root>/_nemo_image/attempts/`` before it starts and removes it when it ends,
with an exception too. Only a death leaves it there (SIGKILL, SIGSEGV, a lost machine). It knows no culprit: a run that
was killed from outside leaves the files of the shards that it was working on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.engine.ledger import FOLDER
from nemo_image.shards import files, retries
from nemo_image.shards.files import StorageOptions, Url

ATTEMPTS = "attempts"
MAX_DEATHS = 3
"""So many deaths, all but the first of them with decoders kept in a child process, are not a decoder's fault."""

_TAIL = 40  # characters of a shard's name that its files show, for people


class Deaths(int):
    """How many earlier attempts at a shard ended with the death of their process.

    Attributes
    ----------
    in_this_run : int
        Those of the present run: a run that was killed from outside, and begun again, says nothing against a shard.
    """

    in_this_run: int = 0


class Attempts:
    """The attempts at the shards of one output folder.

    Parameters
    ----------
    root : str or path
        The output folder: a local path or any fsspec URL.
    storage_options : mapping, optional
        Credentials and settings of its file system.
    run : str, optional
        Names the run: letters and digits.
    """

    def __init__(self, root: Url, storage_options: StorageOptions = None, run: str = "") -> None:
        self.root = root
        self.storage_options = storage_options
        self.run = run

    @contextmanager
    def attempt(self, shard: str) -> Iterator[Deaths]:
        """Work on a shard inside the ``with`` block.

        A block that ends well clears the shard's deaths. One that raises leaves them as they were, unless they had
        reached `MAX_DEATHS` in this run: that verdict is final for it, and the next one starts afresh.

        Yields
        ------
        Deaths
            0 where all is well.

        Raises
        ------
        OSError
            If the folder cannot be written.
        """
        prefix = _prefix(shard)
        crumbs = self._crumbs()
        name = f"{prefix}{self.run}.{uuid.uuid4().hex}-{_tail(shard)}"
        crumbs.leave(name, _note(shard))
        dead: list[str] = []
        deaths = Deaths()
        try:
            dead = [other for other in crumbs.dead(prefix) if other != name]
            deaths = Deaths(len(dead))
            deaths.in_this_run = sum(other.startswith(f"{prefix}{self.run}.") for other in dead)
            yield deaths
        except BaseException:
            crumbs.remove([name, *(dead if deaths.in_this_run >= MAX_DEATHS else ())])
            raise
        crumbs.remove([name, *dead])

    def clear(self) -> None:
        """Remove the folder if it is empty: not while others work, nor while deaths are noted there."""
        self._crumbs().remove_folder()

    def _crumbs(self) -> _LocalCrumbs | _RemoteCrumbs:
        url = files.join(self.root, FOLDER, ATTEMPTS)
        fs, folder = files.open_fs(url, self.storage_options)
        return _LocalCrumbs(folder) if isinstance(fs, LocalFileSystem) else _RemoteCrumbs(fs, url, folder)


def _prefix(shard: str) -> str:
    """Return how the names of a shard's files start: shards may be named with slashes, dots, or for kilobytes."""
    return hashlib.sha256(shard.encode("utf-8", "surrogatepass")).hexdigest()[:32] + "."


def _tail(shard: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", shard[-_TAIL:])


def _note(shard: str) -> bytes:
    """Return what somebody who finds the file wants to know."""
    return json.dumps({"shard": shard, "host": platform.node(), "pid": os.getpid()}).encode() + b"\n"


class _LocalCrumbs:
    """Files that their process keeps locked: the kernel lets go of the locks of the dead."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._held: int | None = None

    def leave(self, name: str, note: bytes) -> None:
        path = os.path.join(self.folder, name)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        while self._held is None:
            try:
                self._held = os.open(path, flags, 0o666)
            except FileNotFoundError:  # not made yet, or removed by a run that has just finished
                os.makedirs(self.folder, exist_ok=True)
        try:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._held, note)
        except BaseException:  # a full disk
            self.remove([name])
            raise

    def dead(self, prefix: str) -> list[str]:
        """Return the names of a shard's files whose process does not live."""
        names = [name for name in os.listdir(self.folder) if name.startswith(prefix)]
        return [name for name in names if not self._alive(os.path.join(self.folder, name))]

    def _alive(self, path: str) -> bool:
        try:
            with open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            return True  # or it has ended well this moment
        except OSError:
            return False  # no locks here
        return False

    def remove(self, names: Iterable[str]) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, name))

    def remove_folder(self) -> None:
        with suppress(OSError):
            os.rmdir(self.folder)


class _RemoteCrumbs:
    """Files of a store that knows no locks: every file of another attempt counts as dead."""

    def __init__(self, fs: AbstractFileSystem, url: str, folder: str) -> None:
        self.fs = fs
        self.url = url
        self.folder = folder.rstrip("/")

    def leave(self, name: str, note: bytes) -> None:
        path = f"{self.folder}/{name}"
        try:
            retries.call(self.url, lambda: self.fs.pipe_file(path, note))
        except FileNotFoundError:  # object stores need no folders, others do
            self.fs.makedirs(self.folder, exist_ok=True)
            self.fs.pipe_file(path, note)

    def dead(self, prefix: str) -> list[str]:
        """Return the names of a shard's files."""
        names = (str(path).rpartition("/")[2] for path in self._listed())
        return [name for name in names if name.startswith(prefix)]

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            path = f"{self.folder}/{name}"
            with suppress(FileNotFoundError):
                retries.call(self.url, functools.partial(self.fs.rm_file, path))

    def remove_folder(self) -> None:
        with suppress(OSError, NotImplementedError):
            if not self._listed():
                self.fs.rmdir(self.folder)

    def _listed(self) -> list[str]:
        self.fs.invalidate_cache(self.folder)  # others write there too
        found: list[str] = retries.call(self.url, lambda: self.fs.ls(self.folder, detail=False))
        return found
