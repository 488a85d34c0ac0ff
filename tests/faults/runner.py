"""Runs jobs in processes of their own: imports everything once, then forks for each job.

Importing torch takes seconds, a small job a fraction of one. ``python -m tests.faults.runner`` reads one JSON object a
line and answers each with one: ``{"start": job}`` with the new process's id, ``{"wait": pid}`` with how it ended (or
that it was stopped). A job is a list of runs, done one after the other in one process; see :class:`Job`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

TIME_LIMIT_S = 300
"""A job that hangs is ended after so many seconds."""


@dataclass
class Job:
    """What a process does.

    Attributes
    ----------
    runs : list of list of str
        Arguments of the command line, or ``["save-in-place", folder, …]``, or those of ``mount``.
    result : str
        File that gets each run's outcome, one JSON object a line.
    fault : dict, optional
        :class:`~tests.faults.points.Fault`, for the first run that comes to it.
    environment : dict of str to str
        Set before the first run; a time zone takes effect.
    user : int, optional
        Id of the user to become.
    clock_shift_s : list of float
        What is added to this process's clock in each run.
    in_workers : bool
        Whether the fault strikes in the cluster's workers instead of here.
    row_group_rows : int, optional
        Rows of a row group, and of a window of rows that is worked on at once: few, so that a small shard has several.
    cores : int, optional
        How many cores the process may use; with one, shards are worked on in their order.
    """

    runs: list[list[str]]
    result: str
    fault: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    user: int | None = None
    clock_shift_s: list[float] = field(default_factory=list)
    in_workers: bool = False
    row_group_rows: int | None = None
    cores: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values for JSON."""
        return asdict(self)


def serve() -> None:
    """Answer requests until standard input ends."""
    import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: dict[str, Any] = {"pid": _fork(Job(**request["start"]))}
        else:
            _, status = os.waitpid(request["wait"], os.WUNTRACED)
            answer = ended(status)
        print(json.dumps(answer), flush=True)


IMPORTED = (
    "dask.dataframe",
    "distributed",
    "timm",
    "torch",
    "nemo_image.classifiers",
    "nemo_image.cli.curate",
    "nemo_image.cli.inspect",
    "nemo_image.embedders",
)


def import_everything() -> None:
    """Import what jobs need; starts no threads, so that forking is safe."""
    for name in IMPORTED:
        importlib.import_module(name)


def ended(status: int) -> dict[str, Any]:
    """Return a wait status in words."""
    if os.WIFSTOPPED(status):
        return {"stopped": True}
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"status": os.WEXITSTATUS(status)}


def _fork(job: Job) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()  # its own group, which can be killed with its workers
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(job.result + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for target, descriptor in ((0, null), (1, log), (2, log)):
            os.dup2(descriptor, target)
        signal.alarm(TIME_LIMIT_S)
        do(job)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def do(job: Job) -> None:
    """Do a job in this process."""
    from tests.faults.points import Fault, Trap, install

    os.environ.update(job.environment)
    if job.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    time.tzset()
    fault = Fault(**job.fault) if job.fault else None
    trap = Trap(None if job.in_workers else fault)
    install(trap)
    if job.in_workers:
        _strike_in_workers(job)
    write_often()
    if job.row_group_rows:
        cut_small(job.row_group_rows)
    with open(job.result, "a", buffering=1) as out:
        if job.user is not None:
            os.setgroups([])
            os.setresgid(job.user, job.user, job.user)
            os.setresuid(job.user, job.user, job.user)
        for number, arguments in enumerate(job.runs):
            if job.clock_shift_s:
                _shift_clock(job.clock_shift_s[number])
            trap.seen.clear()
            out.write(json.dumps(_run(arguments, trap)) + "\n")


def write_often() -> None:
    """Have several writes to each tar, however small it is."""
    from nemo_image.export import copy

    copy.WINDOW = 512


def cut_small(rows: int) -> None:
    """Have small row groups, and windows of as many rows."""
    from nemo_image.datasets import shard_pass
    from nemo_image.shards import parquet

    shard_pass.WINDOW_ROWS = parquet.ROW_GROUP_ROWS = rows


def _strike_in_workers(job: Job) -> None:
    import dask

    os.environ["NEMO_IMAGE_TEST_FAULT"] = json.dumps({"fault": job.fault, "row_group_rows": job.row_group_rows})
    dask.config.set({"distributed.worker.preload": ["tests.faults.in_worker"]})


def _run(arguments: list[str], trap: Any) -> dict[str, Any]:
    output, errors = io.StringIO(), io.StringIO()
    raised = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = _call(arguments)
        except Exception as error:
            status, raised = 1, type(error).__name__
            traceback.print_exc()
    return {
        "status": status,
        "raised": raised,
        "output": output.getvalue(),
        "errors": errors.getvalue(),
        "decoded": trap.seen["decode", ""],
        "forwarded": trap.seen["forward", ""],
        "written": {kind: count for (stage, kind), count in trap.seen.items() if stage == "moved"},
    }


def _call(arguments: list[str]) -> int:
    if arguments[0] == "save-in-place":
        print(json.dumps(save_in_place(*arguments[1:])))
        return 0
    if arguments[0] == "mount":
        import subprocess

        return subprocess.run(arguments, check=False).returncode
    from nemo_image.cli import main

    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def save_in_place(folder: str, path: str | None = None) -> dict[str, Any]:
    """Embed a dataset and save it over itself (or to `path`); return the run's totals."""
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.embedders import TimmImageEmbedder
    from tests.makers import TINY_MODEL

    dataset = ImageTextPairDataset.from_webdataset(folder)
    saved = TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata(path)
    return dict(saved.run_totals or {})


_real_time = time.time


def _shift_clock(seconds: float) -> None:
    """Make Python's clock go ahead or behind; the file system's stays right."""
    import datetime

    real = datetime.datetime if not hasattr(datetime, "_real") else datetime._real

    class Shifted(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.now(tz) + datetime.timedelta(seconds=seconds)

    datetime._real = real  # type: ignore[attr-defined]
    datetime.datetime = Shifted  # type: ignore[misc]
    time.time = lambda: _real_time() + seconds


if __name__ == "__main__":
    serve()
