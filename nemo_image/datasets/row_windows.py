"""A shard's rows in windows: what a pass over all rows holds at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from nemo_image.datasets.load import read_rows
from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.shard_pass import ShardPass
from nemo_image.datasets.source import DatasetSource
from nemo_image.shards import parquet


def frames(source: DatasetSource, shard: str, rows: PartitionTask) -> Iterator[pd.DataFrame]:
    """Yield a shard's rows, window by window where that gives the same rows."""
    with ShardPass(source, shard) as under_way:
        summary = parquet.summary_or_none(source.parquet_url(shard), source.storage_options)
        ids = None if summary is None else read_rows(source, shard, [source.id_col])[source.id_col].combine_chunks()
        for _ in under_way.windows(ids, rows.row_by_row):
            yield rows()
