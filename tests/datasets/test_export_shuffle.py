"""Exports shuffled, by several workers, taken up again: the same bytes, each sample once, each tar walked once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset, export, recent, selection, selection_file, shard_pass
from nemo_image.datasets.load import ShardLoader
from nemo_image.errors import ArgumentError, DatasetError, RunError
from nemo_image.export import plan
from nemo_image.shards import read
from tests.makers import make_dataset, tar_members

SIZES = {f"{number:05d}": 3 + number % 4 for number in range(12)}
TOTAL = sum(SIZES.values())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "in", SIZES)


def opened(folder: Path) -> ImageTextPairDataset:
    """Open a dataset of which every seventh row goes."""
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    metadata = dataset.metadata
    dataset.metadata = metadata.assign(keep=~metadata["seed"].isin(list(range(0, TOTAL, 7))))
    return dataset


def survivors() -> list[int]:
    return [seed for seed in range(TOTAL) if seed % 7 != 0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*"))}


def seeds_in(folder: Path) -> list[int]:
    """Return which picture each sample is, in the order of the output, as JSON, Parquet and members agree on it."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        members = tar_members(path)
        rows = pq.read_table(path.with_suffix(".parquet")).to_pylist()
        assert [name for name in members if name.endswith(".jpg")] == [f"{row['key']}.jpg" for row in rows]
        for row in rows:
            assert json.loads(members[f"{row['key']}.json"])["seed"] == row["seed"]
            assert members[f"{row['key']}.txt"] == f"picture number {row['seed']}".encode()
            found.append(row["seed"])
    return found


