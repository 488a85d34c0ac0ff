"""Two runs on one output: the second is refused and told by whom; it never mixes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.outputs import finals, leftovers
from tests.faults.points import Fault
from tests.faults.table import FaultTable
from tests.faults.warm_runs import Run, WarmRuns, curate
from tests.makers import make_dataset

SIZES = {"00000": 4, "00001": 3, "00002": 5}
MOMENTS = {
    "while it enriches": Fault("half", "enriched", 2, "stop"),
    "between its phases": Fault("opening", "export manifest", 1, "stop"),
    "while it exports": Fault("half", "tar", 2, "stop"),
    "while it writes its last ledger": Fault("half", "export ledger", 1, "stop"),
}


@pytest.fixture(scope="module")
def source(memory: Path) -> Path:
    return make_dataset(memory / "two-runs" / "in", SIZES)


@pytest.fixture(scope="module")
def clean(source: Path, memory: Path, runs: WarmRuns) -> dict[str, bytes]:
    (run,) = runs.run(command(source, memory / "two-runs" / "out"))
    assert run.status == 0
    return finals(memory / "two-runs" / "out")


def command(source: Path, out: Path, *more: object) -> list[object]:
    return curate(source, out, "--samples-per-shard", 4, *more)


def assert_refused(run: Run, pid: int, out: Path) -> None:
    """Assert that the run was refused at once, and says who holds the output."""
    assert run.status == 1
    assert run.raised in (None, "OutputBusyError"), run.errors
    assert str(out) in run.said
    assert str(pid) in run.said, f"{run.said!r} does not name process {pid}"
    assert run.decoded == 0
    assert not set(run.written) & {"enriched", "tar", "idx", "parquet"}


@pytest.mark.parametrize("when", MOMENTS)
def test_a_second_curate_is_refused_while_the_first_runs(
    source: Path, clean: dict[str, bytes], runs: WarmRuns, table: FaultTable, tmp_path: Path, when: str
) -> None:
    out = tmp_path / "out"
    first = runs.start(command(source, out), fault=MOMENTS[when])
    assert runs.wait(first).stopped
    (second,) = runs.run(command(source, out))
    assert_refused(second, first, out)
    (end,) = runs.go_on(first).runs
    assert end.status == 0, end.errors
    assert finals(out) == clean
    assert leftovers(out) == []
    said = second.said.replace(str(first), "4711")
    table.add(f"a second run on the same output, {when}", said, "the first run ends with the same bytes")


@pytest.mark.parametrize("when", MOMENTS)
def test_a_killed_run_holds_nothing(
    source: Path, clean: dict[str, bytes], runs: WarmRuns, tmp_path: Path, when: str
) -> None:
    out = tmp_path / "out"
    first = runs.start(command(source, out), fault=MOMENTS[when])
    assert runs.wait(first).stopped
    assert runs.kill(first).killed
    (second,) = runs.run(command(source, out))
    assert second.status == 0, second.errors
    assert finals(out) == clean
    assert leftovers(out) == []


def test_a_second_save_in_place_is_refused(source: Path, runs: WarmRuns, tmp_path: Path) -> None:
    for name in ("data", "clean"):
        shutil.copytree(source, tmp_path / name)
    runs.run(["save-in-place", tmp_path / "clean"])
    folder = tmp_path / "data"
    first = runs.start(["save-in-place", folder], fault=Fault("half", "parquet", 2, "stop"))
    assert runs.wait(first).stopped
    (second,) = runs.run(["save-in-place", folder])
    assert_refused(second, first, folder)
    (end,) = runs.go_on(first).runs
    assert end.status == 0, end.errors
    assert finals(folder) == finals(tmp_path / "clean")


def test_runs_on_two_outputs_do_not_disturb_each_other(
    source: Path, clean: dict[str, bytes], runs: WarmRuns, tmp_path: Path
) -> None:
    first = runs.start(command(source, tmp_path / "one"), fault=Fault("half", "enriched", 2, "stop"))
    assert runs.wait(first).stopped
    (second,) = runs.run(command(source, tmp_path / "two"))
    assert second.status == 0, second.errors
    (end,) = runs.go_on(first).runs
    assert end.status == 0, end.errors
    assert finals(tmp_path / "one") == finals(tmp_path / "two") == clean


def test_runs_started_at_once_never_mix(source: Path, clean: dict[str, bytes], runs: WarmRuns, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = [runs.start(command(source, out)) for _ in range(4)]
    ended = [runs.wait(pid).runs[0] for pid in started]
    assert {run.status for run in ended} <= {0, 1}
    assert any(run.status == 0 for run in ended)
    for run in ended:
        if run.status:
            assert run.raised is None, run.said
            assert any(str(pid) in run.said for pid in started), run.said
    assert finals(out) == clean
    assert leftovers(out) == []
