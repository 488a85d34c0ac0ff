"""Frames that are no longer one partition a shard: their rows are gathered by shard through files.

Each partition writes one Parquet file below ``_nemo_image/`` with one row group a shard; the shard's task then reads
its row groups. As many files as partitions, whatever the number of shards.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.partitions import ShardTasks
from nemo_image.datasets.save_shard import SaveItem
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import FOLDER
from nemo_image.shards import files, parquet

PIECE_META = {"piece": "string", "shard": "string", "group": "int64"}


class GatheredRows:
    """A shard's rows, from the row groups that partitions wrote; calls like a partition's task."""

    row_by_row = False

    def __init__(self, pieces: Sequence[tuple[str, int]], storage_options: Mapping[str, Any]) -> None:
        self.pieces = list(pieces)
        self.storage_options = dict(storage_options)

    def __call__(self) -> pd.DataFrame:
        """Return the rows."""
        tables = [parquet.read_row_group(url, group, self.storage_options) for url, group in self.pieces]
        table = pa.concat_tables(tables)
        index = pd.RangeIndex(len(table))
        return pd.DataFrame(
            {name: backend.series_of(table[name].combine_chunks(), index) for name in table.column_names}, index=index
        )


class WritePiece:
    """Writes a partition's rows as one file, grouped by shard; returns one row for each group."""

    def __init__(self, root: str, fields: pa.Schema, storage_options: Mapping[str, Any]) -> None:
        self.root = root
        self.fields = fields
        self.storage_options = dict(storage_options)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Write `frame`; its name is new each time, so that a task run twice disturbs nothing."""
        url = files.join(self.root, f"{uuid.uuid4().hex}.parquet")
        groups = rows_by_shard(frame) if len(frame) else {}
        rows = [(url, shard, number) for number, shard in enumerate(groups)]
        if groups:
            tables = [backend.frame_to_table(frame.iloc[positions], self.fields) for positions in groups.values()]
            parquet.write_groups(url, tables, self.storage_options)
        made = pd.DataFrame(rows, columns=list(PIECE_META))
        return made.astype({name: schema.arrow_dtype(kind) for name, kind in PIECE_META.items()})

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("WritePiece", self.root, str(self.fields))


@contextmanager
def saved_items(
    frame: Any, tasks: ShardTasks | None, shards: Sequence[str], root: str, source: DatasetSource
) -> Iterator[Iterator[SaveItem]]:
    """Give one item a shard: its partition's task, or its gathered rows (whose files are removed at the end)."""
    if tasks is not None:
        yield _items_of_tasks(tasks, shards)
        return
    folder = files.join(root, FOLDER, f"pieces-{uuid.uuid4().hex}")
    try:
        pieces = _write_pieces(frame, folder, source)
        yield _items_of_pieces(pieces, shards, source)
    finally:
        fs, path = files.open_fs(folder, source.storage_options)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _items_of_tasks(tasks: ShardTasks, shards: Sequence[str]) -> Iterator[SaveItem]:
    for shard, task in tasks:
        yield SaveItem(shard, task)
    present = set(tasks.shards)
    for shard in shards:
        if shard not in present:
            yield SaveItem(shard, None)


def _items_of_pieces(
    pieces: Mapping[str, list[tuple[str, int]]], shards: Sequence[str], source: DatasetSource
) -> Iterator[SaveItem]:
    unknown = sorted(set(pieces) - set(shards))
    for shard in [*shards, *unknown]:
        rows = GatheredRows(pieces[shard], source.storage_options) if shard in pieces else None
        yield SaveItem(shard, rows)


def _write_pieces(frame: Any, folder: str, source: DatasetSource) -> dict[str, list[tuple[str, int]]]:
    fields = []
    for name in frame.columns:
        kind = pa.string() if name == schema.SHARD else backend.arrow_type_of(frame._meta[name])
        fields.append(pa.field(name, kind))
    meta = schema.empty_frame((name, schema.arrow_dtype(kind)) for name, kind in PIECE_META.items())
    work = WritePiece(folder, pa.schema(fields), source.storage_options)
    written = backend.in_pandas(frame).map_partitions(work, meta=meta).compute()
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for url, shard, group in written.itertuples(index=False):
        found[str(shard)].append((str(url), int(group)))
    return dict(found)
