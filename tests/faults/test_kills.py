"""SIGKILL at named points: nothing half-written, nothing lost, and the same bytes after the next run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.faults.kill_points import ALONE, CHAINS, IN_PLACE
from tests.faults.outputs import finals, last_ledger, leftovers, not_whole, sources
from tests.faults.points import Fault
from tests.faults.warm_runs import Run, WarmRuns, curate
from tests.makers import make_dataset, sample, write_rows, write_tar

SIZES = {"00000": 5, "00001": 4, "00002": 6}
OPTIONS = ("--keep", "score >= 0.2", "--samples-per-shard", 4)
SMALL: dict[str, Any] = {"row_group_rows": 2}
"""So that every shard has several row groups, and a kill can come between them."""


@dataclass(frozen=True)
class Case:
    """A source, and what a clean run makes of it."""

    source: Path
    hashes: dict[str, tuple[str, int]]
    clean: dict[str, bytes]


def make_source(folder: Path) -> Path:
    """Write three good shards and one with a bad picture and a row without sample."""
    make_dataset(folder, SIZES)
    write_tar(folder / "00003.tar", [sample(90, "000090", "good"), ("000091", {"jpg": b"\xff\xd8\xffno picture"})])
    keys = ["000090", "000091", "000092"]
    write_rows(
        folder / "00003.parquet", {"key": keys, "caption": ["a", "b", None], "seed": [90, 91, 92], "score": [9.0] * 3}
    )
    return folder


@pytest.fixture(scope="module")
def case(memory: Path, runs: WarmRuns) -> Case:
    source = make_source(memory / "kills" / "in")
    hashes = sources(source)
    (run,) = runs.run(curate(source, memory / "kills" / "out", *OPTIONS), **SMALL)
    assert run.result["rows_out"] == 15
    clean = finals(memory / "kills" / "out")
    assert len([name for name in clean if name.endswith(".tar")]) == 4
    return Case(source, hashes, clean)


@pytest.fixture(scope="module")
def in_place(memory: Path, runs: WarmRuns) -> Case:
    folder = memory / "in-place"
    source = make_source(folder / "in")
    hashes = sources(source)
    shutil.copytree(source, folder / "out")
    assert sources(folder / "out") == hashes
    (run,) = runs.run(["save-in-place", folder / "out"], **SMALL)
    assert run.result["results"]["image_embedding"] == 16
    assert pq.ParquetFile(folder / "out" / "00002.parquet").num_row_groups == 3
    return Case(source, hashes, finals(folder / "out"))


def forget_deaths(out: Path) -> None:
    """Remove the note that a shard's worker died: the next run would start a decoder of its own, which takes seconds.

    What follows such a note is seen where a run is killed once.
    """
    for folder in list(out.rglob("attempts")):
        shutil.rmtree(folder)


NOTHING = {"decoded": 0, "forwarded": 0, "shards' files written": 0}


def computed(run: Run) -> dict[str, int]:
    """Tell what a run computed and wrote, but for manifests and ledgers."""
    written = sum(run.written.get(kind, 0) for kind in ("enriched", "tar", "idx", "parquet"))
    return {"decoded": run.decoded, "forwarded": run.forwarded, "shards' files written": written}


def assert_finishes_as_clean(case: Case, runs: WarmRuns, out: Path, **options: Any) -> None:
    """Run the same command twice: the first ends with a clean run's bytes, the second computes nothing."""
    command = curate(case.source, out, *OPTIONS)
    second, third = runs.run(command, command, **SMALL, **options)
    assert second.status == 0, second.errors
    assert finals(out) == case.clean
    assert leftovers(out) == []
    assert sources(case.source) == case.hashes
    assert computed(third) == NOTHING
    for kind, folder in (("save_metadata", out / "_nemo_image" / "enriched"), ("to_webdataset-output", out)):
        *shards, _ = last_ledger(folder, kind)
        assert {record["status"] for record in shards} == {"skipped"}
    expected = {"rows_in": 18, "rows_filtered": 2, "rows_out": 15, "losses": {"without_sample": 1}}
    assert {name: third.result[name] for name in expected} == expected


