"""Seconds and peak memory of each step over the metadata of many shards: ten million rows in 10,000 by default.

    python -m benchmarks.many_shards --folder /some/disk

The tars hold nothing, because no step reads an image. Scheduler, workers and client are processes of their own; each
step has a new client, whose peak RSS is what the kernel says (``ru_maxrss``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_image.datasets import opening, save
from nemo_image.datasets.partitions import shard_tasks
from nemo_image.datasets.save_shard import SaveItem, SaveShard
from nemo_image.datasets.state import DatasetState
from nemo_image.engine.ledger import ShardRecord

SIZE = 64
WORDS = ["a", "the", "of", "on", "photo", "picture", "house", "tree", "dog", "cat", "red", "blue", "green", "large"]
GROUP = 500
"""Shards that one task of `make` writes."""


def make(folder: Path, shards: int, rows: int, size: int = SIZE) -> None:
    """Write the dataset: a realistic schema, embeddings of `size` random numbers, tars that hold nothing."""
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    groups = [(unfinished, range(first, min(first + GROUP, shards)), rows, size) for first in range(0, shards, GROUP)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make_some, groups))
    unfinished.rename(folder)


def _make_some(group: tuple[Path, range, int, int]) -> None:
    folder, numbers, rows, size = group
    random = np.random.default_rng(numbers.start)
    for number in numbers:
        name = f"{number:06d}"
        words = random.choice(WORDS, (rows, 8)).tolist()
        vectors = random.normal(size=(rows, size)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        table = pa.table(
            {
                "key": [f"{name}{row:06d}" for row in range(rows)],
                "caption": [" ".join(some) for some in words],
                "url": [f"https://images.example/{name}/{row}-{some[0]}.jpg" for row, some in enumerate(words)],
                "width": random.integers(200, 2000, rows, np.int32),
                "height": random.integers(200, 2000, rows, np.int32),
                "aesthetic_score": random.normal(5, 1, rows).astype(np.float32),
                "image_embedding": pa.ListArray.from_arrays(
                    np.arange(0, (rows + 1) * size, size, dtype=np.int32), vectors.ravel()
                ),
            }
        )
        pq.write_table(table, folder / f"{name}.parquet")
        (folder / f"{name}.tar").write_bytes(bytes(1024))


class FirstNumber:
    """Stands for a classifier: a score from the embedding, with next to no arithmetic."""

    row_by_row = True

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the first number of each embedding."""
        from nemo_image import backend

        vectors, _ = backend.to_matrix(frame["image_embedding"])
        return pd.DataFrame({"first_number": pd.Series(vectors[:, 0], frame.index).astype("float[pyarrow]")})

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return ("FirstNumber",)


def opened(folder: Path) -> Any:
    """Open the dataset."""
    from nemo_image.datasets import ImageTextPairDataset

    return ImageTextPairDataset.from_webdataset(folder)


def scored(folder: Path, shards: list[str] | None = None) -> Any:
    """Return the dataset with a score to compute; `shards` claims that it has other shards."""
    dataset = opened(folder)
    if shards is not None:
        dataset = type(dataset)._of(DatasetState.of(opening.Opened(dataset.source, shards, {})))
    return dataset.map_columns(
        FirstNumber(),
        inputs=["image_embedding"],
        outputs={"first_number": pd.ArrowDtype(pa.float32())},
        fingerprints={"first_number": {"by": "benchmark"}},
    )


def filtered(folder: Path) -> Any:
    """Return the dataset's rows of a high score."""
    dataset = opened(folder)
    dataset.metadata = dataset.metadata[dataset.metadata["aesthetic_score"] > 5]
    return dataset


class NoWork(SaveShard):
    """A save's task without its work: returns a record like a real one's."""

    def __call__(self, item: SaveItem) -> ShardRecord:
        """Return the record."""
        return ShardRecord(item.shard, rows_in=1000, rows_out=1000, results={"first_number": 1000}, seconds=0.01)


def no_work(folder: Path, count: int) -> int:
    """Run `count` tasks without work, as a save of a scored dataset runs them; return the number of records."""
    state = scored(folder, [f"{number:06d}" for number in range(count)]).state
    saved = save._columns_to_save(state, "elsewhere", None)
    frame = state.frame[["shard", "key", *(field.name for field in saved.fields)]]
    items = (SaveItem(shard, rows) for shard, rows in shard_tasks(frame) or ())
    work = NoWork(state.source, "elsewhere", saved, True)
    return len(save.run_shards("benchmark", work, items, count, 0.0, "elsewhere", state.source))


