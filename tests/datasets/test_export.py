"""Exporting: members byte for byte, ids consistent in names, JSON and Parquet, whole shards, the same bytes each "
"time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, DatasetError, RunError
from nemo_image.shards.idx_file import read_idx
from tests.makers import make_dataset, sample, tar_members, write_rows, write_tar

SIZES = {"00000": 9, "00001": 6, "00002": 16}


def kept(folder: Path) -> ImageTextPairDataset:
    """Open a dataset of which 00001 has no survivor, and every third row of the others goes."""
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    metadata = dataset.metadata
    dataset.metadata = metadata.assign(
        keep=~metadata["seed"].isin(list(range(0, 31, 3))) & (metadata["shard"] != "00001")
    )
    return dataset


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "in", SIZES)


def survivors() -> list[int]:
    return [seed for seed in range(31) if seed % 3 != 0 and not 9 <= seed < 15]


def test_members_ids_and_shards(source: Path, tmp_path: Path, scheduler: Any) -> None:
    out = tmp_path / "out"
    done = kept(source).to_webdataset(out, "keep", samples_per_shard=7, old_id_col="old")
    seeds = survivors()
    assert len(seeds) == 16
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    originals: dict[str, bytes] = {}
    for path in source.glob("*.tar"):
        originals |= tar_members(path)
    place = 0
    for number, tar in enumerate(sorted(out.glob("*.tar"))):
        members = tar_members(tar)
        rows = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        assert len(members) == 3 * len(rows)
        assert len(rows) == (2 if number == 2 else 7)
        for offset, row in enumerate(rows):
            seed, new = seeds[place], f"{number:05d}{offset}"
            assert row["key"] == new
            assert row["shard"] == tar.stem
            assert row["seed"] == seed
            assert row["old"] == f"{seed:06d}"
            assert members[f"{new}.jpg"] == originals[f"{seed:06d}.jpg"]
            assert members[f"{new}.txt"] == originals[f"{seed:06d}.txt"]
            assert json.loads(members[f"{new}.json"]) == {"key": new, "seed": seed, "old": f"{seed:06d}"}
            place += 1
    assert place == len(seeds)
    assert done.run_totals is not None
    assert done.run_totals["rows_in"] == 31
    assert done.run_totals["rows_out"] == len(seeds)
    assert done.run_totals["rows_filtered"] == 31 - len(seeds)


def test_loads_again_and_with_webdataset(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = kept(source).to_webdataset(out, "keep", samples_per_shard=7)
    frame = ImageTextPairDataset.from_webdataset(str(out)).metadata.compute()
    assert frame["seed"].tolist() == survivors()
    assert done.metadata.compute()["key"].tolist() == frame["key"].tolist()
    tars = [str(path) for path in sorted(out.glob("*.tar"))]
    # In a process of its own: webdataset leaves its files open, which would be a warning here.
    code = (
        "import json, sys, webdataset\n"
        "for one in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):\n"
        "    print(json.dumps([one['__key__'], json.loads(one['json'])['seed'], len(one['jpg'])]))"
    )
    done_reading = subprocess.run([sys.executable, "-c", code, *tars], capture_output=True, text=True, check=True)
    read = [json.loads(line) for line in done_reading.stdout.splitlines()]
    assert [key for key, _, _ in read] == frame["key"].tolist()
    assert [seed for _, seed, _ in read] == survivors()
    assert all(size > 100 for _, _, size in read)


def test_index_files_are_right(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept(source).to_webdataset(out, "keep", samples_per_shard=7)
    for tar in sorted(out.glob("*.tar")):
        index = read_idx(str(tar.with_suffix(".idx")), str(tar))
        data, members = tar.read_bytes(), tar_members(tar)
        found = {
            member.name: data[member.offset : member.offset + member.size]
            for one in index.samples
            for member in one.members
        }
        assert found == members


def test_same_bytes_each_time(source: Path, tmp_path: Path) -> None:
    def hashes(out: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("0*"))}

    for seed in (None, 5):
        first, second = tmp_path / f"a{seed}", tmp_path / f"b{seed}"
        kept(source).to_webdataset(first, "keep", samples_per_shard=7, shuffle_seed=seed)
        kept(source).to_webdataset(second, "keep", samples_per_shard=7, shuffle_seed=seed)
        assert len(hashes(first)) == 9
        assert hashes(first) == hashes(second)


def test_shuffle_is_a_permutation_by_its_seed(source: Path, tmp_path: Path) -> None:
    orders = []
    for seed in (1, 2):
        out = tmp_path / f"out{seed}"
        done = kept(source).to_webdataset(out, "keep", samples_per_shard=7, shuffle_seed=seed)
        frame = done.metadata.compute()
        for key, number in zip(frame["key"], frame["seed"], strict=True):
            members = tar_members(out / f"{key[:5]}.tar")
            assert json.loads(members[f"{key}.json"])["seed"] == number
        orders.append(frame["seed"].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == survivors()
    assert orders[0] != orders[1] != survivors()


def test_rows_after_a_repartition_and_a_user_filter(source: Path, tmp_path: Path) -> None:
    dataset = kept(source)
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] > 4].repartition(npartitions=2)
    done = dataset.to_webdataset(tmp_path / "out", "keep", samples_per_shard=7)
    assert done.metadata.compute()["seed"].tolist() == [seed for seed in survivors() if seed > 4]


def test_keep_ids(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept(source).to_webdataset(out, "keep", samples_per_shard=100, keep_ids=True)
    members = tar_members(out / "00000.tar")
    originals = tar_members(source / "00000.tar")
    assert members["000001.json"] == originals["000001.json"]
    assert pq.read_table(out / "00000.parquet")["key"].to_pylist() == [f"{seed:06d}" for seed in survivors()]


def test_keep_ids_that_repeat_across_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", [sample(1, "same")])
        write_rows(tmp_path / "in" / f"{name}.parquet", {"key": ["same"], "keep": [True]})
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
    with pytest.raises(RunError, match=r"'same'.*keep_ids"):
        dataset.to_webdataset(tmp_path / "out", "keep", keep_ids=True)
    done = dataset.to_webdataset(tmp_path / "other", "keep", old_id_col="old")
    assert done.metadata.compute()["key"].tolist() == ["000000000", "000000001"]


def test_a_rerun_leaves_finished_shards_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept(source).to_webdataset(out, "keep", samples_per_shard=7)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    (out / "00001.parquet").unlink()
    kept(source).to_webdataset(out, "keep", samples_per_shard=7)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    assert {name for name in after if after[name] != stamps[name]} == {"00001.tar", "00001.idx", "00001.parquet"}


def test_a_folder_that_holds_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", {"x": 1})
    with pytest.raises(DatasetError, match="holds another dataset"):
        kept(source).to_webdataset(tmp_path / "other", "keep")
    kept(source).to_webdataset(tmp_path / "out", "keep", samples_per_shard=7)
    with pytest.raises(DatasetError, match="holds another export"):
        kept(source).to_webdataset(tmp_path / "out", "keep", samples_per_shard=8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"filter_column": "seed"}, "not booleans"),
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"samples_per_shard": 1, "max_shards": 1}, "max_shards=2"),
        ({"old_id_col": "key"}, "old_id_col"),
        ({"old_id_col": "old", "keep_ids": True}, "old_id_col"),
    ],
)
def test_unusable_arguments(source: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    arguments = {"filter_column": "keep", **options}
    with pytest.raises(ArgumentError, match=said):
        kept(source).to_webdataset(tmp_path / "out", **arguments)


def test_nothing_to_export(source: Path, tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    dataset.metadata = dataset.metadata.assign(keep=dataset.metadata["seed"] < 0)
    with pytest.raises(DatasetError, match="nothing to export"):
        dataset.to_webdataset(tmp_path / "out", "keep")


def test_its_own_folder_is_refused(source: Path) -> None:
    with pytest.raises(ArgumentError, match="own folder"):
        kept(source).to_webdataset(source, "keep")


def test_odd_json_is_copied_and_noted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "in" / "a.tar", [("000", {"jpg": b"x", "json": b"[1, 2]"}), ("001", {"jpg": b"y", "json": b"\xff{"})]
    )
    write_rows(tmp_path / "in" / "a.parquet", {"key": ["000", "001"], "keep": [True, True]})
    out = tmp_path / "out"
    ImageTextPairDataset.from_webdataset(str(tmp_path / "in")).to_webdataset(out, "keep")
    members = tar_members(out / "00000.tar")
    assert members["000000000.json"] == b"[1, 2]"
    assert members["000000001.json"] == b"\xff{"
    ledgers = [path.read_text() for path in (out / "_nemo_image").glob("to_webdataset-output-*.jsonl")]
    assert "2 JSON members" in ledgers[0]


def test_rows_without_sample_are_a_named_loss(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", [sample(0, "000")])
    write_rows(tmp_path / "in" / "a.parquet", {"key": ["000", "001", "002"], "keep": [True, True, None]})
    done = ImageTextPairDataset.from_webdataset(str(tmp_path / "in")).to_webdataset(tmp_path / "out", "keep")
    totals = done.run_totals
    assert totals is not None
    assert (totals["rows_in"], totals["rows_out"], totals["rows_filtered"]) == (3, 1, 1)
    assert totals["losses"] == {"without_sample": 1}


def test_a_filter_that_draws_at_random_is_refused(source: Path, tmp_path: Path) -> None:
    draws = iter(range(1000))

    def draw(frame: pd.DataFrame) -> pd.Series:
        first = next(draws) % len(frame)
        return pd.Series([number == first for number in range(len(frame))], frame.index)

    dataset = ImageTextPairDataset.from_webdataset(str(source))
    keep = dataset.metadata[["key"]].map_partitions(draw, meta=("keep", bool))
    dataset.metadata = dataset.metadata.assign(keep=keep)
    with pytest.raises(RunError, match="at random"):
        dataset.to_webdataset(tmp_path / "out", "keep")


def test_output_columns_have_one_schema(source: Path, tmp_path: Path) -> None:
    kept(source).to_webdataset(tmp_path / "out", "keep", samples_per_shard=7)
    schemas = [pq.read_schema(path).remove_metadata() for path in (tmp_path / "out").glob("*.parquet")]
    assert all(one.equals(schemas[0]) for one in schemas)
    assert isinstance(pd.read_parquet(tmp_path / "out" / "00000.parquet"), pd.DataFrame)