@pytest.mark.parametrize("chain", CHAINS)
def test_curate_killed_again_and_again_ends_with_a_clean_runs_bytes(
    case: Case, runs: WarmRuns, tmp_path: Path, chain: str
) -> None:
    out = tmp_path / "out"
    for fault in CHAINS[chain]:
        killed = runs.wait(runs.start(curate(case.source, out, *OPTIONS), fault=fault, cores=1, **SMALL))
        assert killed.killed, f"the run never came to {fault}: {[run.said for run in killed.runs]}"
        assert not_whole(out, case.clean) == [], fault
        forget_deaths(out)
    assert_finishes_as_clean(case, runs, out, cores=1)


@pytest.mark.parametrize("fault", ALONE, ids=str)
def test_curate_killed_once_with_all_cores(case: Case, runs: WarmRuns, tmp_path: Path, fault: Fault) -> None:
    out = tmp_path / "out"
    killed = runs.wait(runs.start(curate(case.source, out, *OPTIONS), fault=fault, **SMALL))
    assert killed.killed, f"the run never came to {fault}: {[run.said for run in killed.runs]}"
    assert not_whole(out, case.clean) == []
    assert_finishes_as_clean(case, runs, out)


def test_a_kill_with_shards_in_folders_leaves_nothing(runs: WarmRuns, tmp_path: Path) -> None:
    for name in "ab":
        make_dataset(tmp_path / "in" / name, {"00000": 3, "00001": 2})
    tars = str(tmp_path / "in" / "{a,b}" / "{00000,00001}.tar")
    runs.run(curate(tars, tmp_path / "clean"))
    clean, out = finals(tmp_path / "clean"), tmp_path / "out"
    assert "_nemo_image/enriched/a/00000.parquet" in clean
    killed = runs.wait(runs.start(curate(tars, out), fault=Fault("synced", "enriched", 2)))
    assert killed.killed
    assert not_whole(out, clean) == []
    forget_deaths(out)
    (run,) = runs.run(curate(tars, out))
    assert run.status == 0, run.errors
    assert finals(out) == clean
    assert leftovers(out) == []


def test_saving_in_place_killed_again_and_again_keeps_rows_and_columns(
    in_place: Case, runs: WarmRuns, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(in_place.source, folder)
    untouched = {name: (in_place.source / name).read_bytes() for name in in_place.hashes}
    for fault in IN_PLACE:
        killed = runs.wait(runs.start(["save-in-place", folder], fault=fault, cores=1, **SMALL))
        assert killed.killed, f"the run never came to {fault}: {[run.said for run in killed.runs]}"
        for name, data in finals(folder).items():
            assert data in (untouched.get(name), in_place.clean[name]), (
                f"{fault}: {name} is neither the old nor the new"
            )
        forget_deaths(folder)

    second, third = runs.run(["save-in-place", folder], ["save-in-place", folder], **SMALL)
    assert second.status == 0, second.errors
    assert finals(folder) == in_place.clean
    assert leftovers(folder) == []
    after = sources(folder)
    for name in untouched:
        if name.endswith(".tar"):
            assert after[name] == in_place.hashes[name]
        else:
            rows, enriched = pq.read_table(in_place.source / name), pq.read_table(folder / name)
            assert enriched.select(rows.column_names).equals(rows)
    assert third.result["shards"] == {"done": 0, "skipped": 4, "failed": 0}
    assert computed(third) == NOTHING


@pytest.mark.slow
def test_a_run_preempted_on_the_same_shard_for_days(runs: WarmRuns, tmp_path: Path) -> None:
    """Kills from outside are nobody's fault: however often, the next run does the work."""
    source, out = make_dataset(tmp_path / "in", {"00000": 5}), tmp_path / "out"
    runs.run(curate(source, tmp_path / "clean"), **SMALL)
    for _ in range(3):
        assert runs.wait(runs.start(curate(source, out), fault=Fault("synced", "enriched"), **SMALL)).killed
    (run,) = runs.run(curate(source, out), **SMALL)
    assert run.status == 0, run.said
    assert finals(out) == finals(tmp_path / "clean")
    assert leftovers(out) == []


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(case: Case, runs: WarmRuns, tmp_path: Path) -> None:
    out, once = tmp_path / "out", tmp_path / "struck"
    fault = Fault("half", "enriched", 1, only_once=str(once))
    (run,) = runs.run(curate(case.source, out, *OPTIONS, "--workers", 2), fault=fault, in_workers=True, **SMALL)
    assert once.exists(), "no worker came to the point"
    assert run.status == 0, run.errors
    assert finals(out) == case.clean
    assert leftovers(out) == [], "the dead worker's temporary file stays"
    assert_finishes_as_clean(case, runs, out)