def count_of(folder: Path, out: Path) -> int:
    """Count rows from the footers."""
    return len(opened(folder))


def filter_only(folder: Path, out: Path) -> int:
    """Assign a filter; nothing is read."""
    return int(filtered(folder).metadata.npartitions)


def filter_count(folder: Path, out: Path) -> int:
    """Count the rows that pass the filter."""
    return len(filtered(folder))


def in_place(folder: Path, out: Path) -> Any:
    """Add a score to the dataset's own files."""
    return scored(folder).save_metadata().run_totals["shards"]


def other_folder(folder: Path, out: Path) -> Any:
    """Write the rows that pass the filter, with all columns, to another folder."""
    return filtered(folder).save_metadata(out).run_totals["shards"]


def half(folder: Path, out: Path) -> Any:
    """Write every second shard, as a run that was stopped half-way leaves it."""
    return filtered(folder).save_metadata(out, part=(1, 2)).run_totals["shards"]


STEPS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "open": ("`from_webdataset`", lambda folder, out: len(opened(folder).shards)),
    "count": ("`len`, from the footers", count_of),
    "filter": ("open, assign a filter", filter_only),
    "filter-count": ("`len` of the filtered dataset", filter_count),
    "in-place": ("`save_metadata()`, a new score from the embeddings", in_place),
    "in-place-again": ("the same again, nothing left to do", in_place),
    "half": ("`save_metadata(folder)` of the filtered rows, stopped half-way", half),
    "resumed": ("the same, the other half", other_folder),
    "nothing": ("the same again, nothing left to do", other_folder),
}


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, int]]:
    """Start a scheduler and workers of one thread; yield the scheduler's file and process id."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    started = [_dask("scheduler", "--port", "0", "--no-dashboard", file=file)]
    while not file.exists():
        time.sleep(0.1)
    options = ("--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(folder))
    started += [_dask("worker", *options, file=file) for _ in range(workers)]
    try:
        yield str(file), started[0].pid
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def _dask(kind: str, *options: str, file: Path) -> subprocess.Popen[bytes]:
    program = "import sys; from dask.__main__ import main; sys.argv[0] = 'dask'; main()"
    command = [sys.executable, "-c", program, kind, *options, "--scheduler-file", str(file)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def peak_mib(pid: int) -> int:
    """Return the peak RSS of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024)


def run_step(step: str, folder: Path, out: Path, scheduler_file: str) -> None:
    """Do one step in this process and print what it took."""
    from nemo_image import get_client

    with get_client(scheduler_file=scheduler_file):
        opened(folder).head(1)  # libraries are loaded here and in a worker
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        processor = time.process_time()
        started = time.monotonic()
        answer = STEPS[step][1](folder, out)
        seconds = time.monotonic() - started
        processor = time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"seconds": seconds, "client_cpu_seconds": processor, "mib_before": before // 1024, "mib": peak // 1024}
    print(json.dumps({"answer": answer, **{name: round(value, 2) for name, value in found.items()}}))


def main() -> None:
    """Measure all steps, or do one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1000, help="rows a shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--step", choices=STEPS, help="do one step on a running cluster")
    parser.add_argument("--scheduler-file")
    args = parser.parse_args()
    data, out = args.folder / f"in-{args.shards}x{args.rows}", args.folder / f"out-{args.shards}x{args.rows}"
    if args.step:
        run_step(args.step, data, out, args.scheduler_file)
        return
    if not data.exists():
        make(data, args.shards, args.rows)
    if "half" in args.steps:
        shutil.rmtree(out, ignore_errors=True)
    print(
        "| step | seconds | client's processor seconds | client MiB before | peak | scheduler's peak MiB |\n|"
        + "---|" * 6
    )
    for step in args.steps:
        with cluster(args.folder, args.workers) as (file, scheduler):
            command = [sys.executable, "-m", "benchmarks.many_shards", *sys.argv[1:], "--step", step]
            done = subprocess.run(
                [*command, "--scheduler-file", file], stdout=subprocess.PIPE, check=True, env=os.environ
            )
            found = json.loads(done.stdout.splitlines()[-1])
            cells = [
                found["seconds"],
                found["client_cpu_seconds"],
                found["mib_before"],
                found["mib"],
                peak_mib(scheduler),
            ]
            print(f"| {STEPS[step][0]} ({found['answer']}) | " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
