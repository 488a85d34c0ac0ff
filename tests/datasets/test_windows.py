"""Shards of more rows than fit in memory: worked on in windows, with the results of working on them whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset, shard_pass
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.embedders.base import EmbedPartition
from nemo_image.errors import RunError
from tests.makers import TINY_MODEL, make_dataset, sample, tar_members, write_rows, write_tar

Job = Callable[[ImageTextPairDataset, Path], ImageTextPairDataset]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each frame that an embedder was given."""
    seen: list[int] = []
    original = EmbedPartition.__call__

    def watched(self: EmbedPartition, frame: pd.DataFrame) -> pd.DataFrame:
        seen.append(len(frame))
        return original(self, frame)

    monkeypatch.setattr(EmbedPartition, "__call__", watched)
    return seen


def embedded(dataset: ImageTextPairDataset) -> ImageTextPairDataset:
    # One picture a batch: sums of larger batches differ in the last bit where windows cut them elsewhere.
    return TimmImageEmbedder(TINY_MODEL, batch_size=1, autocast=False)(dataset)


def plain(dataset: ImageTextPairDataset, target: Path) -> ImageTextPairDataset:
    return embedded(dataset).save_metadata(target)


def in_place(dataset: ImageTextPairDataset, target: Path) -> ImageTextPairDataset:
    return embedded(dataset).save_metadata()


def filtered(dataset: ImageTextPairDataset, target: Path) -> ImageTextPairDataset:
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] > 4]
    dataset = embedded(dataset)
    dataset.metadata["twice"] = dataset.metadata["score"] * 2
    return dataset.save_metadata(target)


def filtered_then_all(dataset: ImageTextPairDataset, target: Path) -> ImageTextPairDataset:
    whole = ImageTextPairDataset.from_webdataset(dataset.path)
    dataset.metadata = dataset.metadata[dataset.metadata["seed"].isin([1, 2, 11, 19])]
    embedded(dataset).save_metadata()
    return embedded(whole).save_metadata(target)


def exported(dataset: ImageTextPairDataset, target: Path) -> ImageTextPairDataset:
    saved = embedded(dataset).save_metadata(target / "saved")
    saved.metadata["keep"] = saved.metadata["seed"].isin([0, 3, 4, 8, 9, 10, 17, 20, 22])
    return saved.to_webdataset(target / "new", "keep", samples_per_shard=4, shuffle_seed=1, old_id_col="old")


def files_of(folder: Path) -> dict[str, bytes]:
    kinds = (".parquet", ".tar", ".idx")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.suffix in kinds}


def odd_dataset(folder: Path) -> Path:
    """23 rows: one bad image, one row without sample, one sample without row, rows not in the tar's order."""
    samples = [sample(seed, f"{seed:06d}", f"picture {seed}") for seed in range(23)]
    samples[6][1]["jpg"] = samples[6][1]["jpg"][:40]
    samples[21] = sample(99, "stranger")
    order = np.random.default_rng(0).permutation(23)
    write_tar(folder / "a.tar", [samples[number] for number in order])
    seeds = list(range(23))
    columns = {"key": [f"{seed:06d}" for seed in seeds], "seed": seeds, "score": [seed / 10 for seed in seeds]}
    write_rows(folder / "a.parquet", columns)
    return folder


@pytest.mark.parametrize("job", [plain, in_place, filtered, filtered_then_all, exported])
@pytest.mark.in_process("watches or changes this process")
def test_windows_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[int], job: Job
) -> None:
    found = []
    (tmp_path / "in").mkdir()
    odd_dataset(tmp_path / "in")
    for rows in (1000, 5):
        # The same paths and file times: both are part of what is written.
        folder = tmp_path / "dataset"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in (tmp_path / "in").iterdir():
            (folder / path.name).hardlink_to(path)
        monkeypatch.setattr(shard_pass, "WINDOW_ROWS", rows)
        pieces.clear()
        job(ImageTextPairDataset.from_webdataset(folder), folder / "out")
        assert max(pieces) <= rows
        assert sum(pieces) >= 9
        found.append(files_of(folder))
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_windows_account_for_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    totals = embedded(ImageTextPairDataset.from_webdataset(odd_dataset(tmp_path))).save_metadata().run_totals
    assert totals is not None
    assert (totals["rows_in"], totals["rows_out"], totals["samples"]) == (23, 23, 23)
    assert totals["failures"] == {"missing": 1, "truncated": 1}
    assert totals["results"]["image_embedding"] == 21
    assert (totals["rows_without_sample"], totals["samples_without_row"]) == (1, 1)


