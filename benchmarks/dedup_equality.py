"""Semantic deduplication against brute force, for every order, number of partitions and number of workers.

    python -m benchmarks.dedup_equality --rows 5000

Rows: random unit vectors, vectors around centres, near copies, exact copies and scaled copies. The brute force is
``tests/dedup/oracle.py`` (numpy, float64, one row after the other; it shares no code with the product). Every column of
every row must be equal; the first difference ends the run.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nemo_image import get_client
from nemo_image.dedup import SemanticDedup
from nemo_image.dedup.exchange.rows import row_hashes
from tests.dedup.makers import clustered_vectors, computed, write_embeddings
from tests.dedup.oracle import expected, wrong_clusters

ORDERS: list[Any] = ["hard", "easy", "random", ("score", False), ("score", True)]
EPS = 0.085
SEED = 1234


def rank(seed: int, shard: str, name: Any) -> int:
    return int(row_hashes([shard], [name], seed)[0])


def check(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Raise if a row differs."""
    for name in ("is_duplicate", "max_similarity"):
        ours = found[name].to_numpy(wanted[name].dtype)
        np.testing.assert_array_equal(ours, wanted[name].to_numpy(), err_msg=name)
    for name in ("duplicate_of", "duplicate_of_shard"):
        ours = [None if pd.isna(value) else value for value in found[name]]
        assert ours == wanted[name].tolist(), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=6)
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 3, 8, 16])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rng = np.random.default_rng(0)
    half = arguments.rows // 2
    vectors = np.concatenate(
        [
            rng.normal(size=(arguments.rows - half, arguments.size)).astype(np.float32),
            clustered_vectors(half, arguments.size, half // 20, 0.3, seed=1),
        ]
    )[rng.permutation(arguments.rows)]
    scores = rng.integers(0, 20, arguments.rows).astype(float)
    print(f"{arguments.rows:,} rows of {arguments.size}, {arguments.clusters} clusters, eps {EPS}")
    print("| order | representative | removed | equal for partitions × workers |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset = write_embeddings(root / "data", list(vectors), 16, score=scores.tolist())
        loaded = dataset.metadata
        wanted: dict[Any, pd.DataFrame] = {}
        equal: dict[Any, list[str]] = {}
        started = time.monotonic()
        for workers in (0, 1, 2):
            client = get_client("cpu", n_workers=workers, threads_per_worker=1) if workers else None
            for order, representative in itertools.product(ORDERS, (True, False)):
                case = (str(order), representative)
                for partitions in arguments.partitions:
                    dataset.metadata = loaded if partitions == 16 else loaded.repartition(npartitions=partitions)
                    dedup = SemanticDedup(
                        n_clusters=arguments.clusters,
                        eps=EPS,
                        which_to_keep=order,
                        representative=representative,
                        batch_size=[64, 1024, 4096][workers],
                        output_dir=root / f"out-{len(equal)}-{case}-{partitions}-{workers}",
                    )
                    found = computed(dedup(dataset))
                    if case not in wanted:
                        rows = found.rename(columns={"key": "id", "image_embedding": "embedding"})
                        assert dedup.result_ is not None
                        centroids = np.load(Path(dedup.result_.folder) / "kmeans_centroids.npy")
                        assert wrong_clusters(rows, centroids) == {}
                        wanted[case] = expected(rows, EPS, order, representative, SEED, rank)
                    check(found, wanted[case])
                    where = f"{partitions} × {workers}" if workers else str(partitions)
                    equal.setdefault(case, []).append(where)
            if client is not None:
                client.close()
        for case, cases in equal.items():
            removed = int(wanted[case]["is_duplicate"].sum())
            print(f"| {case[0]} | {case[1]} | {removed} | {', '.join(cases)} |")
        runs = sum(map(len, equal.values()))
        print(f"\n{runs} runs, all equal to brute force in every row; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
