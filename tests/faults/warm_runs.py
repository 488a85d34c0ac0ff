"""The tests' side of `tests.faults.runner`: start jobs, see how they end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.points import Fault
from tests.faults.runner import Job
from tests.makers import TINY_MODEL

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For the process that forks: no library may start threads as it is imported."""


@dataclass(frozen=True)
class Run:
    """One run of the command line, as the user sees it, and how much it computed.

    Attributes
    ----------
    status : int
        Exit status.
    raised : str or None
        The exception's type where the run ended with a traceback.
    output, errors : str
        Standard output and standard error.
    decoded, forwarded : int
        Pictures opened, and batches that entered the model.
    written : dict of str to int
        Files written, by their kind.
    """

    status: int
    raised: str | None
    output: str
    errors: str
    decoded: int
    forwarded: int
    written: dict[str, int]

    @property
    def said(self) -> str:
        """The line that tells the user what is wrong."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("Error:")]
        return (ours or lines or [""])[-1]

    @property
    def result(self) -> dict[str, Any]:
        """What a good run printed as JSON."""
        assert self.status == 0, self.errors
        found: dict[str, Any] = json.loads(self.output)
        return found


@dataclass(frozen=True)
class Ending:
    """How a job's process ended.

    Attributes
    ----------
    killed, stopped : bool
    runs : list of Run
        Those that were finished.
    log : str
        What the process wrote beside them.
    """

    killed: bool
    stopped: bool
    runs: list[Run]
    log: str


class WarmRuns:
    """A process with everything imported, which forks one for each job.

    Parameters
    ----------
    folder : Path
        For results and logs.
    in_namespace : bool
        Whether the jobs may mount file systems in a name space of their own, without rights outside of it.

    Attributes
    ----------
    root : Path
        The root folder as the jobs see it.
    """

    def __init__(self, folder: Path, in_namespace: bool = False) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._results: dict[int, Path] = {}
        self._alive: set[int] = set()
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), "NEMO_IMAGE_HOME": str(folder / "home")}
        command = [sys.executable, "-W", "ignore", "-m", "tests.faults.runner"]
        if in_namespace:
            command = ["unshare", "--user", "--map-root-user", "--mount", *command]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True
        )
        self.root = Path(f"/proc/{self._server.pid}/root")
        self._read()

    def start(self, *runs: Sequence[object], fault: Fault | None = None, **options: Any) -> int:
        """Start a job; return its process's id. `options` are fields of :class:`~tests.faults.runner.Job`."""
        result = self._folder / f"{next(self._numbers)}.jsonl"
        job = Job(
            [[str(one) for one in run] for run in runs],
            str(result),
            None if fault is None else fault.to_dict(),
            **options,
        )
        pid = int(self._ask({"start": job.to_dict()})["pid"])
        self._results[pid] = result
        self._alive.add(pid)
        return pid

    def wait(self, pid: int) -> Ending:
        """Wait until a job ends or stops."""
        how = self._ask({"wait": pid})
        stopped = "stopped" in how
        if not stopped:
            self._alive.discard(pid)
        result = self._results[pid]
        text = result.read_text() if result.exists() else ""
        log = Path(f"{result}.log").read_text(errors="replace")
        killed = how.get("signal") == signal.SIGKILL
        assert killed or stopped or how == {"status": 0}, f"the job ended with {how}\n{log}"
        return Ending(killed, stopped, [Run(**json.loads(line)) for line in text.splitlines()], log)

    def go_on(self, pid: int) -> Ending:
        """Let a stopped job run, and wait for its end."""
        os.kill(pid, signal.SIGCONT)
        return self.wait(pid)

    def run(self, *runs: Sequence[object], **options: Any) -> list[Run]:
        """Do a job that is neither killed nor stopped; return its runs."""
        ending = self.wait(self.start(*runs, **options))
        assert len(ending.runs) == len(runs), ending.log
        return ending.runs

    def kill(self, pid: int) -> Ending:
        """Kill a job and all its workers with SIGKILL."""
        os.killpg(pid, signal.SIGKILL)
        return self.wait(pid)

    def close(self) -> None:
        """End the process, and what it still runs."""
        for pid in list(self._alive):
            self.kill(pid)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the process that forks has died: see its standard error"
        answer: dict[str, Any] = json.loads(line)
        return answer


def curate(source: object, out: object, *more: object) -> list[object]:
    """Return the arguments of ``nemo-image curate`` with the small test model."""
    return ["curate", source, out, "--model", TINY_MODEL, "--no-autocast", "--json", *more]