def test_what_looks_at_a_whole_partition_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    dataset = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path, {"a": 10}))

    def ranked(frame: pd.DataFrame) -> pd.DataFrame:
        places = frame["score"].to_numpy(dtype=float).argsort().argsort() + 1.0
        return frame.assign(rank=pd.Series(places, frame.index, dtype="float64[pyarrow]"))

    meta = dataset.metadata._meta.assign(rank=pd.Series([], dtype="float64[pyarrow]"))
    dataset.metadata = dataset.metadata.map_partitions(ranked, meta=meta)
    dataset.save_metadata(tmp_path / "out")
    assert pq.read_table(tmp_path / "out/a.parquet")["rank"].to_pylist() == [float(n) for n in range(1, 11)]


def test_index_counts_on_through_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    dataset = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path, {"a": 10}))
    dataset.metadata["place"] = dataset.metadata.index
    dataset.save_metadata(tmp_path / "out")
    assert pq.read_table(tmp_path / "out/a.parquet")["place"].to_pylist() == list(range(10))


def test_an_index_that_is_reset_counts_the_whole_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    dataset = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path, {"a": 10}))
    frame = dataset.metadata[dataset.metadata["seed"] > 1].reset_index(drop=True)
    frame["place"] = frame.index
    dataset.metadata = frame
    dataset.save_metadata(tmp_path / "out")
    assert pq.read_table(tmp_path / "out/a.parquet")["place"].to_pylist() == list(range(8))


@pytest.mark.in_process("watches or changes this process")
def test_windows_of_tars_without_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[int]) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    write_tar(tmp_path / "a.tar", [sample(seed, f"{seed:06d}", f"picture {seed}") for seed in range(10)])
    embedded(ImageTextPairDataset.from_webdataset(tmp_path)).save_metadata(tmp_path / "out")
    assert pieces == [4, 4, 2]
    saved = pq.read_table(tmp_path / "out/a.parquet")
    assert saved["caption"].to_pylist() == [f"picture {seed}" for seed in range(10)]
    assert saved["image_embedding"].null_count == 0


@pytest.mark.parametrize("on_mismatch", ["drop", "raise"])
def test_windows_and_rows_without_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_mismatch: Any) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    dataset = ImageTextPairDataset.from_webdataset(odd_dataset(tmp_path), on_mismatch=on_mismatch)
    if on_mismatch == "raise":
        with pytest.raises(RunError, match="rows have no sample"):
            embedded(dataset).save_metadata(tmp_path / "out")
        return
    saved = embedded(dataset).save_metadata(tmp_path / "out")
    assert saved.run_totals is not None
    assert saved.run_totals["losses"] == {"without_sample": 1}
    assert pq.read_table(tmp_path / "out/a.parquet")["seed"].to_pylist() == [n for n in range(23) if n != 21]


def test_sidecars_join_by_id_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    make_dataset(tmp_path / "in", {"a": 10})
    (tmp_path / "beside").mkdir()
    backwards = [f"{number:06d}" for number in range(9, 0, -1)]
    values = pa.table({"key": backwards, "extra": [int(key) * 7 for key in backwards]})
    pq.write_table(values, tmp_path / "beside/a.parquet", row_group_size=2)
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "in", sidecars=[str(tmp_path / "beside")])
    dataset.save_metadata(tmp_path / "out")
    assert pq.read_table(tmp_path / "out/a.parquet")["extra"].to_pylist() == [None, *range(7, 70, 7)]


def test_exported_members_are_those_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "WINDOW_ROWS", 4)
    dataset = ImageTextPairDataset.from_webdataset(odd_dataset(tmp_path / "in"))
    dataset.metadata["keep"] = dataset.metadata["seed"] > 10
    new = dataset.to_webdataset(tmp_path / "new", "keep", samples_per_shard=5, old_id_col="old")
    before = tar_members(tmp_path / "in/a.tar")
    for shard in new.shards:
        members = tar_members(tmp_path / f"new/{shard}.tar")
        for key, old in pq.read_table(tmp_path / f"new/{shard}.parquet", columns=["key", "old"]).to_pandas().values:
            assert members[f"{key}.jpg"] == before[f"{old}.jpg"]
