"""``nemo-image inspect --ledger``: every account verified anew, and against what lies on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.engine.ledger import ShardRecord, write_ledger
from nemo_image.errors import DatasetError, RunError
from nemo_image.reports import ledger as report
from nemo_image.reports.ledger import inspect_ledgers
from tests.makers import TINY_MODEL, make_dataset, sample, write_rows, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def inspected(path: Path, status: int = 0) -> dict[str, Any]:
    done = run("inspect", path, "--ledger", "--json")
    assert done.exit_code == status, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert bool(found["problems"]) == bool(status)
    return found


def opened(folder: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder))


def the_ledger(folder: Path, kind: str = "save_metadata") -> Path:
    (found,) = (folder / "_nemo_image").glob(f"{kind}-2*.jsonl")
    return found


@pytest.fixture
def filtered(tmp_path: Path) -> Path:
    """A folder of saved metadata: 5 + 4 rows in, of which 2 + 4 passed the user's filter."""
    make_dataset(tmp_path / "in", {"a": 5, "b": 4})
    dataset = opened(tmp_path / "in")
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] >= 3]
    dataset.save_metadata(tmp_path / "out")
    return tmp_path / "out"


def test_a_run_that_balances(filtered: Path) -> None:
    found = inspected(filtered)
    (folder,) = found["folders"]
    (account,) = folder["runs"]
    assert account["kind"] == "save_metadata"
    assert account["shards"] == {"done": 2, "skipped": 0, "failed": 0}
    rows = [account[name] for name in ("rows_in", "rows_joined", "rows_out", "rows_filtered")]
    assert rows == [9, 0, 6, 3]
    assert account["losses"] == {}
    assert account["time"].startswith("20")
    assert folder["on_disk"]["files"] == 2
    assert folder["on_disk"]["rows"] == 6
    assert folder["on_disk"]["in_ledgers"] == 2


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


@pytest.mark.usefixtures("_wide")
def test_the_table_says_it(filtered: Path) -> None:
    done = run("inspect", filtered, "--ledger")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert "9 in + 0 joined = 6 out + 3 filtered + 0 lost" in text
    assert "every row is accounted for" in text
    assert "done: 2, skipped: 0, failed: 0" in text


def rewritten(ledger: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    change(lines)
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.usefixtures("_wide")
def test_a_shard_that_does_not_balance(filtered: Path) -> None:
    rewritten(the_ledger(filtered), lambda lines: lines[0].update(rows_filtered=2))
    problems = inspected(filtered, 1)["problems"]
    assert any("shard a: 5 rows in + 0 joined, but 2 rows out + 2 filtered" in one for one in problems)
    assert any("the run: 9 rows in + 0 joined, but 6 rows out + 2 filtered" in one for one in problems)
    assert any("says rows_filtered 3, but its lines sum to 2" in one for one in problems)
    done = run("inspect", filtered, "--ledger")
    assert done.exit_code == 1
    assert "shard a: 5 rows in" in " ".join(done.stdout.split())


def test_losses_are_in_the_balance(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    write_rows(tmp_path / "a.parquet", {"key": ["000000", "000001", "gone"]})
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path), on_mismatch="drop")
    dataset.save_metadata(tmp_path / "out")
    (account,) = inspected(tmp_path / "out")["folders"][0]["runs"]
    assert account["losses"] == {"without_sample": 1}
    assert (account["rows_in"], account["rows_out"]) == (3, 2)
    rewritten(the_ledger(tmp_path / "out"), lambda lines: lines[0].update(losses={}))
    assert "shard a" in inspected(tmp_path / "out", 1)["problems"][0]


def test_totals_that_are_not_the_sums(filtered: Path) -> None:
    rewritten(the_ledger(filtered), lambda lines: lines[-1]["run"].update(rows_in=10, rows_out=7))
    problems = inspected(filtered, 1)["problems"]
    assert len(problems) == 2
    assert "its last line says rows_in 10, but its lines sum to 9" in problems[0]


def test_a_line_that_was_lost_and_one_too_many(filtered: Path) -> None:
    rewritten(the_ledger(filtered), lambda lines: lines.insert(0, lines[0]))
    problems = inspected(filtered, 1)["problems"]
    assert any("shard a stands there more than once" in one for one in problems)
    rewritten(the_ledger(filtered), lambda lines: lines.__delitem__(slice(0, 2)))
    assert any("its lines sum to" in one for one in inspected(filtered, 1)["problems"])


