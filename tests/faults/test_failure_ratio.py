"""One bad shard of forty is borne and named; half of them stop the run early. A ledger is written either way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.outputs import finals, last_ledger
from tests.faults.table import FaultTable
from tests.faults.warm_runs import WarmRuns, curate
from tests.makers import make_dataset

SHARDS = 40


@pytest.fixture(scope="module")
def source(memory: Path) -> Path:
    return make_dataset(memory / "forty" / "in", {f"{number:05d}": 1 for number in range(SHARDS)})


def test_one_bad_shard_of_forty(source: Path, runs: WarmRuns, table: FaultTable, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    (folder / "00017.tar").write_bytes(b"no tar")
    (run,) = runs.run(curate(folder, tmp_path / "out"))
    assert run.status == 1
    assert run.raised is None
    assert "1 of 40 shards failed" in run.said
    assert "00017.tar" in run.said
    enriched = tmp_path / "out" / "_nemo_image" / "enriched"
    assert len(list(enriched.glob("*.parquet"))) == SHARDS - 1
    *records, totals = last_ledger(enriched, "save_metadata")
    assert [record["shard"] for record in records if record["status"] == "failed"] == ["00017"]
    assert totals["run"]["shards"] == {"done": SHARDS - 1, "skipped": 0, "failed": 1}  # type: ignore[index]
    table.add("one tar of 40 is no tar", run.said, "same bytes; only the failed shard computed")

    shutil.copy2(source / "00017.tar", folder / "00017.tar")
    (again,) = runs.run(curate(folder, tmp_path / "out"))
    assert again.status == 0, again.errors
    assert again.decoded == 1
    runs.run(curate(folder, tmp_path / "clean"))
    assert finals(tmp_path / "out") == finals(tmp_path / "clean")


@pytest.mark.parametrize("cores", [1, None])
def test_half_the_shards_bad_stops_early(
    source: Path, runs: WarmRuns, table: FaultTable, tmp_path: Path, cores: int | None
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    for number in range(0, SHARDS, 2):
        (folder / f"{number:05d}.tar").write_bytes(b"")
    (run,) = runs.run(curate(folder, tmp_path / "out"), cores=cores)
    assert run.status == 1
    assert run.raised is None
    assert "stopped early" in run.said
    assert "max_failure_ratio" in run.said
    assert "00000.tar" in run.said
    enriched = tmp_path / "out" / "_nemo_image" / "enriched"
    *records, totals = last_ledger(enriched, "save_metadata")
    statuses = {record["shard"]: record["status"] for record in records}
    # 5% of 40 are borne: the third failure stops the run, and what runs then ends.
    failed = [shard for shard, status in statuses.items() if status == "failed"]
    assert 3 <= len(failed) <= 8
    assert len(list(enriched.glob("*.parquet"))) == sum(status == "done" for status in statuses.values()) < SHARDS // 2
    assert totals["run"]["shards"]["failed"] == len(failed)  # type: ignore[index]
    assert not list((tmp_path / "out").glob("*.tar"))
    table.add("every second tar of 40 is empty", run.said, "same bytes")

    for path in source.iterdir():
        shutil.copy2(path, folder / path.name)
    (again,) = runs.run(curate(folder, tmp_path / "out"))
    assert again.status == 0, again.errors
    runs.run(curate(folder, tmp_path / "clean"))
    assert finals(tmp_path / "out") == finals(tmp_path / "clean")
