"""scripts/slurm on a real Slurm: exit status, output, preemption, what is said when something is missing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.makers import TINY_MODEL, make_dataset
from tests.slurm.conftest import PATIENCE_S, ROOT, Slurm

pytestmark = pytest.mark.slow

CURATE = ("--model", TINY_MODEL, "--no-autocast", "--keep", "seed > 4", "--samples-per-shard", "5", "--json")
GATED = ROOT / "tests" / "slurm" / "gated.py"
SHARDS = {f"{number:05d}": 3 for number in range(6)}


def data(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tar and Parquet file below a folder."""
    paths = sorted([*folder.rglob("*.tar"), *folder.rglob("*.parquet")])
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run_python(folder: Path, *arguments: object, **settings: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    subprocess.run([sys.executable, *(str(one) for one in arguments)], cwd=folder, env=environment, check=True)


def until(condition: Callable[[], bool], say: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset for all runs that are compared: what is written names its tars' size and time."""
    return make_dataset(tmp_path_factory.mktemp("source") / "in", SHARDS)


@pytest.fixture(scope="session")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `CURATE` writes without any cluster."""
    folder = tmp_path_factory.mktemp("plain")
    run_python(folder, "-m", "nemo_image", "curate", source, "out", *CURATE)
    return data(folder / "out")


@pytest.fixture(scope="session")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `gated.py` writes without any cluster."""
    folder = tmp_path_factory.mktemp("clean")
    run_python(folder, GATED, source, "out", GATE="/")
    return data(folder / "out")


def test_curate_on_two_nodes(slurm: Slurm, source: Path, plain: dict[str, str]) -> None:
    found = slurm.finish(slurm.submit("curate.sh", "--cpu", source, "out", *CURATE))
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), found["log"]
    assert "2 nodes, 1 workers of 1 threads on each (cpu)" in found["log"]
    result = json.loads(next(line for line in found["log"].splitlines() if line.startswith("{")))
    assert (result["rows_in"], result["rows_out"]) == (18, 13)
    assert data(slurm.folder / "out") == plain
    assert not list(slurm.folder.glob("nemo-image-job-*"))


WHO = """
import json, os
from nemo_image import get_client, get_num_workers
with get_client(scheduler_file=os.environ["NEMO_IMAGE_SCHEDULER_FILE"]) as client:
    nodes = sorted(client.run(lambda: os.environ["SLURMD_NODENAME"]).values())
    print(json.dumps([client.scheduler.address.partition(":")[0], get_num_workers(client), nodes]))
"""


def test_a_command_of_ones_own(slurm: Slurm) -> None:
    (slurm.folder / "who.py").write_text(WHO)
    job = slurm.submit(
        "curate.sh", "--cpu", "--", sys.executable, "who.py", NEMO_IMAGE_TLS="1", NEMO_IMAGE_WORKERS_PER_NODE="2"
    )
    found = slurm.finish(job)
    assert found["ExitCode"] == "0:0", found["log"]
    assert json.dumps(["tls", 4, ["n1", "n1", "n2", "n2"]]) in found["log"]


INSIDE = """
import os
from nemo_image import get_client
def inside():
    return os.environ.get("INSIDE")
with get_client(scheduler_file=os.environ["NEMO_IMAGE_SCHEDULER_FILE"]) as client:
    print("inside:", inside(), client.run_on_scheduler(inside), *client.run(inside).values())
"""


@pytest.mark.parametrize("container", ["env INSIDE=yes", "bwrap --dev-bind / / --unshare-pid --setenv INSIDE yes"])
def test_everything_runs_inside_a_container(slurm: Slurm, container: str) -> None:
    if shutil.which(container.split(maxsplit=1)[0]) is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    (slurm.folder / "inside.py").write_text(INSIDE)
    job = slurm.submit("curate.sh", "--cpu", "--", sys.executable, "inside.py", NEMO_IMAGE_CONTAINER=container)
    found = slurm.finish(job)
    assert found["ExitCode"] == "0:0", found["log"]
    assert "inside: yes yes yes yes\n" in found["log"]


def test_a_failing_command_gives_its_status(slurm: Slurm) -> None:
    script = 'test -s "$0" && test "$0" = "$NEMO_IMAGE_SCHEDULER_FILE" && exit 7'
    found = slurm.finish(slurm.submit("curate.sh", "--cpu", "--", "bash", "-c", script, "{scheduler_file}"))
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "7:0"), found["log"]


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ((), {}, "nothing to do"),
        (("--cpu", "--"), {}, "nothing to do"),
        (("--cpu", "a", "b"), {"PYTHON": "/bin/false"}, "/bin/false has no nemo_image on n1"),
        (
            ("--cpu", "a", "b"),
            {"NEMO_IMAGE_MEMORY_LIMIT": "nonsense", "NEMO_IMAGE_WAIT_S": "60"},
            "all workers have ended",
        ),
    ],
)
def test_what_cannot_start_says_so(slurm: Slurm, arguments: Any, settings: dict[str, str], said: str) -> None:
    found = slurm.finish(slurm.submit("curate.sh", *arguments, nodes=1, **settings))
    assert found["JobState"] == "FAILED"
    assert said in found["log"]


