"""A lock on a storage that has none: an object that its holder keeps changing while it is alive.

Nobody's clock is compared with another's: who finds a lease watches it for some of the holder's beats by its own
monotonic clock. If it changes, the holder is alive; if it does not, the holder is dead, and the lease is taken over. A
holder that finds another's lease in the place of its own stops beating and is told so.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.errors import OutputBusyError, one_line
from nemo_image.shards import files, retries
from nemo_image.shards.machine import is_running, machine_id

logger = logging.getLogger("nemo_image")

BEAT_S = 5.0
"""Seconds between two changes of a lease by its holder, who says so in it."""
BEATS_TO_DIE = 6
"""A lease that stays the same for so many beats is a dead holder's."""

_COMMAND_CHARACTERS = 300
_held: set[str] = set()  # tokens of the leases of this process


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes
    ----------
    what : str
        What runs, as ``"curate"``.
    part : str or None
        ``"3/16"``, where it is one of several parts.
    machine : str
        See :func:`~nemo_image.shards.machine.machine_id`.
    started : str
        ISO 8601, UTC, by the clock of that machine.
    beat_s : float
        Seconds between two beats.
    """

    what: str
    part: str | None = None
    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=machine_id)
    pid: int = field(default_factory=os.getpid)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    command: str = field(default_factory=lambda: shlex.join(sys.argv)[:_COMMAND_CHARACTERS])
    beat_s: float = field(default_factory=lambda: BEAT_S)
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def to_bytes(self, beat: int = 0) -> bytes:
        """Return the holder as JSON, with the number of its beat."""
        return (
            json.dumps({**asdict(self), "beat": beat}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        )

    @classmethod
    def from_bytes(cls, text: bytes) -> Holder | None:
        """Read :meth:`to_bytes`; None where the text is none of it."""
        try:
            values = json.loads(text)
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            return None

    def __str__(self) -> str:
        part = f" (part {self.part})" if self.part else ""
        return (
            f"{self.what}{part} on {self.host}, process {self.pid}, since {self.started}, started as `{self.command}`"
        )


def busy(root: str, holder: Holder | None) -> OutputBusyError:
    """Return the error that says who writes to an output folder."""
    who = str(holder) if holder is not None else "a process that has left no name"
    return OutputBusyError(
        f"{root}: another run is writing there: {who}. Wait for it to end, stop it, or give another output folder"
    )


class Lease:
    """A lease on a file system, to be acquired and released.

    Parameters
    ----------
    fs : AbstractFileSystem
    path : str
        Of the lease's object.
    root : str
        The output folder, for messages.
    holder : Holder
    rivals : callable
        Returns the paths of other leases that must not be held at the same time.
    """

    def __init__(
        self, fs: AbstractFileSystem, path: str, root: str, holder: Holder, rivals: Callable[[], Sequence[str]]
    ) -> None:
        self.is_lost = False
        self._fs, self._path, self._root, self._holder, self._rivals = fs, path, root, holder, rivals
        self._beats = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="nemo-image-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease.

        Raises
        ------
        OutputBusyError
            If it, or a rival, is held by a living run.
        OSError
            If the storage does not take it.
        """
        _held.add(self._holder.token)
        try:
            self._take()
            self._thread.start()  # watching rivals takes a while
            # Own first, rivals then: of two that come at once, at most one goes on (or neither does).
            for path in self._rivals():
                text = self._read(path)
                if text is not None and self._is_alive(path, text):
                    raise busy(self._root, Holder.from_bytes(text))
                if text is not None:
                    logger.warning("%s: the lease of a dead run is removed: %s", self._root, Holder.from_bytes(text))
                    self._remove(path)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Stop beating, and remove the lease if it is still this holder's."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        _held.discard(self._holder.token)
        if self._holder.pid != os.getpid():
            return  # a forked child has no part in it
        try:
            if not self.is_lost and self._is_own(self._read(self._path)):
                self._remove(self._path)
        except Exception as error:
            logger.warning("%s: the lease could not be removed: %s", self._root, error)

    def _take(self) -> None:
        text = self._read(self._path)
        if text is None:
            self._create()
            text = self._read(self._path) or b""
            if self._is_own(text):
                # A store that overlooked the condition lets two of them come here: the heartbeat finds out.
                return
        if self._is_alive(self._path, text):
            raise busy(self._root, Holder.from_bytes(text))
        logger.warning("%s: the lease of a dead run is taken over: %s", self._root, Holder.from_bytes(text))
        self._write()
        self._confirm()

    def _create(self) -> None:
        """Create the lease if there is none."""
        if not isinstance(self._fs, AsyncFileSystem):
            self._fs.makedirs(self._fs._parent(self._path), exist_ok=True)
        content = self._holder.to_bytes()
        try:
            retries.call(self._path, lambda: self._fs.pipe_file(self._path, content, mode="create"))
        except (NotImplementedError, TypeError, ValueError):  # no exclusive writing there
            self._write()
            self._confirm()
        except (FileExistsError, PermissionError):
            if self._read(self._path) is None:
                raise
        except OSError as error:
            if self._read(self._path) is None:
                raise OSError(f"{self._root}: cannot be written to ({one_line(error)})") from error

    def _confirm(self) -> None:
        """After a while in which a rival's writing ends, see whose lease it is."""
        self._ending.wait(self._holder.beat_s)
        text = self._read(self._path)
        if not self._is_own(text):
            raise busy(self._root, Holder.from_bytes(text or b""))

    def _is_alive(self, path: str, text: bytes) -> bool:
        holder = Holder.from_bytes(text)
        if holder is not None and holder.machine == machine_id():
            if holder.pid == os.getpid():
                return holder.token in _held
            if not is_running(holder.pid):
                return False
        beat_s = holder.beat_s if holder is not None else BEAT_S
        logger.info("%s: is its run alive? Watching for %.0f s: %s", self._root, BEATS_TO_DIE * beat_s, holder)
        end = time.monotonic() + BEATS_TO_DIE * beat_s
        while time.monotonic() < end:
            self._ending.wait(beat_s / 2)
            now = self._read(path)
            if now != text:
                # Gone: it has ended in this moment.
                return now is not None
        return False

    def _keep_alive(self) -> None:
        while not self._ending.wait(self._holder.beat_s):
            try:
                if not self._is_own(self._read(self._path)):
                    self.is_lost = True
                    logger.error("%s: another run has taken the output over", self._root)
                    return
                self._beats += 1
                self._write()
            except Exception as error:  # the storage may come back
                logger.warning("%s: the lease could not be renewed: %s", self._root, error)

    def _is_own(self, text: bytes | None) -> bool:
        holder = Holder.from_bytes(text or b"")
        return holder is not None and holder.token == self._holder.token

    def _read(self, path: str) -> bytes | None:
        try:
            return retries.call(path, lambda: bytes(self._fs.cat_file(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self) -> None:
        content = self._holder.to_bytes(self._beats)
        if isinstance(self._fs, LocalFileSystem):
            with files.atomic_writer(self._path) as file:
                file.write(content)
        else:
            retries.call(self._path, lambda: self._fs.pipe_file(self._path, content))

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)