@pytest.mark.parametrize(("keep", "said"), [(-1, "cut off"), (-40, "cut off"), (0, "cut off"), (0.5, "cut off")])
def test_a_ledger_that_is_cut_off(filtered: Path, keep: float, said: str) -> None:
    ledger = the_ledger(filtered)
    data = ledger.read_bytes()
    ledger.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:-1][:keep] if keep else b"")
    found = inspected(filtered, 1)
    assert any(said in one and ledger.name in one for one in found["problems"])


def test_a_ledger_cut_after_a_whole_line(filtered: Path) -> None:
    ledger = the_ledger(filtered)
    ledger.write_text("\n".join(ledger.read_text().splitlines()[:-1]) + "\n")
    assert any("its last line is not the run's totals" in one for one in inspected(filtered, 1)["problems"])


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[1]\n", b'{"shard": "a", "rows_in": "many"}\n', b'{"nothing": 1}\n'])
def test_a_garbled_ledger(filtered: Path, line: bytes) -> None:
    ledger = the_ledger(filtered)
    ledger.write_bytes(line + ledger.read_bytes())
    problems = inspected(filtered, 1)["problems"]
    assert f"{ledger}: line 1 is garbled or cut off" in problems[0]


# Against what lies on disk --------------------------------------------------------------------------------------------


def test_a_parquet_file_that_is_missing(filtered: Path) -> None:
    (filtered / "b.parquet").unlink()
    assert inspected(filtered, 1)["problems"] == [f"{filtered / 'b.parquet'} is missing: its ledger says 4 rows"]


def test_a_parquet_file_with_other_rows(filtered: Path) -> None:
    table = pq.read_table(filtered / "b.parquet")
    pq.write_table(table.slice(0, 3), filtered / "b.parquet")
    assert inspected(filtered, 1)["problems"] == [f"{filtered / 'b.parquet'} has 3 rows: its ledger says 4"]


def test_a_parquet_file_that_is_garbled(filtered: Path) -> None:
    (filtered / "b.parquet").write_bytes(b"PAR1 no more")
    (problem,) = inspected(filtered, 1)["problems"]
    assert "b.parquet: cannot be read as Parquet" in problem


def test_a_shard_of_which_the_frame_has_nothing_needs_no_file(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 2, "b": 3})
    dataset = opened(tmp_path / "in")
    dataset.metadata = dataset.metadata.partitions[1]
    dataset.save_metadata(tmp_path / "out")
    assert not (tmp_path / "out" / "a.parquet").exists()
    (account,) = inspected(tmp_path / "out")["folders"][0]["runs"]
    assert (account["rows_in"], account["rows_out"], account["rows_filtered"]) == (5, 3, 2)


@pytest.mark.usefixtures("_wide")
def test_without_ledgers_the_account_is_rebuilt_from_the_footers(filtered: Path) -> None:
    before = inspected(filtered)["folders"][0]["runs"][0]
    the_ledger(filtered).unlink()
    (folder,) = inspected(filtered)["folders"]
    (account,) = folder["runs"]
    assert account["ledger"] is None
    assert account["kind"] == report.REBUILT
    same = ("shards", "rows_in", "rows_joined", "rows_out", "rows_filtered", "losses", "results", "failures")
    assert {name: account[name] for name in same} == {name: before[name] for name in same}
    assert folder["on_disk"]["in_footers_only"] == 2
    assert "rebuilt from the footers" in " ".join(run("inspect", filtered, "--ledger").stdout.split())


def test_a_footer_that_does_not_balance_or_fit_its_file(filtered: Path) -> None:
    the_ledger(filtered).unlink()
    for name, change in (("a", {"rows_filtered": 1}), ("b", {"rows_out": 5, "rows_in": 5})):
        table = pq.read_table(filtered / f"{name}.parquet")
        metadata = dict(pq.read_metadata(filtered / f"{name}.parquet").metadata)
        footer = json.loads(metadata[b"nemo_image"])
        footer["record"] |= change
        table = table.replace_schema_metadata({b"nemo_image": json.dumps(footer).encode()})
        pq.write_table(table, filtered / f"{name}.parquet")
    problems = inspected(filtered, 1)["problems"]
    assert any("shard a: 5 rows in + 0 joined, but 2 rows out + 1 filtered" in one for one in problems)
    assert any("b.parquet has 4 rows: the account in its footer says 5" in one for one in problems)


