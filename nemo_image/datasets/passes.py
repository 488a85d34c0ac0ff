"""Passes over all rows of a dataset, for operators that need to see them all: a task a shard, a group or a range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_image import schema
from nemo_image.datasets.columns import column_functions, metadata_identity, tar_identity
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.datasets.partitions import ShardTasks, shard_tasks
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import RunError, one_line

FAILURES_NAMED = 10

KEPT = ", the others are finished and a rerun takes them over"
"""What a message says of the items that did not fail, where the function leaves its result in a file."""

Item = TypeVar("Item")
Record = TypeVar("Record")


def one_task_a_shard(dataset: ImageTextPairDataset, columns: Sequence[str]) -> ImageTextPairDataset:
    """Return a dataset whose rows of some columns are one task a shard, with nothing left to compute but cheap columns.

    What is pending of them is computed once, into files, first.

    Raises
    ------
    MissingColumnError
        If a column is not there.
    """
    names = _with_names(dataset, columns)
    dataset.require_columns(names)
    dataset = dataset.unify_schemas()
    if _is_to_compute(dataset, names):
        dataset = dataset.materialize()
    if shard_tasks(dataset.metadata[names]) is None:
        # Joined or repartitioned: gather the rows by shard in files first.
        dataset = dataset.materialize(always=True)
    return dataset


def tasks_of(dataset: ImageTextPairDataset, columns: Sequence[str]) -> ShardTasks:
    """Return a task a shard of what `one_task_a_shard` gave, which makes the frame of ``shard``, the id and columns."""
    tasks = shard_tasks(dataset.metadata[_with_names(dataset, columns)])
    assert tasks is not None
    return tasks


def _with_names(dataset: ImageTextPairDataset, columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([schema.SHARD, dataset.id_col, *columns]))


def _is_to_compute(dataset: ImageTextPairDataset, names: list[str]) -> bool:
    """Tell whether columns need more than reading files."""
    needed = column_functions(dataset.metadata[names].optimize(fuse=False))
    return any(not getattr(one.function, "only_reads", False) for one in needed)


def file_identities(dataset: ImageTextPairDataset) -> list[Any]:
    """Return what tells a dataset's tars and metadata from other versions of them."""
    shards = dataset.shards
    return run_all("look at tars", _BothIdentities(dataset.source), shards, len(shards))


class MetadataIdentity:
    """Tells a shard's Parquet file from other versions of it."""

    def __init__(self, source: DatasetSource) -> None:
        self.source = source

    def __call__(self, shard: str) -> Any:
        """Return the identity of a shard's file."""
        return metadata_identity(self.source.parquet_url(shard), self.source.storage_options)


class _BothIdentities(MetadataIdentity):
    def __call__(self, shard: str) -> Any:
        return tar_identity(self.source, shard), super().__call__(shard)


def run_each(
    label: str,
    function: Callable[[Item], Record],
    items: Iterable[Item],
    count: int,
    take: Callable[[int, Record], object],
    *,
    name_of: Callable[[Item], str] = str,
    rows_of: Callable[[Record], int] = lambda record: 0,
    rerun: str = "",
) -> None:
    """Run a function over all items, as tasks, and hand over each record as it comes; nothing else is kept.

    Parameters
    ----------
    label : str
        What is done, for progress and messages.
    count : int
        How many items there are.
    take : callable
        Called on the client with each item's number and record, in any order.
    name_of : callable, optional
        From an item to its name in messages.
    rows_of : callable, optional
        From a record to the rows that progress counts.
    rerun : str, optional
        What a failure's message says of the items that did not fail.

    Raises
    ------
    RunError
        After the other items are finished, if some failed: lists them with their causes.
    """
    failures: dict[str, str] = {}
    work = _Caught(function, f"nemo-image-{label.replace(' ', '-')}", name_of)
    with Progress(label, count, "tasks") as progress:
        for outcome in run_tasks(work, enumerate(items), on_error=work.failed, count=count):
            if outcome.failed is not None:
                failures[outcome.failed] = outcome.cause
            else:
                take(outcome.number, outcome.record)
                progress.advance(rows_of(outcome.record))
    if failures:
        causes = [f"{name}: {cause}" for name, cause in sorted(failures.items())[:FAILURES_NAMED]]
        raise RunError(f"{label}: {len(failures)} of {count} failed{rerun}. " + "; ".join(causes), failures)


def run_all(
    label: str,
    function: Callable[[Item], Record],
    items: Iterable[Item],
    count: int,
    name_of: Callable[[Item], str] = str,
    rows_of: Callable[[Record], int] = lambda record: 0,
    rerun: str = KEPT,
) -> list[Record]:
    """Run a function over all items, as tasks; return the records in the items' order.

    Parameters are those of `run_each`.

    Raises
    ------
    RunError
        After the other items are finished, if some failed: lists them with their causes.
    """
    found: dict[int, Record] = {}
    run_each(label, function, items, count, found.__setitem__, name_of=name_of, rows_of=rows_of, rerun=rerun)
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The record of an item; or, of one that failed, its name and the cause."""

    number: int
    record: Any = None
    failed: str | None = None
    cause: str = ""


class _Caught:
    """Calls a task's function; returns its failure instead of raising it."""

    def __init__(self, function: Callable[[Any], Any], task_name: str, name_of: Callable[[Any], str]) -> None:
        self.function = function
        self.task_name = task_name
        self.name_of = name_of

    def __call__(self, item: tuple[int, Any]) -> _Outcome:
        """Return the outcome for a numbered item."""
        number, wanted = item
        try:
            return _Outcome(number, self.function(wanted))
        except Exception as error:
            return self.failed(item, error)

    def failed(self, item: tuple[int, Any], error: BaseException) -> _Outcome:
        """Return the outcome for an item whose function failed, or whose worker died."""
        number, wanted = item
        return _Outcome(number, None, self.name_of(wanted), one_line(error))
