"""One callable a shard: the fused tasks of a frame whose partitions are the dataset's shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cloudpickle

from nemo_image.datasets.load import ShardLoader


class PartitionTask:
    """Computes one partition of a Dask frame, on whatever process it is sent to.

    Opaque to Dask on purpose: a bare graph node among a task's arguments would be run by Dask itself, and its
    failure would be Dask's too.
    """

    def __init__(self, task: Any, row_by_row: bool = False) -> None:
        self._task = task
        self.row_by_row = row_by_row

    def __call__(self) -> Any:
        """Return the partition."""
        return self._task({})

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_task, (cloudpickle.dumps(self._task), self.row_by_row)


def _unpickle_task(data: bytes, row_by_row: bool) -> PartitionTask:
    return PartitionTask(cloudpickle.loads(data), row_by_row)


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
            yield (
                shard,
                PartitionTask(self._expression._task(("nemo-image-partition", number), number), self.row_by_row),
            )


def shard_tasks(frame: Any) -> ShardTasks | None:
    """Return a frame's partitions as tasks of one shard each, or None where it is no longer one partition a shard.

    A frame qualifies if Dask fuses all of it into one operation over our own loader: filters, new columns,
    ``map_partitions`` do; joins that shuffle, ``repartition``, ``persist`` and aggregates do not.
    """
    expression = frame.optimize(fuse=True).expr
    if expression.dependencies():
        return None
    parts = getattr(expression, "exprs", None) or [expression]
    loaders = [part for part in parts if isinstance(getattr(part, "func", None), ShardLoader)]
    leaves = {(tuple(part.iterables[0]), tuple(part._partitions or range(len(part.iterables[0])))) for part in loaders}
    if len(leaves) != 1 or any(_is_other_source(part) for part in parts):
        return None
    names, partitions = leaves.pop()
    if len(partitions) != expression.npartitions:
        return None
    return ShardTasks(expression, [names[number] for number in partitions], all(map(_is_row_by_row, parts)))


def _is_row_by_row(part: Any) -> bool:
    """Tell whether a part of the expression makes each row from that row alone: what is not known to do so does not."""
    from dask.dataframe.dask_expr import _expr as known

    if isinstance(part, known.MapPartitions):
        return bool(getattr(part.func, "row_by_row", False))
    if isinstance(getattr(part, "func", None), ShardLoader):
        return True
    if isinstance(part, known.ResetIndex | known.Eval):
        return False  # counts from the partition's first row; may use a column's mean
    return isinstance(part, known.Elemwise | known.Filter | known.DropnaFrame | known.DropnaSeries)


def _is_other_source(part: Any) -> bool:
    """Tell whether a part of the expression brings rows from elsewhere than our loader."""
    from dask.dataframe.dask_expr.io import BlockwiseIO

    return isinstance(part, BlockwiseIO) and not isinstance(getattr(part, "func", None), ShardLoader)