def test_files_of_a_run_that_was_killed_before_its_ledger(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 2, "b": 3, "c": 1})
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False)
    embedder(opened(tmp_path / "in")).save_metadata()
    for name in "bc":
        shutil.copy(tmp_path / "in" / f"{name}.parquet", tmp_path / f"{name}.parquet")
    first = the_ledger(tmp_path / "in")
    rewritten(first, lambda lines: lines.__delitem__(slice(1, 3)))
    rewritten(first, lambda lines: lines[-1].update(run={**lines[-1]["run"], "rows_in": 2, "rows_out": 2}))
    found = inspected(tmp_path / "in", 1)
    folder = found["folders"][0]
    assert folder["on_disk"]["in_footers_only_first"] == ["b", "c"]
    assert folder["runs"][-1]["kind"] == report.REBUILT
    assert folder["runs"][-1]["rows_out"] == 4
    assert folder["runs"][-1]["results"]["image_embedding"] == 4


# Runs of all kinds ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_wide")
def test_failed_shards_with_causes_and_bad_images_by_reason(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2})
    write_tar(tmp_path / "a.tar", [sample(0, "000000"), ("000001", {"jpg": b""})])
    (tmp_path / "b.tar").write_bytes(b"no tar")
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False)
    with pytest.raises(RunError):
        embedder(opened(tmp_path)).save_metadata()
    # A failed shard is said, but it is no imbalance.
    (account,) = inspected(tmp_path)["folders"][0]["runs"]
    assert account["shards"] == {"done": 1, "skipped": 0, "failed": 1}
    assert account["failures"] == {"empty": 1}
    assert "b.tar" in account["failed_shards"]["b"]
    assert "b.tar" in run("inspect", tmp_path, "--ledger").stdout
    make_dataset(tmp_path / "whole", {"a": 2, "b": 2})
    shutil.copy(tmp_path / "whole" / "b.tar", tmp_path / "b.tar")
    embedder(opened(tmp_path)).save_metadata()
    runs = inspected(tmp_path)["folders"][0]["runs"]
    assert [one["shards"] for one in runs] == [account["shards"], {"done": 1, "skipped": 1, "failed": 0}]


def test_a_curated_folder_with_all_its_runs(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 5, "b": 4})
    arguments = ["--model", TINY_MODEL, "--no-autocast", "--keep", "score >= 0.3", "--samples-per-shard", "4", "--json"]
    assert run("curate", tmp_path / "in", tmp_path / "out", *arguments).exit_code == 0
    found = inspected(tmp_path / "out")
    kinds = {folder["path"]: [one["kind"] for one in folder["runs"]] for folder in found["folders"]}
    enriched = str(tmp_path / "out" / "_nemo_image" / "enriched")
    assert kinds[enriched] == ["save_metadata"]
    assert sorted(kinds[str(tmp_path / "out")]) == ["to_webdataset", "to_webdataset-count", "to_webdataset-output"]
    assert found["folders"][0]["on_disk"]["rows"] == 6
    (tmp_path / "out" / "00001.parquet").unlink()
    (Path(enriched) / "a.parquet").unlink()
    problems = inspected(tmp_path / "out", 1)["problems"]
    assert len(problems) == 2
    assert "00001.parquet is missing" in problems[0]
    assert "enriched/a.parquet is missing" in problems[1]


def test_rows_taken_and_rows_written_are_compared(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 5})
    dataset = opened(tmp_path / "in")
    dataset.metadata = dataset.metadata.assign(good=dataset.metadata["seed"] > 1)
    dataset.to_webdataset(tmp_path / "out", "good")
    inspected(tmp_path / "out")

    def one_more(lines: list[dict[str, Any]]) -> None:
        lines[0].update(rows_out=4, rows_filtered=1)
        lines[-1]["run"].update(rows_out=4, rows_filtered=1)

    (taken,) = (tmp_path / "out" / "_nemo_image").glob("to_webdataset-2*.jsonl")
    rewritten(taken, one_more)
    (problem,) = inspected(tmp_path / "out", 1)["problems"]
    assert "4 rows were taken" in problem
    assert "3 were written" in problem


def test_materialized_folders_are_looked_at(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    TimmImageEmbedder(TINY_MODEL, autocast=False)(opened(tmp_path)).materialize()
    (folder,) = inspected(tmp_path)["folders"]
    assert "materialized-" in folder["path"]
    Path(folder["path"], "a.parquet").unlink()
    assert len(inspected(tmp_path, 1)["problems"]) == 1


def test_the_newest_account_of_each_shard_counts(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 5, "b": 4})
    for least in (3, 4, 0):
        dataset = opened(tmp_path / "in")
        dataset.metadata = dataset.metadata[dataset.metadata["seed"] >= least]
        dataset.save_metadata(tmp_path / "out")
    found = inspected(tmp_path / "out")["folders"][0]
    assert [one["rows_out"] for one in found["runs"]] == [6, 5, 9]
    assert found["on_disk"]["rows"] == 9