def test_outside_of_slurm() -> None:
    for name in ("curate.sh", "parts.sh"):
        done = subprocess.run(
            [ROOT / "scripts" / "slurm" / name, "in", "out"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "sbatch" in done.stderr


def test_workers_that_all_end(slurm: Slurm) -> None:
    """A command whose workers are gone would wait for ever."""
    kill = (
        "import os, signal; from nemo_image import get_client\n"
        "client = get_client(scheduler_file=os.environ['NEMO_IMAGE_SCHEDULER_FILE'])\n"
        "client.submit(lambda: os.kill(os.getppid(), signal.SIGKILL)).result()\n"
    )
    found = slurm.finish(slurm.submit("curate.sh", "--cpu", "--", sys.executable, "-c", kill, nodes=1))
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "1:0")
    assert "all workers have ended" in found["log"]


@pytest.mark.parametrize("how", ["scancel, sbatch again", "scontrol requeue", "USR1 before the time limit"])
def test_stopped_in_the_middle(slurm: Slurm, source: Path, clean: dict[str, str], how: str) -> None:
    """The same bytes as a clean run; shards from the fourth on wait at a gate until the job was stopped."""
    folder = slurm.folder

    def submit() -> str:
        program = (sys.executable, GATED, source, "out")
        return slurm.submit("curate.sh", "--cpu", "--", *program, GATE=str(folder / "gate"))

    job = submit()
    until(lambda: len(data(folder / "out")) == 3, lambda: slurm.log(job))
    if how.startswith("scancel"):
        slurm.call("scancel", job)
        assert slurm.finish(job)["JobState"] == "CANCELLED"
    elif how.startswith("scontrol"):
        slurm.call("scontrol", "requeue", job)
    else:
        slurm.call("scancel", "--batch", "--signal=USR1", job)
    if not how.startswith("scancel"):
        until(
            lambda: slurm.facts(job)["Restarts"] == "1" and slurm.facts(job)["JobState"] == "PENDING",
            lambda: slurm.log(job),
        )
    before = data(folder / "out")
    assert len(before) == 3
    (folder / "gate").touch()
    found = slurm.finish(submit() if how.startswith("scancel") else job)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), found["log"]
    assert data(folder / "out") == clean
    assert before.items() <= data(folder / "out").items()
    assert how.startswith("scancel") or "start 2: 2 nodes" in found["log"]
    assert ("the job is queued again" in found["log"]) == how.startswith("USR1")


def test_too_many_restarts(slurm: Slurm) -> None:
    wait = ("bash", "-c", "touch started; sleep 600")
    job = slurm.submit("curate.sh", "--cpu", "--", *wait, nodes=1, NEMO_IMAGE_MAX_RESTARTS="0")
    until((slurm.folder / "started").exists, lambda: slurm.log(job))
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    found = slurm.finish(job)
    assert found["ExitCode"] == "75:0"
    assert "NEMO_IMAGE_MAX_RESTARTS" in found["log"]


def test_parts_of_an_array(slurm: Slurm, source: Path, plain: dict[str, str]) -> None:
    def submit(tasks: str) -> str:
        options = (f"--array={tasks}", "--output=%a.log")
        return slurm.submit("parts.sh", source, "out", *CURATE, nodes=1, options=options, NEMO_IMAGE_PARTS="3")

    slurm.finish(submit("1,3"))
    assert not (slurm.folder / "out" / "00000.tar").exists()
    slurm.finish(submit("2"))
    assert data(slurm.folder / "out") == plain


def test_an_array_that_is_not_whole(slurm: Slurm) -> None:
    found = slurm.finish(slurm.submit("parts.sh", "in", "out", *CURATE, nodes=1, options=("--array=2",)))
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0")
    assert "NEMO_IMAGE_PARTS" in found["log"]


def test_dask_jobqueue(slurm: Slurm, source: Path) -> None:
    """Its cluster is like any other: what runs under its client is computed by its jobs."""
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue")
    done = slurm.call(sys.executable, ROOT / "tests" / "slurm" / "jobqueue.py", source, "out", GATE="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["nodes"] == ["n1", "n2"]
    here = "import sys; from tests.slurm.gated import enrich; enrich(sys.argv[1], 'clean')"
    run_python(slurm.folder, "-c", here, source, GATE="/")
    assert data(slurm.folder / "out") == data(slurm.folder / "clean")
