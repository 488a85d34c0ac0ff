"""Named places in a run where a fault strikes: the process is killed or stopped there, or a system call fails.

Everything is patched from outside (``open``, ``os.fsync``, ``os.replace``, pyarrow's ``ParquetWriter``,
``PIL.Image.open``, torch's forward hooks), so that the product carries no hooks. A file's *kind* is told from its path,
its *stage* from what is being done to it:

==========  ==========================================================================
``opening``  before the temporary file is made
``opened``   the temporary file is there, and empty
``half``     half of a write has reached the disk
``group``    a row group is written, the Parquet footer is not
``complete`` everything is written, nothing is synced
``synced``   synced, but not yet under its name
``moved``    under its name; whatever comes next has not begun
==========  ==========================================================================

``decode`` and ``forward`` have no file: a picture's header is about to be read, a batch to enter the model.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

TEMPORARY = re.compile(r"\.nemo-image-tmp-[0-9a-f]{32}-")

KINDS = {
    "enriched": r"/_nemo_image/enriched/.*\.parquet$",
    "enrich manifest": r"/enriched/_nemo_image/dataset\.json$",
    "enrich ledger": r"/enriched/_nemo_image/[^/]*\.jsonl$",
    "export manifest": r"/_nemo_image/export\.json$",
    "count ledger": r"/_nemo_image/to_webdataset-count[^/]*\.jsonl$",
    "output ledger": r"/_nemo_image/to_webdataset-output[^/]*\.jsonl$",
    "export ledger": r"/_nemo_image/to_webdataset[^/]*\.jsonl$",
    "ledger": r"\.jsonl$",
    "tar": r"\.tar$",
    "idx": r"\.idx$",
    "parquet": r"\.parquet$",
}
"""Pattern of a file's path by its kind; the first that fits counts. ``parquet`` is exported, or enriched in place."""

WRITES_BEFORE_HALF = {"enriched": 2, "parquet": 2, "tar": 3}
"""Writes that pass before the one that is cut in half: not a file's first bytes, but its middle."""

MODEL_CLASS = "EfficientNet"
"""The class of the test model, whose calls are counted."""


@dataclass(frozen=True)
class Fault:
    """What happens, where.

    Attributes
    ----------
    stage : str
        A stage of the module's table, or ``"decode"`` or ``"forward"``.
    kind : str
        A file's kind; empty for ``decode`` and ``forward``.
    nth : int
        At the how-manieth time that the run comes there, from 1.
    action : str
        ``"kill"`` (SIGKILL), ``"stop"`` (SIGSTOP), or the name of an error of the system, such as ``"ENOSPC"``.
    only_once : str
        A file that the first process to strike makes, so that it strikes once in a cluster; empty for always.
    """

    stage: str
    kind: str = ""
    nth: int = 1
    action: str = "kill"
    only_once: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind, self.stage, f"#{self.nth}") if part)


def kind_of(path: str) -> str | None:
    """Return the kind of the file that a path, perhaps a temporary one, stands for."""
    final = TEMPORARY.sub("", path)
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, final)), None)


class Trap:
    """Counts how often each place is come to, and strikes at one of them."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def pass_by(self, stage: str, kind: str = "") -> None:
        """Tell the trap that a place is come to."""
        fault = self.fault
        with self._lock:
            self.seen[stage, kind] += 1
            here = self.seen[stage, kind]
        if fault is not None and (stage, kind, here) == (fault.stage, fault.kind, fault.nth):
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        if fault.only_once:
            try:
                os.close(os.open(fault.only_once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            number = getattr(errno, fault.action)
            raise OSError(number, os.strerror(number))


class _WatchedFile(io.BufferedWriter):
    """A file whose every write passes a trap with half of its bytes on the disk."""

    def __init__(self, path: str, trap: Trap, kind: str) -> None:
        super().__init__(io.FileIO(path, "x"))
        self._trap, self._kind = trap, kind
        self._to_pass = WRITES_BEFORE_HALF.get(kind, 0)

    def write(self, data: Any) -> int:
        if self._to_pass != 0:
            self._to_pass -= 1
            return super().write(data)
        self._to_pass = -1  # once a file
        view = memoryview(data).cast("B")
        first = super().write(view[: len(view) // 2])
        self.flush()
        self._trap.pass_by("half", self._kind)
        return first + super().write(view[len(view) // 2 :])


def install(trap: Trap) -> None:
    """Lead everything that the table names past `trap`, for the rest of this process's life."""
    _watch_files(trap)
    _watch_row_groups(trap)
    _watch_pictures(trap)


_writing = threading.local()  # the kind of file that a thread opened last


def _watch_files(trap: Trap) -> None:
    plain_open, plain_sync, plain_replace, plain_writev = builtins.open, os.fsync, os.replace, os.writev
    to_pass: dict[str, int] = {}

    def watched_open(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        kind = kind_of(str(file)) if isinstance(file, str) and mode == "xb" and TEMPORARY.search(file) else None
        if kind is None:
            return plain_open(file, mode, *more, **options)
        _writing.kind = kind
        trap.pass_by("opening", kind)
        made = _WatchedFile(file, trap, kind)
        trap.pass_by("opened", kind)
        return made

    def watched_writev(descriptor: int, pieces: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = kind_of(path) if TEMPORARY.search(path) else None
        left = to_pass.setdefault(path, WRITES_BEFORE_HALF.get(kind, 0)) if kind is not None else -1
        if kind is None or left != 0:
            to_pass[path] = left - 1
            return plain_writev(descriptor, pieces)
        to_pass[path] = -1  # once a file
        whole = b"".join(pieces)
        first = os.write(descriptor, whole[: len(whole) // 2])
        trap.pass_by("half", kind)
        return first

    def watched_sync(descriptor: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{int(descriptor)}")
        kind = kind_of(path) if TEMPORARY.search(path) else None
        if kind is not None:
            trap.pass_by("complete", kind)
        plain_sync(descriptor)

    def watched_replace(source: Any, target: Any, **options: Any) -> None:
        kind = kind_of(os.fspath(target)) if TEMPORARY.search(os.fspath(source)) else None
        if kind is not None:
            trap.pass_by("synced", kind)
        plain_replace(source, target, **options)
        if kind is not None:
            trap.pass_by("moved", kind)

    builtins.open = watched_open
    os.writev = watched_writev
    os.fsync = watched_sync  # type: ignore[assignment]
    os.replace = watched_replace  # type: ignore[assignment]


def _watch_row_groups(trap: Trap) -> None:
    from pyarrow.parquet import ParquetWriter

    plain = ParquetWriter.write_table

    def watched(self: Any, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        trap.pass_by("group", getattr(_writing, "kind", ""))

    ParquetWriter.write_table = watched


def _watch_pictures(trap: Trap) -> None:
    from torch.nn.modules.module import register_module_forward_pre_hook

    from nemo_image.shards import decode

    plain = decode._own_header

    def watched(*args: Any, **options: Any) -> Any:
        trap.pass_by("decode")
        return plain(*args, **options)

    def forward(module: Any, _: Any) -> None:
        if type(module).__name__ == MODEL_CLASS:
            trap.pass_by("forward")

    decode._own_header = watched
    register_module_forward_pre_hook(forward)