def test_an_export_put_in_the_place_of_another(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 5})
    dataset = opened(tmp_path / "in")
    dataset.metadata = dataset.metadata.assign(good=dataset.metadata["seed"] > 1)
    # The account of an export with more shards, which is no longer there.
    write_ledger(str(tmp_path / "out"), "to_webdataset-output", [ShardRecord("00009", rows_in=8, rows_out=8)])
    dataset.to_webdataset(tmp_path / "out", "good")
    folder = inspected(tmp_path / "out")["folders"][0]
    assert [one["rows_out"] for one in folder["runs"] if "output" in one["kind"]] == [8, 3]


def test_what_a_failed_shard_would_have_had_is_not_looked_for(filtered: Path) -> None:
    failed = ShardRecord("a", status="failed", rows_in=5, rows_out=9, error="rows were gained")
    write_ledger(str(filtered), "save_metadata", [failed])
    assert inspected(filtered)["folders"][0]["runs"][-1]["failed_shards"] == {"a": "rows were gained"}


def test_shards_in_folders_of_their_own(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in" / "x", {"a": 2})
    make_dataset(tmp_path / "in" / "y", {"a": 3})
    tars = [str(tmp_path / "in" / name / "a.tar") for name in "xy"]
    ImageTextPairDataset.from_webdataset(tars).save_metadata(tmp_path / "out")
    assert inspected(tmp_path / "out")["folders"][0]["on_disk"]["in_ledgers"] == 2
    the_ledger(tmp_path / "out").unlink()
    assert inspected(tmp_path / "out")["folders"][0]["on_disk"]["in_footers_only_first"] == ["x/a", "y/a"]


def test_many_problems_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "in", dict.fromkeys("abcdef", 1))
    opened(tmp_path / "in").save_metadata(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.parquet"):
        path.unlink()
    monkeypatch.setattr(report, "PROBLEMS_NAMED", 4)
    problems = inspected(tmp_path / "out", 1)["problems"]
    assert len(problems) == 5
    assert "and 2 more problems" in problems


def test_on_a_cluster(filtered: Path, cluster: Any) -> None:
    with cluster.as_current():
        assert inspect_ledgers(str(filtered)) == inspect_ledgers(f"{filtered}/") | {"path": str(filtered)}
        (filtered / "a.parquet").write_bytes(b"")
        assert len(inspect_ledgers(str(filtered))["problems"]) == 1


@pytest.mark.in_process("watches or changes this process")
def test_any_file_system(filtered: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(filtered), "/ledger-test", recursive=True)
    try:
        assert inspect_ledgers("memory://ledger-test")["problems"] == []
        memory.rm("/ledger-test/a.parquet")
        assert len(inspect_ledgers("memory://ledger-test")["problems"]) == 1
    finally:
        memory.rm("/ledger-test", recursive=True)


def test_nothing_to_inspect(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 2})
    for path, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "in", "holds no ledger")):
        done = run("inspect", path, "--ledger")
        assert done.exit_code == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
        assert said in line
    with pytest.raises(DatasetError, match="no such folder"):
        inspect_ledgers(str(tmp_path / "in" / "a.tar"))


def test_options_that_say_nothing_are_refused(filtered: Path) -> None:
    done = run("inspect", filtered, "--ledger", "--id-col", "key")
    assert done.exit_code == 2
    assert "--id-col" in done.stderr


def test_help_names_it() -> None:
    done = run("inspect", "--help")
    assert "nemo-image inspect /data/curated --ledger" in done.stdout


def test_joined_rows_are_in_the_balance(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 2})
    dataset = opened(tmp_path / "in")
    keys = pd.Series(["000000", "000000"], dtype=pd.ArrowDtype(pa.string()))
    twice = pd.DataFrame({"key": keys, "tag": [1, 2]})
    dataset.metadata = dataset.metadata.merge(twice, on="key", how="left")
    dataset.save_metadata(tmp_path / "out")
    (account,) = inspected(tmp_path / "out")["folders"][0]["runs"]
    assert (account["rows_in"], account["rows_joined"], account["rows_out"]) == (2, 1, 3)
