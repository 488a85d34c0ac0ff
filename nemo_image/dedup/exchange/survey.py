"""Count the rows to deduplicate, and check their ids, before anything large is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.load import require_unique
from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.passes import run_all
from nemo_image.datasets.row_windows import frames
from nemo_image.datasets.source import DatasetSource
from nemo_image.dedup.exchange.work import Work
from nemo_image.errors import IdMismatchError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardCount:
    """Rows of a shard: all, and those to judge."""

    shard: str
    rows: int
    judged: int


def passed_by(frame: pd.DataFrame) -> Mask:
    """Tell which rows enter as duplicates: those are passed by."""
    if schema.IS_DUPLICATE not in frame:
        return np.zeros(len(frame), bool)
    return np.asarray(frame[schema.IS_DUPLICATE].fillna(False).to_numpy(dtype=bool))


def has_error(frame: pd.DataFrame) -> Mask:
    """Tell which rows have a reason in ``image_error``."""
    if schema.IMAGE_ERROR not in frame:
        return np.zeros(len(frame), bool)
    return np.asarray(frame[schema.IMAGE_ERROR].notna().to_numpy(dtype=bool))


def state_columns(columns: Sequence[str]) -> list[str]:
    """Return those of a dataset's columns that say which rows are to judge."""
    return [name for name in (schema.IS_DUPLICATE, schema.IMAGE_ERROR) if name in columns]


class CountRows:
    """Counts a shard's rows."""

    def __init__(self, source: DatasetSource, id_column: str) -> None:
        self.source = source
        self.id_column = id_column

    def __call__(self, item: tuple[str, PartitionTask]) -> ShardCount:
        """Count one shard."""
        shard, task = item
        rows = judged = 0
        ids: list[Any] = []
        for frame in frames(self.source, shard, task):
            ids.append(backend.arrow_values(frame[self.id_column]))
            rows += len(frame)
            judged += int((~(passed_by(frame) | has_error(frame))).sum())
        self._check(pa.chunked_array(ids), shard)
        return ShardCount(shard, rows, judged)

    def _check(self, ids: pa.ChunkedArray, shard: str) -> None:
        where = f"shard {shard}, column {self.id_column!r}"
        if ids.null_count:
            raise IdMismatchError(f"{where}: {ids.null_count} rows have no id, so that nobody could name them")
        if pa.types.is_dictionary(ids.type):
            ids = ids.cast(ids.type.value_type)
        require_unique(ids, where)


def count_rows(work: Work, id_column: str) -> list[ShardCount]:
    """Count the rows of each shard.

    Raises
    ------
    RunError
        Naming the shards that cannot be read, or in which an id is missing or stands more than once.
    """
    names = list(dict.fromkeys([id_column, *state_columns(work.columns)]))
    tasks = work.tasks(names)
    counting = CountRows(work.source, id_column)
    return run_all(
        "count rows", counting, tasks, len(tasks.shards), name_of=lambda item: item[0], rows_of=lambda one: one.rows
    )
