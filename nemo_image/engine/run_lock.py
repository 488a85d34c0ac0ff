"""One run at a time on an output folder.

.. code-block:: text

    <root>/_nemo_image/run.lock             held by a whole run; shared by the parts of one
    <root>/_nemo_image/part-3-of-16.lock    held by a part

On local file systems these are files under ``flock``, which the kernel frees when the process dies, however it dies: a
rerun starts at once. They stay when a run ends, empty: whoever removed one could remove it under a process that has
just opened it, and two processes would each hold a lock of that name. Elsewhere, and where the file system knows no
``flock``, they are leases (:mod:`nemo_image.engine.lease`), and are removed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.engine.lease import Holder, Lease, busy
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import ArgumentError, DatasetError, OutputBusyError
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

RUN = "run.lock"
_PART = re.compile(r"part-[0-9]+-of-(?P<count>[0-9]+)\.lock")
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_POLL_S = 0.2
_Held = Mapping[str, "tuple[RunLock, tuple[int, int] | None]"]
_held: ContextVar[_Held] = ContextVar("nemo_image_run_locks", default={})  # noqa: B039 -- never changed
_open_locks: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


class RunLock:
    """A run's hold on its output folder.

    Attributes
    ----------
    root : str
        The folder.
    """

    def __init__(self, root: str, lease: Lease | None = None) -> None:
        self.root = root
        self._lease = lease

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken the folder over, because this one seemed dead (on object stores only)."""
        return self._lease is not None and self._lease.is_lost

    def check(self) -> None:
        """Raise if the folder is another run's by now.

        Raises
        ------
        OutputBusyError
            If :attr:`is_lost`.
        """
        if self.is_lost:
            raise OutputBusyError(
                f"{self.root}: another run has taken the output over, because this one had not renewed its lease for "
                "long (was it suspended, or the storage out of reach?). Let that run end, then run this one again"
            )


@contextmanager
def run_lock(
    root: files.Url,
    what: str,
    storage_options: files.StorageOptions = None,
    part: tuple[int, int] | None = None,
    wait_s: float = 0.0,
) -> Iterator[RunLock]:
    """Hold an output folder for a run; others are refused.

    Within the ``with`` block, the same context may hold the folder again (``curate`` exports where it enriches): that
    is the same hold. Other threads are others.

    Parameters
    ----------
    root : str or path
        The output folder. One that cannot be written to is not held (the run will fail there for its own reason).
    what : str
        What runs, for messages: ``"save_metadata"``.
    storage_options : mapping, optional
        For fsspec.
    part : tuple of int, optional
        ``(i, n)`` for the i-th of n parts, from 1 on. The parts of one n may run at the same time; each of them
        excludes itself, parts of another n, and whole runs.
    wait_s : float
        Seconds to wait for others to end.

    Yields
    ------
    RunLock

    Raises
    ------
    OutputBusyError
        If another run is alive there; names it. Also at the end of the ``with`` block, if the hold was lost.
    ArgumentError
        If `part` is not a part.
    """
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ArgumentError(f"part {part[0]}/{part[1]}: give i/n with i from 1 to n")
    root = os.fspath(root)
    fs, folder = files.open_fs(files.join(root, FOLDER), storage_options)
    place = os.path.realpath(folder) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(folder))
    held = _held.get()
    if place in held and held[place][1] in (None, part):
        yield held[place][0]
        return
    holder = Holder(what, f"{part[0]}/{part[1]}" if part else None)
    with ExitStack() as stack:
        lease = _acquire(stack, fs, folder, storage_options, root, holder, part, wait_s)
        lock = RunLock(root, lease)
        token = _held.set({**held, place: (lock, part)})
        try:
            yield lock
        finally:
            _held.reset(token)
        lock.check()


