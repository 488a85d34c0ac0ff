"""A real Slurm of two nodes on this machine, started once; skips where its daemons or root's rights are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Slurm:
    """A running Slurm, and the folder where jobs are submitted."""

    environment: Mapping[str, str]
    folder: Path

    def call(self, *command: object, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(
            [str(one) for one in command],
            cwd=self.folder,
            env={**self.environment, **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    def submit(
        self, script: str, *arguments: object, nodes: int = 2, options: tuple[str, ...] = (), **settings: str
    ) -> str:
        """Submit a script of scripts/slurm; return the job's number."""
        size = (f"--nodes={nodes}", "--cpus-per-task=1", "--output=%A.log", *options)
        done = self.call("sbatch", "--parsable", *size, SCRIPTS / script, *arguments, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Return what Slurm says of a job."""
        shown = self.call("scontrol", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def finish(self, job: str) -> dict[str, str]:
        """Wait for a job to end; return what Slurm says of it, and what it said itself as ``log``."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + PATIENCE_S
        hastened = False
        while (facts := self.facts(job)).get("JobState") not in ended:
            assert time.monotonic() < deadline, self.log(job)
            # Queued again, a job waits for two minutes: a node refuses one that starts in the second of its kill.
            if not hastened and facts.get("JobState") == "PENDING" and facts.get("Restarts", "0") != "0":
                self.call("scontrol", "update", f"job={job}", "starttime=now+3")
                hastened = True
            time.sleep(0.2)
        return {**self.facts(job), "log": self.log(job)}

    def log(self, job: str) -> str:
        """Return what a job has said."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="session")
def running_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Start Slurm; give the environment in which its commands find it."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    reason = f"no {missing[0]}: apt-get install slurm-wlm munge" if missing else ""
    reason = reason or ("Slurm's daemons need root" if os.geteuid() != 0 else "")
    if reason:
        (pytest.fail if os.environ.get("NEMO_IMAGE_TESTS_NEED_SLURM") else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("slurm")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DASK_"))},
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "CPUS_PER_NODE": "4",
    }
    with subprocess.Popen(
        [SCRIPTS / "one_machine.sh", folder, "bash", "-c", "echo ready; read -r"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield environment
        finally:
            process.stdin.close()
            process.wait(60)


@pytest.fixture
def slurm(running_slurm: Mapping[str, str], tmp_path: Path) -> Slurm:
    """The Slurm, with a folder of this test."""
    return Slurm(running_slurm, tmp_path)
