"""Semantic deduplication end to end: time and peak memory as the number of rows grows.

    python -m benchmarks.dedup_rows --rows 200000 500000 1000000 2000000 --size 256 --folder /some/disk

Made-up embeddings: unit vectors around centres (one for each 500 rows), a third of them near copies of others (cosine
above 0.995). With ``--near-copies`` all rows are near copies of one vector, in one cluster: all fall at eps 0.01, none
at 1e-4. Each run is a process of its own; peak RSS is its ``ru_maxrss``, or with ``--workers`` the sum of all
processes'.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_SHARD = 10_000
COPIES = 0.33


def write_dataset(folder: Path, rows: int, size: int, near_copies: bool) -> None:
    """Write shards of embeddings, with tars that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(0).normal(size=(max(1, rows // 500), size)).astype(np.float32)
    for number, first in enumerate(range(0, rows, ROWS_A_SHARD)):
        count = min(ROWS_A_SHARD, rows - first)
        rng = np.random.default_rng(number + 1)
        vectors = centres[rng.integers(0, len(centres), count)] + 0.8 * rng.normal(size=(count, size)).astype(
            np.float32
        )
        if near_copies:
            vectors = centres[:1] / np.linalg.norm(centres[0]) + 1e-3 * rng.normal(size=(count, size))
        copies = rng.choice(count, int(COPIES * count), replace=False)
        originals = rng.integers(0, count, len(copies))
        if not near_copies:
            vectors[copies] = vectors[originals] + 0.05 * rng.normal(size=(len(copies), size))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        column = pa.ListArray.from_arrays(
            pa.array(np.arange(0, count * size + 1, size, dtype=np.int32)),
            pa.array(vectors.astype(np.float32).reshape(-1)),
        )
        keys = [f"{number:05d}{row:05d}" for row in range(count)]
        pq.write_table(pa.table({"key": keys, "image_embedding": column}), folder / f"{number:05d}.parquet")
        with tarfile.open(folder / f"{number:05d}.tar", "w"):
            pass


class Stages(logging.Handler):
    """Notes when each stage of the run was done."""

    def __init__(self) -> None:
        super().__init__()
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        label = record.getMessage().partition(":")[0]
        self.seconds[label] = time.monotonic() - self.started


def deduplicate(folder: str, workers: int, eps: float, n_clusters: int | None) -> dict[str, Any]:
    """Run it in this process; return figures."""
    from nemo_image import get_client
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.dedup import SemanticDedup

    stages = Stages()
    logger = logging.getLogger("nemo_image")
    logger.setLevel(logging.INFO)
    logger.addHandler(stages)
    client = get_client("cpu", n_workers=workers) if workers else None
    dedup = SemanticDedup(eps=eps, n_clusters=n_clusters)
    started = time.monotonic()
    dedup(ImageTextPairDataset.from_webdataset(folder))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if client is not None:
        peak += sum(client.run(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).values())
        client.close()
    result = dedup.result_
    assert result is not None
    assert result.missed is not None
    return {
        "rows": result.rows,
        "clusters": result.n_clusters,
        "seconds": seconds,
        "peak_mib": peak / 1024,
        "removed": result.removed,
        "pair_recall": result.missed.pair_recall,
        "stages": stages.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 500_000, 1_000_000, 2_000_000])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument("--near-copies", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(
            json.dumps(
                deduplicate(arguments.child, arguments.workers, arguments.eps, 1 if arguments.near_copies else None)
            )
        )
        return
    print("| rows | clusters | seconds | rows/s | peak RSS, MiB | removed | pair recall | done after, s |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in arguments.rows:
        folder = arguments.folder / f"{rows}x{arguments.size}{'-copies' if arguments.near_copies else ''}"
        if not folder.exists():
            write_dataset(folder, rows, arguments.size, arguments.near_copies)
        command = [sys.executable, "-m", "benchmarks.dedup_rows", "--folder", str(folder), "--child", str(folder)]
        command += ["--workers", str(arguments.workers), "--eps", str(arguments.eps)]
        command += ["--near-copies"] if arguments.near_copies else []
        subprocess.run(["rm", "-rf", str(folder / "_nemo_image")], check=True)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ)
        found = json.loads(done.stdout.splitlines()[-1])
        stages = ", ".join(f"{name} {value:.0f}" for name, value in found["stages"].items() if value >= 1)
        speed = found["rows"] / found["seconds"]
        print(
            f"| {found['rows']:,} | {found['clusters']} | {found['seconds']:.1f} | {speed:,.0f} "
            f"| {found['peak_mib']:,.0f} | {found['removed']:,} | {found['pair_recall'] or 0:.3f} | {stages} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