def _acquire(
    stack: ExitStack,
    fs: AbstractFileSystem,
    folder: str,
    storage_options: files.StorageOptions,
    root: str,
    holder: Holder,
    part: tuple[int, int] | None,
    wait_s: float,
) -> Lease | None:
    """Take the lock for as long as `stack` lasts; return the lease, if it is one."""
    end = time.monotonic() + wait_s
    while True:
        try:
            with ExitStack() as attempt:
                lease = None
                if not isinstance(fs, LocalFileSystem) or not _flocked(attempt, Path(folder), root, holder, part):
                    lease = _leased(attempt, fs, folder, storage_options, root, holder, part)
                stack.push(attempt.pop_all())
                return lease
        except OutputBusyError:
            if time.monotonic() >= end:
                raise
            time.sleep(_POLL_S)
        except (OSError, NotImplementedError) as error:
            if not _is_read_only(fs, error):
                raise
            logger.warning("%s cannot be locked, so that two runs there could meet: %s", root, error)
            return None


def _is_read_only(fs: AbstractFileSystem, error: Exception) -> bool:
    if isinstance(error, OSError) and not isinstance(error, PermissionError):
        return error.errno in _READ_ONLY or "http" in fs.protocol
    return True


def _name(part: tuple[int, int] | None) -> str:
    return RUN if part is None else f"part-{part[0]}-of-{part[1]}.lock"


def _excludes(part: tuple[int, int] | None, name: str) -> bool:
    """Tell whether a lock of another name must not be held together with that of `part`."""
    match = _PART.fullmatch(name)
    if match is None:
        return name == RUN and part is not None
    return part is None or int(match["count"]) != part[1]


# Leases ---------------------------------------------------------------------------------------------------------------


def _leased(
    stack: ExitStack,
    fs: AbstractFileSystem,
    folder: str,
    storage_options: files.StorageOptions,
    root: str,
    holder: Holder,
    part: tuple[int, int] | None,
) -> Lease:
    def rivals() -> list[str]:
        try:
            found = files.list_files(files.join(root, FOLDER), ".lock", storage_options)
        except FileNotFoundError:
            return []
        return [f"{folder}/{name}" for name in found if _excludes(part, name)]

    lease = Lease(fs, f"{folder}/{_name(part)}", root, holder, rivals)
    lease.acquire()
    stack.callback(lease.release)
    return lease


# flock ----------------------------------------------------------------------------------------------------------------


def _flocked(stack: ExitStack, folder: Path, root: str, holder: Holder, part: tuple[int, int] | None) -> bool:
    """Take the locks of a local folder; False if the file system has none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DatasetError(
            f"{error.filename} is a file, where a folder of {root} should be: give another one"
        ) from error
    own = folder / _name(part)
    try:
        if part is not None and not _flock(stack, folder / RUN, fcntl.LOCK_SH, b""):
            raise _busy(folder, root, folder / RUN)
        if not _flock(stack, own, fcntl.LOCK_EX, holder.to_bytes()):
            raise _busy(folder, root, own)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return False
        raise
    # A whole run has locked out all parts; parts of another number are asked one by one, after the own lock is there.
    for path in folder.iterdir() if part is not None else ():
        if path.name != RUN and _excludes(part, path.name) and _is_held(path):
            raise _busy(folder, root, path)
    return True


def _flock(stack: ExitStack, path: Path, kind: int, text: bytes) -> bool:
    """Lock a file for as long as `stack` lasts, and write `text` into it; False if it is locked."""
    file = _open(path)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except BaseException:
        file.close()
        raise
    _open_locks.add(file)
    _set_text(file, text)
    stack.callback(_free, file)
    return True


def _open(path: Path) -> IO[bytes]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY)  # somebody else's: can be locked all the same
    return os.fdopen(descriptor, "rb", buffering=0)


def _set_text(file: IO[bytes], text: bytes) -> None:
    with suppress(OSError):  # only for messages
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), text, 0)


def _free(file: IO[bytes]) -> None:
    if not file.closed:
        _set_text(file, b"")
        file.close()


def _is_held(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _busy(folder: Path, root: str, found: Path) -> OutputBusyError:
    """Name the holder of a lock; of the run's, that may be its parts."""
    for path in [found, *sorted(folder.glob("part-*.lock"))]:
        if _is_held(path):
            holder = Holder.from_bytes(path.read_bytes())
            if holder is not None:
                return busy(root, holder)
    return busy(root, None)


def _close_inherited(*_: Any) -> None:
    """Close a forked child's copies: they would hold the lock when the parent is dead."""
    for file in list(_open_locks):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)