def pretend_other_filter(out: Path, shard: str) -> None:
    """Make a selection one that another filter left: of the same files, but of fewer rows."""
    folder = selection_file.folder_of(str(out))
    counted = [
        json.loads(line)
        for path in (out / "_nemo_image").glob("*-count-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    digest = next(record["digest"] for record in counted if record.get("shard") == shard)
    found = selection_file.read_selection(folder, shard, digest, {})
    assert found is not None
    backwards = np.arange(len(found))[::-1]
    other = dataclasses.replace(found, digest="another", rows=found.rows[backwards], ids=found.ids.take(backwards))
    selection_file.write_selection(folder, shard, other, {})


@pytest.mark.parametrize("seed", [None, 4])
def test_two_workers_write_the_bytes_of_one(
    source: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    monkeypatch.setattr(plan, "GROUP", 4)  # three groups; the client alone plans
    opened(source).to_webdataset(tmp_path / "one", "keep", samples_per_shard=10, shuffle_seed=seed)
    with cluster.as_current():
        opened(source).to_webdataset(tmp_path / "two", "keep", samples_per_shard=10, shuffle_seed=seed)
    assert len(contents(tmp_path / "one")) == 3 * -(-len(survivors()) // 10)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_order_is_that_of_the_plan_and_no_sample_is_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GROUP", 5)
    opened(source).to_webdataset(tmp_path / "out", "keep", samples_per_shard=10, shuffle_seed=9)
    by_shard = []
    first = 0
    for size in SIZES.values():
        by_shard.append([seed for seed in range(first, first + size) if seed % 7 != 0])
        first += size
    packed = plan.Plan([len(seeds) for seeds in by_shard], 10, 9)
    wanted = []
    for number in range(len(packed)):
        places = {
            int(place): by_shard[take.source][int(position)]
            for take in plan.takes_of(packed.stretches(number))
            for place, position in zip(take.places, take.positions, strict=True)
        }
        wanted += [places[place] for place in range(len(places))]
    assert seeds_in(tmp_path / "out") == wanted
    assert sorted(wanted) == survivors() != wanted
    counts = [len(pq.read_table(path)) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert counts == [10] * (len(counts) - 1) + [len(survivors()) - 10 * (len(counts) - 1)]


@pytest.mark.parametrize("keeps_selections", [True, False])
@pytest.mark.in_process("watches or changes this process")
def test_an_export_that_was_stopped_ends_as_a_clean_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_selections: bool
) -> None:
    opened(source).to_webdataset(tmp_path / "clean", "keep", samples_per_shard=10, shuffle_seed=9)
    out = tmp_path / "out"
    real = plan.takes_of
    calls = []

    def fails_after_two(stretches: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise OSError("the machine is gone")
        return real(stretches)

    with monkeypatch.context() as patched:
        patched.setattr(plan, "takes_of", fails_after_two)
        with pytest.raises(RunError, match="the machine is gone"):
            opened(source).to_webdataset(out, "keep", samples_per_shard=10, shuffle_seed=9)
    left = list((out / "_nemo_image" / "selections").glob("*.arrow"))
    assert len(left) == len(SIZES)
    assert 0 < len(list(out.glob("*.parquet"))) < len(list((tmp_path / "clean").glob("*.parquet")))
    if not keeps_selections:
        left[0].unlink()
        left[1].write_bytes(b"ARROW1 and then nothing")
        left[2].write_bytes(left[3].read_bytes())  # another shard's
        pretend_other_filter(out, left[4].stem)
    selection._recent._values.clear()
    opened(source).to_webdataset(out, "keep", samples_per_shard=10, shuffle_seed=9)
    assert contents(out) == contents(tmp_path / "clean")
    assert not (out / "_nemo_image" / "selections").exists()


@pytest.mark.in_process("watches or changes this process")
def test_each_tar_is_walked_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[str] = []
    real = read.load_index

    def counted(tar: Any, *arguments: Any) -> Any:
        walked.append(tar.name)
        selection._recent._values.clear()  # as in another process
        return real(tar, *arguments)

    monkeypatch.setattr(read, "load_index", counted)
    opened(source).to_webdataset(tmp_path / "out", "keep", samples_per_shard=2, shuffle_seed=9)
    assert sorted(walked) == [str(source / f"{shard}.tar") for shard in SIZES]


def test_rows_in_windows_are_those_of_whole_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(source).to_webdataset(tmp_path / "whole", "keep", samples_per_shard=10, shuffle_seed=9)
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 2)
    selection._recent._values.clear()
    opened(source).to_webdataset(tmp_path / "windows", "keep", samples_per_shard=10, shuffle_seed=9)
    assert contents(tmp_path / "windows") == contents(tmp_path / "whole")


@pytest.mark.in_process("watches or changes this process")
def test_rows_that_change_between_count_and_copy_are_refused(source: Path, tmp_path: Path) -> None:
    evaluations: dict[str, int] = {}

    def rolled(frame: pd.DataFrame) -> pd.DataFrame:
        """Return the same rows, in another order each time."""
        first = str(frame["key"].iloc[0]) if len(frame) else ""
        evaluations[first] = evaluations.get(first, 0) + 1
        return frame.iloc[np.roll(np.arange(len(frame)), evaluations[first])].assign(keep=True)

    dataset = ImageTextPairDataset.from_webdataset(str(source))
    meta = dataset.metadata._meta.assign(keep=pd.Series([], dtype=bool))
    dataset.metadata = dataset.metadata.map_partitions(rolled, meta=meta)
    with pytest.raises(RunError, match="at random"):
        dataset.to_webdataset(tmp_path / "out", "keep")
    assert max(evaluations.values()) > 1


def test_a_refused_export_leaves_no_selections(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    opened(source).to_webdataset(out, "keep", samples_per_shard=10)
    before = contents(out)
    with pytest.raises(DatasetError, match="holds another export"):
        opened(source).to_webdataset(out, "keep", samples_per_shard=10, shuffle_seed=1)
    assert not (out / "_nemo_image" / "selections").exists()
    assert contents(out) == before


@pytest.mark.parametrize("seed", [-1, 1.5, "1"])
def test_seeds_are_whole_numbers(source: Path, tmp_path: Path, seed: Any) -> None:
    with pytest.raises(ArgumentError, match="shuffle_seed"):
        opened(source).to_webdataset(tmp_path / "out", "keep", shuffle_seed=seed)


def scores_in(folder: Path) -> dict[int, int]:
    tables = [pq.read_table(path, columns=["seed", "score"]) for path in folder.glob("*.parquet")]
    return {row["seed"]: row["score"] for table in tables for row in table.to_pylist()}


@pytest.mark.parametrize("at_most", [2**26, 0], ids=["remembered", "too large to remember"])
def test_a_small_shard_is_computed_once_and_for_one_export_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    monkeypatch.setattr(export, "_frames", recent.Recent(lambda _: 1, at_most, last_anyway=False))
    reads: list[str] = []
    load = ShardLoader._table

    def counted(loader: ShardLoader, shard: str, columns: list[str]) -> Any:
        reads.append(shard)
        return load(loader, shard, columns)

    for times in (2, 3):
        dataset = ImageTextPairDataset.from_webdataset(str(source))
        dataset.metadata = dataset.metadata.assign(score=dataset.metadata["seed"] * times, keep=True)
        with monkeypatch.context() as patch:
            patch.setattr(ShardLoader, "_table", counted)
            reads.clear()
            dataset.to_webdataset(tmp_path / f"{times}", "keep", samples_per_shard=5, shuffle_seed=1)
        assert scores_in(tmp_path / f"{times}") == {seed: seed * times for seed in range(TOTAL)}
        # Once for the count, once for the rows; or anew for each output that has some of them.
        assert (len(reads) == 2 * len(SIZES)) == (at_most > 0)
        assert set(reads) == set(SIZES)
