"""What the passes of a deduplication share: the rows to work on, their folder, and how tasks are run.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd
from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import column_functions, metadata_identity, tar_identity
from nemo_image.datasets.load import read_rows
from nemo_image.datasets.partitions import PartitionTask, ShardTasks, shard_tasks
from nemo_image.datasets.shard_pass import ShardPass
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import DatasetError, RunError, one_line
from nemo_image.shards import files, parquet

PLAN = "plan.json"
FAILURES_NAMED = 10

Item = TypeVar("Item")
Record = TypeVar("Record")


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
        dataset.require_columns(columns)
        wanted = list(dict.fromkeys([name for name in columns if name not in (schema.SHARD, dataset.id_col)]))
        dataset = dataset.unify_schemas()
        if _is_to_compute(dataset, [schema.SHARD, dataset.id_col, *wanted]):
            dataset = dataset.materialize()
        if shard_tasks(dataset.metadata[[schema.SHARD, dataset.id_col, *wanted]]) is None:
            # Joined or repartitioned: gather the rows by shard in files first.
            dataset = dataset.materialize(always=True)
        return cls(dataset, wanted)

    @property
    def source(self) -> DatasetSource:
        """Where the files lie."""
        return self.dataset.source

    def tasks(self, columns: Sequence[str]) -> ShardTasks:
        """Return one task a shard that makes the frame of some columns, ``shard`` and the id."""
        names = list(dict.fromkeys([schema.SHARD, self.dataset.id_col, *columns]))
        tasks = shard_tasks(self.dataset.metadata[names])
        assert tasks is not None
        return tasks

    def token(self) -> str:
        """Return what tells these rows and values from others."""
        names = [schema.SHARD, self.dataset.id_col, *self.columns]
        shards = self.tasks([]).shards
        identities = run_all("look at metadata", _MetadataIdentity(self.source), shards, len(shards))
        return str(tokenize(self.dataset.metadata[names], identities))


class _MetadataIdentity:
    def __init__(self, source: DatasetSource) -> None:
        self.source = source

    def __call__(self, shard: str) -> Any:
        return metadata_identity(self.source.parquet_url(shard), self.source.storage_options)


class _BothIdentities(_MetadataIdentity):
    def __call__(self, shard: str) -> Any:
        return tar_identity(self.source, shard), super().__call__(shard)


def file_identities(dataset: ImageTextPairDataset) -> list[Any]:
    """Return what tells a dataset's tars and metadata from other versions of them."""
    shards = dataset.shards
    return run_all("look at tars", _BothIdentities(dataset.source), shards, len(shards))


def _is_to_compute(dataset: ImageTextPairDataset, names: Sequence[str]) -> bool:
    """Tell whether columns need more than reading files."""
    needed = column_functions(dataset.metadata[list(names)].optimize(fuse=False))
    return any(not getattr(one.function, "only_reads", False) for one in needed)


def frames(source: DatasetSource, shard: str, rows: PartitionTask) -> Iterator[pd.DataFrame]:
    """Yield a shard's rows, window by window where that gives the same rows."""
    with ShardPass(source, shard) as under_way:
        summary = parquet.summary_or_none(source.parquet_url(shard), source.storage_options)
        ids = None if summary is None else read_rows(source, shard, [source.id_col])[source.id_col].combine_chunks()
        for _ in under_way.windows(ids, rows.row_by_row):
            yield rows()


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


@dataclass(frozen=True)
class _Outcome:
    number: int
    record: Any
    cause: str | None


class _Caught:
    """Calls a task's function; returns its failure instead of raising it."""

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self.function = function
        self.task_name = name

    def __call__(self, item: tuple[int, Any]) -> _Outcome:
        """Return the outcome for a numbered item."""
        number, wanted = item
        try:
            return _Outcome(number, self.function(wanted), None)
        except Exception as error:
            return _Outcome(number, None, one_line(error))


def run_all(
    label: str,
    function: Callable[[Item], Record],
    items: Iterable[Item],
    count: int,
    name_of: Callable[[Item], str] = str,
    rows_of: Callable[[Record], int] = lambda record: 0,
) -> list[Record]:
    """Run a function over all items, as tasks; return the records in the items' order.

    Raises
    ------
    RunError
        After the other items are finished, if some failed: lists them with their causes.
    """
    names: dict[int, str] = {}

    def numbered() -> Iterator[tuple[int, Item]]:
        for number, item in enumerate(items):
            names[number] = name_of(item)
            yield number, item

    work = _Caught(function, f"nemo-image-{label.replace(' ', '-')}")
    found: dict[int, Record] = {}
    failures: dict[str, str] = {}

    def dead(item: tuple[int, Item], error: BaseException) -> _Outcome:
        return _Outcome(item[0], None, one_line(error))

    with Progress(label, count, "tasks") as progress:
        for outcome in run_tasks(work, numbered(), on_error=dead, count=count):
            if outcome.cause is not None:
                failures[names[outcome.number]] = outcome.cause
                continue
            found[outcome.number] = outcome.record
            progress.advance(rows_of(outcome.record))
    if failures:
        causes = [f"{name}: {cause}" for name, cause in sorted(failures.items())[:FAILURES_NAMED]]
        raise RunError(
            f"{label}: {len(failures)} of {count} failed, the others are finished and a rerun takes them over. "
            + "; ".join(causes),
            failures,
        )
    return [found[number] for number in sorted(found)]
