"""One callable a shard: the fused tasks of a frame whose partitions are the dataset's shards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import cloudpickle

from nemo_image import backend, schema
from nemo_image.datasets.load import HERE, ShardLoader, loading
from nemo_image.engine.run import Shared, run_tasks, unpickled


class PartitionTask:
    """Computes one partition of a Dask frame, on whatever process it is sent to.

    Opaque to Dask on purpose: a bare graph node among a task's arguments would be run by Dask itself, and its
    failure would be Dask's too.
    """

    def __init__(self, tasks: ShardTasks, number: int) -> None:
        self._tasks = tasks
        self._number = number
        self.row_by_row = tasks.row_by_row

    def __call__(self) -> Any:
        """Return the partition."""
        return self._tasks.task(self._number)({})

    def __reduce__(self) -> tuple[Any, ...]:
        pattern = self._tasks.pattern
        if pattern is not None:
            return _PatternTask, (pattern, self._tasks.shards[self._number], self.row_by_row)
        return _PickledTask, (cloudpickle.dumps(self._tasks.task(self._number)), self.row_by_row)


class _PatternTask:
    """A partition's task that has come from another process, as the pattern of all of them and its shard."""

    def __init__(self, pattern: bytes, shard: str, row_by_row: bool) -> None:
        self._pattern = pattern
        self._shard = shard
        self.row_by_row = row_by_row

    def __call__(self) -> Any:
        with loading(self._shard):
            return _unpickled(self._pattern)({})


class _PickledTask:
    """A partition's task that has come from another process, by itself."""

    def __init__(self, task: bytes, row_by_row: bool) -> None:
        self._task = task
        self.row_by_row = row_by_row

    def __call__(self) -> Any:
        return unpickled(self._task)({})


@functools.lru_cache(maxsize=4)
def _unpickled(pattern: bytes) -> Any:
    """Return a pattern's task. All tasks of a process share it, as the threads of one process share a task's parts."""
    return unpickled(pattern)


class ShardTasks:
    """The partitions of a frame that are one shard each.

    Attributes
    ----------
    shards : list of str
        The shard of each partition; shards whose partitions the user left out are not among them.
    row_by_row : bool
        Whether each row of a partition depends on no other, so that it can be computed in pieces.
    """

    def __init__(self, expression: Any, shards: list[str], row_by_row: bool) -> None:
        self._expression = expression
        self.shards = shards
        self.row_by_row = row_by_row

    def __iter__(self) -> Iterator[tuple[str, PartitionTask]]:
        for number, shard in enumerate(self.shards):
            yield shard, PartitionTask(self, number)

    def task(self, number: int) -> Any:
        """Return the Dask task of a partition."""
        return self._expression._task(("nemo-image-partition", number), number)

    @functools.cached_property
    def pattern(self) -> Shared | None:
        """The task of all partitions, pickled, in which :data:`HERE` stands for the shard; None if they differ in more.

        Making and pickling each partition's own task would take most of the client's time.
        """
        from dask._task_spec import Task

        parts = _parts(self._expression)
        if not all(_is_loader(part) or _is_alike(part) for part in parts):
            return None
        tasks = []
        for part in parts:
            key = (part._name, 0)
            tasks.append(_loader_task(part, key) if _is_loader(part) else part._task(key, 0))
        whole = Task.fuse(*tasks, key="nemo-image-partition") if len(tasks) > 1 else tasks[0]
        return Shared(cloudpickle.dumps(whole))


def shard_tasks(frame: Any) -> ShardTasks | None:
    """Return a frame's partitions as tasks of one shard each, or None where it is no longer one partition a shard.

    The tasks give frames of pandas, whatever the frame's own kind.

    A frame qualifies if Dask fuses all of it into one operation over our own loader: filters, new columns,
    ``map_partitions`` do; joins that shuffle, ``repartition``, ``persist`` and aggregates do not.
    """
    expression = backend.in_pandas(frame).optimize(fuse=True).expr
    if expression.dependencies():
        return None
    parts = _parts(expression)
    loaders = [part for part in parts if _is_loader(part)]
    leaves = {(tuple(part.iterables[0]), tuple(part._partitions or range(len(part.iterables[0])))) for part in loaders}
    if len(leaves) != 1 or any(_is_other_source(part) for part in parts):
        return None
    names, partitions = leaves.pop()
    if len(partitions) != expression.npartitions:
        return None
    return ShardTasks(expression, [names[number] for number in partitions], all(map(_is_row_by_row, parts)))


def count_rows(frame: Any) -> int:
    """Count a frame's rows, with one task a shard where it has one partition a shard.

    Only the columns that the frame's own filters need are read; Dask's ``len`` of a filtered frame reads all of them.
    """
    frame = frame[[schema.SHARD]]
    tasks = shard_tasks(frame)
    if tasks is None:
        return len(frame)
    partitions = (rows for _, rows in tasks)
    return sum(run_tasks(_Length(), partitions, on_error=_raise, count=len(tasks.shards)))


class _Length:
    """Counts the rows of a partition."""

    task_name = "nemo-image-count"

    def __call__(self, rows: PartitionTask) -> int:
        return len(rows())


def _raise(rows: PartitionTask, error: BaseException) -> int:
    raise error


def _is_row_by_row(part: Any) -> bool:
    """Tell whether a part of the expression makes each row from that row alone: what is not known to do so does not."""
    from dask.dataframe.dask_expr import _expr as known

    if isinstance(part, known.MapPartitions):
        return bool(getattr(part.func, "row_by_row", False))
    if _is_loader(part):
        return True
    if isinstance(part, known.ResetIndex | known.Eval):
        return False  # counts from the partition's first row; may use a column's mean
    return isinstance(part, known.Elemwise | known.Filter | known.DropnaFrame | known.DropnaSeries)


def _is_other_source(part: Any) -> bool:
    """Tell whether a part of the expression brings rows from elsewhere than our loader."""
    from dask.dataframe.dask_expr.io import BlockwiseIO

    return isinstance(part, BlockwiseIO) and not _is_loader(part)


def _parts(expression: Any) -> list[Any]:
    """Return what an expression was fused from."""
    return getattr(expression, "exprs", None) or [expression]


def _is_loader(part: Any) -> bool:
    return isinstance(getattr(part, "func", None), ShardLoader)


def _loader_task(part: Any, key: Any) -> Any:
    """Return a loader's task with `HERE` in the place of its shard."""
    anywhere = part.substitute_parameters({"iterables": [[HERE]], "_partitions": None})
    return anywhere._filtered_task(key, 0)


def _is_alike(part: Any) -> bool:
    """Tell whether a part's tasks differ in nothing but their keys: not so a sample's, which have a seed each."""
    from dask.dataframe.dask_expr import _expr as known

    if isinstance(part, known.MapPartitions) and part._has_partition_info:
        return False  # the user's function asks for the partition's number
    return type(part)._task in (known.Blockwise._task, known.MapPartitions._task)
