"""A frame's partitions as tasks: as Dask would compute them, in this process and in another."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.footers import count_rows as count_rows_of_files
from nemo_image.datasets.partitions import count_rows, shard_tasks
from nemo_image.errors import MetadataFileError
from nemo_image.shards import parquet
from tests.makers import make_dataset

SIZES = {"a": 4, "b": 3, "c": 5}


def with_number(frame: pd.DataFrame, partition_info: dict[str, Any] | None = None) -> pd.DataFrame:
    return frame.assign(place=0 if partition_info is None else partition_info["number"])


def filtered(frame: Any) -> Any:
    return frame[frame["seed"] >= 3]


def more_columns(frame: Any) -> Any:
    return frame.assign(double=frame["seed"] * 2, where=frame["shard"].astype("string[pyarrow]"))


def numbered(frame: Any) -> Any:
    return frame.map_partitions(with_number, meta=frame._meta.assign(place=0))


def sampled(frame: Any) -> Any:
    return frame.sample(frac=0.5, random_state=7)


def later_partitions(frame: Any) -> Any:
    return filtered(frame.partitions[1:])


@pytest.fixture
def dataset(tmp_path: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(make_dataset(tmp_path, SIZES))


@pytest.mark.parametrize(
    ("step", "alike"),
    [(filtered, True), (more_columns, True), (later_partitions, True), (numbered, False), (sampled, False)],
)
def test_tasks_that_have_travelled_give_what_dask_gives(
    dataset: ImageTextPairDataset, step: Callable[[Any], Any], alike: bool
) -> None:
    frame = step(dataset.metadata)
    tasks = shard_tasks(frame)
    assert tasks is not None
    assert (tasks.pattern is not None) == alike
    partitions = dask.compute(*frame.to_delayed(), scheduler="sync")
    for wanted, (shard, task) in zip(partitions, tasks, strict=True):
        sent = pickle.loads(pickle.dumps(task))
        assert sent.row_by_row == tasks.row_by_row
        for made in (task(), sent()):
            pd.testing.assert_frame_equal(made, wanted)
            assert set(made["shard"]) <= {shard}


def test_what_is_sent_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    lengths = []
    for count in (2, 40):
        folder = make_dataset(tmp_path / str(count), {f"{number:03d}": 1 for number in range(count)})
        tasks = shard_tasks(filtered(ImageTextPairDataset.from_webdataset(folder).metadata))
        assert tasks is not None
        lengths.append(len(pickle.dumps(next(iter(tasks))[1])))
    # The folders' names differ by one character.
    assert abs(lengths[1] - lengths[0]) < 10


@pytest.mark.in_process("watches or changes this process")
def test_rows_are_counted_by_the_columns_of_the_filter(
    dataset: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    real = parquet.read_present

    def noting(url: str, columns: Any, *args: Any) -> Any:
        asked.update(columns)
        return real(url, columns, *args)

    monkeypatch.setattr(parquet, "read_present", noting)
    assert count_rows(filtered(dataset.metadata)) == 9
    assert asked == {"seed"}


def test_rows_are_counted_on_any_scheduler(dataset: ImageTextPairDataset, scheduler: Any) -> None:
    assert count_rows(dataset.metadata) == 12
    assert count_rows(filtered(dataset.metadata)) == 9
    assert count_rows(dataset.metadata.repartition(npartitions=2)) == 12
    assert count_rows_of_files(dataset.source, dataset.shards) == 12


def test_an_unreadable_file_is_an_error_when_rows_are_counted(
    dataset: ImageTextPairDataset, tmp_path: Path, scheduler: Any
) -> None:
    (tmp_path / "b.parquet").write_bytes(b"no Parquet")
    with pytest.raises(MetadataFileError, match=r"b\.parquet"):
        count_rows(filtered(dataset.metadata))
    with pytest.raises(MetadataFileError, match=r"b\.parquet"):
        count_rows_of_files(dataset.source, dataset.shards)
