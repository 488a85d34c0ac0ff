"""What the passes of a deduplication share: the rows to work on, and their folder.

.. code-block:: text

    <folder>/plan.json                   what is asked of which rows; written first
    <folder>/sample/, centroids.npy      the rows that k-means was fitted on, and what it found
    <folder>/groups/<group>.json         a group of shards is scattered; its rows' names are in <group>.parquet
    <folder>/runs/<group>-<run>.arrow    rows by bucket
    <folder>/found/<bucket>.arrow        what was found, by range of groups
    <folder>/rows/<shard>.parquet        what was found, by row: what the dataset's new columns read
    <folder>/duplicate_ids.parquet/      the rows to remove
    <folder>/dedup_summary.csv
    <folder>/result.json                 written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.partitions import ShardTasks
from nemo_image.datasets.passes import MetadataIdentity, one_task_a_shard, run_all, tasks_of
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import DatasetError
from nemo_image.shards import files

PLAN = "plan.json"


@dataclass(frozen=True)
class Work:
    """The rows to work on: one partition a shard, with nothing left to compute but reading and cheap columns.

    Attributes
    ----------
    dataset : ImageTextPairDataset
        The dataset that they belong to, and to which results are added.
    columns : list of str
        What the passes read, besides ``shard`` and the id.
    """

    dataset: ImageTextPairDataset
    columns: list[str]

    @classmethod
    def of(cls, dataset: ImageTextPairDataset, columns: Sequence[str]) -> Work:
        """Return the work on some columns of a dataset, computing what is pending of them first."""
        wanted = list(dict.fromkeys([name for name in columns if name not in (schema.SHARD, dataset.id_col)]))
        return cls(one_task_a_shard(dataset, wanted), wanted)

    @property
    def source(self) -> DatasetSource:
        """Where the files lie."""
        return self.dataset.source

    def tasks(self, columns: Sequence[str]) -> ShardTasks:
        """Return one task a shard that makes the frame of some columns, ``shard`` and the id."""
        return tasks_of(self.dataset, columns)

    def token(self) -> str:
        """Return what tells these rows and values from others."""
        names = [schema.SHARD, self.dataset.id_col, *self.columns]
        shards = self.tasks([]).shards
        identities = run_all("look at metadata", MetadataIdentity(self.source), shards, len(shards))
        return str(tokenize(self.dataset.metadata[names], identities))


def begin(folder: str, plan: dict[str, Any], storage_options: Any, *, named_by_user: bool) -> None:
    """Make a folder that of a plan: new, or left by an earlier run of the same plan.

    Raises
    ------
    DatasetError
        If it holds something else.
    """
    url = files.join(folder, PLAN)
    before = read_json(url, storage_options)
    if before == plan:
        return
    if before is not None:
        raise DatasetError(
            f"{folder} holds the result of another deduplication (of other rows, values or settings): give an empty "
            "output_dir, or remove it"
        )
    if named_by_user and files.exists(folder, storage_options):
        fs, path = files.open_fs(folder, storage_options)
        there = [name.rpartition("/")[2] for name in fs.ls(path, detail=False)]
        others = [name for name in there if name.rstrip("/") != FOLDER]
        if not files.is_folder(folder, storage_options):
            raise DatasetError(f"{folder} is a file: give a folder for the result")
        if others:
            raise DatasetError(f"{folder} holds something else ({others[0]}, …): give an empty output_dir")
    write_json(url, plan, storage_options)


def read_json(url: str, storage_options: Any) -> Any:
    """Return the values of a JSON file; None where it is missing or garbled."""
    try:
        return json.loads(files.read_bytes(url, storage_options))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_json(url: str, values: Any, storage_options: Any) -> None:
    """Write values as a JSON file, atomically."""
    with files.atomic_writer(url, storage_options) as out:
        out.write(json.dumps(values, indent=1).encode() + b"\n")


def remove(url: str, storage_options: Any) -> None:
    """Remove a file or folder, if it is there."""
    fs, path = files.open_fs(url, storage_options)
    if fs.exists(path):
        fs.rm(path, recursive=True)
