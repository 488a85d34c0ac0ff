"""A dataset stays its own shards, whatever else lies in a folder, and whatever the folder is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import IdMismatchError, MetadataFileError, MissingColumnError, RunError
from nemo_image.filters import CaptionStats
from tests.makers import make_dataset


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(one) for one in args])


def seeds(folder: Path) -> list[int]:
    return sorted(seed for path in folder.glob("*.parquet") for seed in pq.read_table(path)["seed"].to_pylist())


def test_a_save_gives_the_shards_that_were_saved(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    CaptionStats()(ImageTextPairDataset.from_webdataset(data)).save_metadata(tmp_path / "out")
    part = ImageTextPairDataset.from_webdataset([f"{data}/b.tar"])
    saved = CaptionStats()(part).save_metadata(tmp_path / "out")
    assert saved.shards == ["b"]
    assert len(saved) == len(saved.metadata) == 2
    assert ImageTextPairDataset.from_webdataset(tmp_path / "out").shards == ["a", "b"]


@pytest.mark.parametrize("more", [[], ["--dedup", "exact"], ["--part", "1/1"]])
def test_an_output_used_for_other_shards_before(tmp_path: Path, more: list[str]) -> None:
    data, out = make_dataset(tmp_path / "in", {"a": 3, "b": 2, "c": 1}), tmp_path / "out"
    first = run("curate", data, out, "--keep", "caption_words >= 1")
    assert first.exit_code == 0, first.output
    again = run("curate", f"{data}/{{b,c}}.tar", out, "--keep", "caption_words >= 1", "--replace", *more)
    assert again.exit_code == 0, again.output
    assert seeds(out) == [3, 4, 5]


@pytest.mark.parametrize("name", ["v[1]", "v{x}", "v*", "what?"])
def test_folders_that_look_like_patterns(tmp_path: Path, name: str) -> None:
    data = make_dataset(tmp_path / f"in {name}", {"a": 3})
    out = tmp_path / name
    made = run("curate", data, out, "--keep", "caption_words >= 1", "--dedup", "exact")
    assert made.exit_code == 0, made.output
    assert run("inspect", out, "--ledger").exit_code == 0
    assert len(ImageTextPairDataset.from_webdataset(f"{out}/00000.tar")) == 3
    assert len(ImageTextPairDataset.from_webdataset(out)) == 3


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    data = Path(make_dataset(tmp_path / "in", {"a": 3, "b": 2}))
    table = pq.read_table(data / "b.parquet")
    twice = pa.table([*table.columns, table["seed"]], names=[*table.column_names, "seed"])
    pq.write_table(twice, data / "b.parquet")
    with pytest.raises(RunError, match=r"b: .*b\.parquet has more than one column 'seed': rename or remove one"):
        CaptionStats()(ImageTextPairDataset.from_webdataset(data)).save_metadata(tmp_path / "out")
    pq.write_table(twice, data / "a.parquet")
    with pytest.raises(MetadataFileError, match=r"a\.parquet has more than one column 'seed'"):
        ImageTextPairDataset.from_webdataset(data)


def test_a_search_does_not_show_another_row(tmp_path: Path) -> None:
    data = Path(make_dataset(tmp_path / "in", {"a": 3}))
    table = pq.read_table(data / "a.parquet")
    table = table.set_column(0, "key", pa.array(["000000", "000000", "000002"]))
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], pa.list_(pa.float32()))
    pq.write_table(table.append_column("image_embedding", vectors), data / "a.parquet")
    dataset = ImageTextPairDataset.from_webdataset(data)
    assert dataset.search([-1.0, 0.0], k=1).frame["seed"].tolist() == [2]
    with pytest.raises(IdMismatchError, match="a: its metadata has the id '000000' more than once"):
        dataset.search([0.0, 1.0], k=1)


def test_an_assigned_frame_of_one_partition_a_tar(tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "in", {"a": 3, "b": 2}))
    before = dataset.metadata.compute()
    dataset.metadata = dataset.metadata.drop(columns="shard")
    pd.testing.assert_frame_equal(dataset.metadata.compute()[before.columns], before)
    saved = CaptionStats()(dataset).save_metadata(tmp_path / "out")
    assert saved.metadata.compute()["shard"].tolist() == ["a"] * 3 + ["b"] * 2
    with pytest.raises(MissingColumnError, match=r"lacks 'shard'.*one partition a tar file is taken: of 2, not 1"):
        dataset.metadata = dataset.metadata.drop(columns="shard").repartition(npartitions=1)
    with pytest.raises(MissingColumnError, match="lacks 'key'"):
        dataset.metadata = dataset.metadata.drop(columns="key")
