"""Seconds, peak memory and size of a report of a million rows, and of fewer.

    python -m benchmarks.report_rows --folder /some/disk

The dataset has real tars (a JPEG of 2 kB a row), captions, two scores, sizes, errors, copies, clusters, and embeddings
of 64 numbers. Each report is made by a process of its own, whose peak RSS is what the kernel says (``ru_maxrss``);
the child process that decodes takes about half a GiB more for some seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_SHARD = 10_000
WORDS = np.array(
    ["a", "the", "of", "on", "photo", "picture", "house", "tree", "dog", "cat", "red", "blue", "green", "large"]
)


def make(folder: Path, rows: int) -> None:
    """Write the dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [(folder, number, min(ROWS_A_SHARD, rows)) for number in range(max(1, rows // ROWS_A_SHARD))]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_make_shard, shards))


def _make_shard(item: tuple[Path, int, int]) -> None:
    folder, number, rows = item
    name = f"{number:05d}"
    random = np.random.default_rng(number)
    keys = np.char.add(name, np.char.zfill(np.arange(rows).astype(str), 5))
    picture = _picture(number)
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for key in keys.tolist():
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    copy = random.random(rows) < 0.3
    copy[0] = False
    vectors = random.normal(size=rows * 64).astype(np.float32)
    columns: dict[str, Any] = {
        "key": keys,
        "caption": [" ".join(some) for some in random.choice(WORDS, (rows, 8))],
        "aesthetic_score": random.normal(5, 1, rows).astype(np.float32),
        "nsfw_score": random.beta(0.5, 5, rows).astype(np.float32),
        "width": random.integers(64, 4000, rows).astype(np.int32),
        "height": random.integers(64, 4000, rows).astype(np.int32),
        "image_error": np.where(random.random(rows) < 0.01, "truncated: ends at byte 7", None),
        "cluster": random.integers(0, 1000, rows).astype(np.int32),
        "is_duplicate": copy,
        "duplicate_of": np.where(copy, keys[np.maximum(0, np.arange(rows) // 2)], None),
        "duplicate_of_shard": np.where(copy, name, None),
        "duplicate_tier": np.where(copy, "semantic", None),
        "max_similarity": random.random(rows).astype(np.float32),
        "image_embedding": pa.ListArray.from_arrays(pa.array(np.arange(0, rows * 64 + 1, 64, np.int32)), vectors),
    }
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def _picture(seed: int) -> bytes:
    from PIL import Image

    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return out.getvalue()


def measure(folder: Path) -> None:
    """Write a report in this process, and print what it took."""
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.reports import write_report

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, started = time.process_time(), time.perf_counter()
    done = write_report(ImageTextPairDataset.from_webdataset(folder), folder.parent / f"{folder.name}.html")
    print(
        json.dumps(
            {
                "rows": done.rows,
                "seconds": round(time.perf_counter() - started, 1),
                "processor seconds": round(time.process_time() - cpu, 1),
                "MiB before": before // 1024,
                "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "file MB": round(done.bytes / 1e6, 2),
                "pictures": done.pictures,
            }
        )
    )


def main() -> None:
    """Make what is missing, and measure each size in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        measure(given.measure)
        return
    found: dict[int, list[dict[str, Any]]] = {rows: [] for rows in given.rows}
    for rows in given.rows:
        if not (given.folder / f"rows-{rows}").is_dir():
            make(given.folder / f"rows-{rows}", rows)
    for _ in range(given.rounds):
        for rows in given.rows:
            command = [sys.executable, "-m", "benchmarks.report_rows", "--folder", str(given.folder), "--measure"]
            done = subprocess.run(
                [*command, str(given.folder / f"rows-{rows}")], stdout=subprocess.PIPE, check=True, text=True
            )
            found[rows].append(json.loads(done.stdout))
    names = list(found[given.rows[0]][0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for rounds in found.values():
        print(f"| {' | '.join(f'{np.median([one[name] for one in rounds]):,.10g}' for name in names)} |")


if __name__ == "__main__":
    main()
