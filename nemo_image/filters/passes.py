"""Passes over all rows of a dataset, for filters that need to see them all: one task a shard, in windows of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import column_functions, metadata_identity, tar_identity
from nemo_image.datasets.load import read_rows
from nemo_image.datasets.partitions import PartitionTask, ShardTasks, shard_tasks
from nemo_image.datasets.shard_pass import ShardPass
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import RunError, one_line
from nemo_image.shards import parquet

FAILURES_NAMED = 10

Item = TypeVar("Item")
Record = TypeVar("Record")


@dataclass(frozen=True)
class AllRows:
    """The rows of a dataset as tasks of one shard each, with nothing left to compute but reading and cheap columns.

    Attributes
    ----------
    dataset : ImageTextPairDataset
    tasks : ShardTasks
        Each makes the frame of ``shard``, the id and the columns asked for.
    """

    dataset: ImageTextPairDataset
    tasks: ShardTasks

    @classmethod
    def of(cls, dataset: ImageTextPairDataset, columns: Sequence[str]) -> AllRows:
        """Return the rows of some columns of a dataset; what is pending of them is computed once, into files, first."""
        names = list(dict.fromkeys([schema.SHARD, dataset.id_col, *columns]))
        dataset.require_columns(names)
        dataset = dataset.unify_schemas()
        if _is_to_compute(dataset, names):
            dataset = dataset.materialize()
        tasks = shard_tasks(dataset.metadata[names])
        if tasks is None:  # joined or repartitioned: gather the rows by shard in files first
            dataset = dataset.materialize(always=True)
            tasks = shard_tasks(dataset.metadata[names])
        assert tasks is not None
        return cls(dataset, tasks)


def frames(source: DatasetSource, shard: str, rows: PartitionTask) -> Iterator[pd.DataFrame]:
    """Yield a shard's rows, window by window where that gives the same rows."""
    with ShardPass(source, shard) as under_way:
        summary = parquet.summary_or_none(source.parquet_url(shard), source.storage_options)
        ids = None if summary is None else read_rows(source, shard, [source.id_col])[source.id_col].combine_chunks()
        for _ in under_way.windows(ids, rows.row_by_row):
            yield rows()


def file_identities(dataset: ImageTextPairDataset) -> list[Any]:
    """Return what tells a dataset's tars and metadata from other versions of them."""
    shards = dataset.shards
    found: list[Any] = []
    run_all("look at files", _Identities(dataset.source), shards, len(shards), found.append, str)
    return sorted(found)


class _Identities:
    def __init__(self, source: DatasetSource) -> None:
        self.source = source

    def __call__(self, shard: str) -> Any:
        source = self.source
        made_by = metadata_identity(source.parquet_url(shard), source.storage_options)
        return shard, repr(tar_identity(source, shard)), repr(made_by)


def _is_to_compute(dataset: ImageTextPairDataset, names: Sequence[str]) -> bool:
    needed = column_functions(dataset.metadata[list(names)].optimize(fuse=False))
    return any(not getattr(one.function, "only_reads", False) for one in needed)


def run_all(
    label: str,
    function: Callable[[Item], Record],
    items: Iterable[Item],
    count: int,
    take: Callable[[Record], object],
    name_of: Callable[[Item], str],
) -> None:
    """Run a function over all items, as tasks, and hand over each record as it comes; nothing else is kept.

    Parameters
    ----------
    take : callable
        Called on the client with each record, in any order.

    Raises
    ------
    RunError
        After the other items are finished, if some failed: lists them with their causes.
    """
    failures: dict[str, str] = {}
    work = _Caught(function, f"nemo-image-{label.replace(' ', '-')}", name_of)
    with Progress(label, count, "tasks") as progress:
        for name, record, cause in run_tasks(
            work, items, on_error=lambda item, error: (name_of(item), None, one_line(error)), count=count
        ):
            if cause is not None:
                failures[name] = cause
            else:
                take(record)
                progress.advance(0)
    if failures:
        causes = [f"{name}: {cause}" for name, cause in sorted(failures.items())[:FAILURES_NAMED]]
        raise RunError(f"{label}: {len(failures)} of {count} failed. " + "; ".join(causes), failures)


class _Caught:
    """Calls a task's function; returns its item's name, and its record or else the cause of its failure."""

    def __init__(self, function: Callable[[Any], Any], task_name: str, name_of: Callable[[Any], str]) -> None:
        self.function = function
        self.task_name = task_name
        self.name_of = name_of

    def __call__(self, item: Any) -> tuple[str, Any, str | None]:
        """Return the outcome for an item."""
        name = self.name_of(item)
        try:
            return name, self.function(item), None
        except Exception as error:
            return name, None, one_line(error)
