"""Relative paths mean the user's own folder, also to workers that run elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import ExactDedup
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import ArgumentError
from nemo_image.filters import Blocklist
from nemo_image.pipeline import DaskExecutor, Pipeline
from nemo_image.stages import FilePartitioningStage, ImageReaderStage, ImageWriterStage
from tests.makers import TINY_MODEL, make_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")


@pytest.fixture
def elsewhere(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a dataset in ``data``, below the current folder, which is not the workers'."""
    make_dataset(tmp_path / "data", {"a": 3, "b": 2})
    assert str(tmp_path) not in cluster.run(os.getcwd).values()
    monkeypatch.chdir(tmp_path)
    with cluster.as_current():
        yield tmp_path


def test_dataset(elsewhere: Path) -> None:
    import timm
    import torch

    dataset = ImageTextPairDataset.from_webdataset("data")
    assert dataset.path == str(elsewhere / "data")
    torch.save(timm.create_model(TINY_MODEL).state_dict(), "weights.pt")
    embedded = TimmImageEmbedder(TINY_MODEL, weights="weights.pt", autocast=False)(dataset)
    embedded.save_metadata("enriched/", columns=["image_embedding"])
    assert sorted(path.name for path in (elsewhere / "enriched").glob("*.parquet")) == ["a.parquet", "b.parquet"]
    beside = ImageTextPairDataset.from_webdataset("data", sidecars=["enriched"])
    assert beside.metadata["image_embedding"].compute().notna().all()
    Path("names.txt").write_text("000001\n")
    blocked = Blocklist("names.txt", output_dir="blocked")(embedded)
    assert blocked.metadata["blocked"].compute().sum() == 1
    kept = ExactDedup(output_dir="dedup")(blocked)
    kept.metadata["keep"] = ~kept.metadata["is_duplicate"]
    kept.to_webdataset("out", filter_column="keep")
    assert sum(pq.read_metadata(path).num_rows for path in (elsewhere / "out").glob("*.parquet")) == 5
    assert (elsewhere / "dedup" / "result.json").is_file()


def test_pipeline(elsewhere: Path) -> None:
    pipeline = Pipeline("relative")
    pipeline.add_stage(FilePartitioningStage(file_paths="data", file_extensions=[".tar"]))
    pipeline.add_stage(ImageReaderStage())
    pipeline.add_stage(ImageWriterStage(output_dir="written"))
    pipeline.run(DaskExecutor(), checkpoint_path="progress")
    assert sum(pq.read_metadata(path).num_rows for path in (elsewhere / "written").glob("*.parquet")) == 5
    assert (elsewhere / "progress").is_dir()


@pytest.mark.parametrize("named", ["data", "./data/", "absolute"])
def test_the_datasets_own_folder_by_its_name(elsewhere: Path, named: str) -> None:
    """Enriching it is enriching in place: all columns stay, and the result is the dataset itself."""
    before = ImageTextPairDataset.from_webdataset("data")
    path = str(elsewhere / "data") if named == "absolute" else named
    scored = before.map_columns(
        double, inputs=["seed"], outputs={"twice": "float64"}, fingerprints={"twice": {"by": 2}}
    )
    with pytest.raises(ArgumentError, match="another folder"):
        scored.save_metadata(path, columns=["twice"])
    assert scored.pending_shards(path) == ["a", "b"]
    done = scored.save_metadata(path)
    assert done.path == before.path
    assert done.pending_shards() == []
    for shard in ("a", "b"):
        names = pq.read_schema(elsewhere / "data" / f"{shard}.parquet").names
        assert sorted(names) == sorted([*before.metadata.columns, "twice"])


def double(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"twice": 2.0 * frame["seed"].astype("float64")}, index=frame.index)


def test_an_empty_path(elsewhere: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset("data")
    with pytest.raises(ArgumentError, match="path is empty"):
        dataset.save_metadata("")
    with pytest.raises(ArgumentError, match="path is empty"):
        dataset.to_webdataset("", "seed")
