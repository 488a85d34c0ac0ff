"""Open a dataset of many shards, and filter it lazily."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def ours(folder: str) -> Any:
    """``from_webdataset``, a filter, and what would be one task a shard."""
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.datasets.partitions import shard_tasks

    def run() -> dict[str, Any]:
        dataset = ImageTextPairDataset.from_webdataset(folder)
        dataset.metadata = dataset.metadata[dataset.metadata["aesthetic_score"] > 5]
        tasks = shard_tasks(dataset.metadata)
        assert tasks is not None
        return {"count": len(tasks.shards)}

    return run


def read_parquet(folder: str) -> Any:
    """Dask's own reader of a folder of Parquet files, the same filter, optimized."""
    import dask.dataframe as dd

    def run() -> dict[str, Any]:
        frame = dd.read_parquet(folder)
        frame = frame[frame["aesthetic_score"] > 5]
        return {"count": len(os.listdir(folder)) // 2, "partitions": frame.optimize(fuse=True).npartitions}

    return run


def listing(folder: str) -> Any:
    """The names, and one footer."""
    import pyarrow.parquet as pq

    def run() -> dict[str, Any]:
        names = sorted(path for path in os.listdir(folder) if path.endswith(".parquet"))
        pq.read_schema(Path(folder) / names[0])
        return {"count": len(names)}

    return run
