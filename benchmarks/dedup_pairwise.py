"""Judging one cluster: time and memory against the full matrix, and one of 300,000 near-copies from disk.

    python -m benchmarks.dedup_pairwise --threads 2 --folder /some/disk

The reference is SemDeDup's (arXiv 2303.09540): all products at once, their upper triangle, its largest in each column.
Times are medians of interleaved rounds in one process. Memory is each job's peak RSS above what its process held
before, in a process of its own (Linux: ``VmHWM``, set back before the job).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from nemo_image.dedup.pairs.judge import judge
from nemo_image.dedup.pairs.vectors import DiskVectors, MemoryVectors

ROWS, SIZE = 20_000, 512
MANY, MANY_SIZE = 300_000, 256
THRESHOLD = 0.95
# Noise beside a vector of the same length: cosines near 1 - 1e-6, and near 0.92.
NOISE = {"all fall": 1e-3, "none falls": 0.3}


def cluster() -> np.ndarray:
    """Return a cluster of which some 30% are near-copies, as SemDeDup measured in LAION."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(1, SIZE)) + rng.normal(size=(ROWS, SIZE))).astype(np.float32)
    copies = np.flatnonzero(rng.random(ROWS) < 0.3)
    rows[copies] = rows[rng.integers(0, ROWS, len(copies))] + 0.05 * rng.normal(size=(len(copies), SIZE))
    return rows


def full_matrix(rows: np.ndarray) -> torch.Tensor:
    """Return each row's largest cosine to an earlier one, by the matrix of all."""
    vectors = torch.from_numpy(rows)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    products: torch.Tensor = units @ units.T
    return products.triu_(1).max(dim=0).values


def jobs(rows: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return what is compared."""
    vectors = MemoryVectors(rows)
    return {
        "full matrix": lambda: full_matrix(rows),
        "judge, chains": lambda: judge(vectors, [THRESHOLD], representative=False),
        "judge, representative": lambda: judge(vectors, [THRESHOLD], representative=True),
    }


def times(rounds: int) -> dict[str, float]:
    """Return the median time of each job, in seconds."""
    found: dict[str, list[float]] = {}
    work = jobs(cluster())
    for _ in range(rounds):
        for name, job in work.items():
            started = time.perf_counter()
            job()
            found.setdefault(name, []).append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in found.items()}


def resident(line: str) -> float:
    """Return a line of ``/proc/self/status``, in MiB."""
    status = dict(part.split(":", 1) for part in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) / 1024


def measured(job: Callable[[], object]) -> dict[str, float]:
    """Run a job; return its seconds, and its peak RSS above what there was, in MiB."""
    # What torch sets up once is no part of the job.
    full_matrix(np.ones((64, 64), np.float32))
    judge(MemoryVectors(np.eye(64, dtype=np.float32)), [THRESHOLD], representative=True)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    job()
    return {"seconds": time.perf_counter() - started, "extra": resident("VmHWM") - before, "peak": resident("VmHWM")}


def make_near_copies(path: Path, noise: float) -> None:
    """Write rows that are one vector and noise."""
    rng = np.random.default_rng(1)
    base = rng.normal(size=MANY_SIZE)
    with open(path, "wb") as file:
        for start in range(0, MANY, 10_000):
            rows = base + noise * rng.normal(size=(min(10_000, MANY - start), MANY_SIZE))
            file.write(rows.astype("<f4").tobytes())


def near_copies(path: Path, representative: bool) -> dict[str, float]:
    """Judge the file."""
    vectors = DiskVectors(path, 0, MANY, MANY_SIZE)
    fell = 0

    def job() -> None:
        nonlocal fell
        found = judge(vectors, [THRESHOLD], representative=representative)
        fell = int((found.similarity >= np.float32(THRESHOLD)).sum())

    return {**measured(job), "fell": fell}


def in_own_process(*arguments: str) -> dict[str, float]:
    """Run this module for one job."""
    command = [sys.executable, "-m", "benchmarks.dedup_pairwise", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def print_against_full_matrix(threads: str, rounds: int) -> None:
    """Print the first table."""
    found = in_own_process("--threads", threads, "--rounds", str(rounds), "--job", "times")
    names = list(found)
    extra = {name: in_own_process("--threads", threads, "--job", name)["extra"] for name in names}
    print(f"{ROWS:,} rows of {SIZE} numbers, {threads} threads, medians of {rounds} rounds\n")
    print("| job | seconds | times as fast | extra peak MiB | share of its extra |\n|---|---|---|---|---|")
    for name in names:
        print(
            f"| {name} | {found[name]:.2f} | {found[names[0]] / found[name]:.2f} "
            f"| {extra[name]:.0f} | {extra[name] / extra[names[0]]:.3f} |"
        )


def print_near_copies(threads: str, folder: Path | None) -> None:
    """Print the second table."""
    print(f"\n{MANY:,} near-copies of {MANY_SIZE} numbers from disk, threshold {THRESHOLD}, {threads} threads\n")
    print("| rows | compared with | fell | seconds | extra peak MiB | peak RSS MiB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "near_copies.f32"
        for case, noise in NOISE.items():
            make_near_copies(path, noise)
            for compared in ("kept", "all"):
                found = in_own_process("--threads", threads, "--job", compared, "--file", str(path))
                print(
                    f"| {case} | {compared} | {found['fell']:,.0f} | {found['seconds']:.1f} "
                    f"| {found['extra']:.0f} | {found['peak']:.0f} |",
                    flush=True,
                )


def main() -> None:
    """Measure, or do one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="for 300 MB of vectors; the system's temporary folder by default")
    parser.add_argument("--only", choices=["full-matrix", "near-copies"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.file:
        print(json.dumps(near_copies(args.file, args.job == "kept")))
    elif args.job == "times":
        print(json.dumps(times(args.rounds)))
    elif args.job:
        print(json.dumps(measured(jobs(cluster())[args.job])))
    else:
        if args.only != "near-copies":
            print_against_full_matrix(str(args.threads), args.rounds)
        if args.only != "full-matrix":
            print_near_copies(str(args.threads), args.folder)


if __name__ == "__main__":
    main()
