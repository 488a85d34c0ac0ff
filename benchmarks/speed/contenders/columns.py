"""Count the rows that pass a filter: by the one column that it needs, or with all columns read."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any


def _bytes_read() -> int:
    """Return the bytes that this process has read so far (Linux), 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def ours(folder: str, rows: int, columns: list[str] | None) -> Any:
    """Filter by a score; `columns` are computed of the rows that pass, None means only their number."""
    from nemo_image.datasets import ImageTextPairDataset

    def run() -> dict[str, Any]:
        before = _bytes_read()
        dataset = ImageTextPairDataset.from_webdataset(folder)
        dataset.metadata = dataset.metadata[dataset.metadata["aesthetic_score"] > 5]
        passed = len(dataset) if columns is None else len(dataset.metadata[columns].compute())
        return {"count": rows, "passed": passed, "mib_read": round((_bytes_read() - before) / 2**20, 1)}

    return run


def column_alone(folder: str, rows: int) -> Any:
    """pyarrow on the one column."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def run() -> dict[str, Any]:
        before = _bytes_read()
        passed = 0
        for path in sorted(glob.glob(f"{folder}/*.parquet")):
            with pq.ParquetFile(path) as file:
                column = file.read(["aesthetic_score"])["aesthetic_score"]
            passed += pc.sum(pc.greater(column, 5)).as_py()
        return {"count": rows, "passed": passed, "mib_read": round((_bytes_read() - before) / 2**20, 1)}

    return run
