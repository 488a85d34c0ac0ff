"""k-means on the CPU: time and inertia against scikit-learn and faiss, from the same start.

    python -m benchmarks.dedup_kmeans --threads 2

Each library does the same number of Lloyd iterations on the same rows from the same k-means++ start. One run of each
after the other, several times: the figures are medians, and the ratio is that of runs side by side. Inertia is
computed here in float64 from each one's centroids. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from nemo_image.dedup.clusters.kmeans import START_ROWS, kmeans_start, lloyd
from nemo_image.engine.threads import local_share

Fit = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


def make(rows: int, size: int) -> np.ndarray:
    """Return unit rows around 400 broad centres."""
    made = np.random.default_rng(0)
    centres = made.normal(size=(400, size)).astype(np.float32)
    found = centres[made.integers(0, 400, rows)] + 1.5 * made.normal(size=(rows, size)).astype(np.float32)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def ours(rows: np.ndarray, start: np.ndarray, iterations: int, threads: int) -> np.ndarray:
    with local_share(threads):
        return lloyd(rows, start, iterations, tolerance=0)


def scikit_learn(rows: np.ndarray, start: np.ndarray, iterations: int, threads: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0).fit(rows).cluster_centers_


def faiss_cpu(rows: np.ndarray, start: np.ndarray, iterations: int, threads: int) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(threads)
    # By default it would take 256 rows a cluster.
    model = faiss.Kmeans(rows.shape[1], len(start), niter=iterations, max_points_per_centroid=len(rows))
    model.train(rows, init_centroids=start)
    return model.centroids


def inertia(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Return the sum of squared distances to the nearest centroids, in float64."""
    wide, total = centroids.astype(np.float64), 0.0
    for first in range(0, len(rows), 10_000):
        part = rows[first : first + 10_000].astype(np.float64)
        total += ((part**2).sum(1) - 2 * (part @ wide.T - (wide**2).sum(1) / 2).max(1)).sum()
    return float(total)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    rows = make(args.rows, args.size)
    began = time.perf_counter()
    start = kmeans_start(rows[: START_ROWS * args.clusters], args.clusters, 0)
    started = time.perf_counter() - began

    fits: dict[str, tuple[Fit, int]] = {
        f"ours, {args.threads} threads": (ours, args.threads),
        "ours, 1 thread": (ours, 1),
    }
    fits[f"scikit-learn, {args.threads} threads"] = (scikit_learn, args.threads)
    fits["scikit-learn, 1 thread"] = (scikit_learn, 1)
    if importlib.util.find_spec("faiss"):
        fits[f"faiss-cpu, {args.threads} threads"] = (faiss_cpu, args.threads)
    else:
        print("faiss is not installed, so it is not compared with: pip install faiss-cpu\n")

    seconds: dict[str, list[float]] = {name: [] for name in fits}
    centroids: dict[str, np.ndarray] = {}
    for _ in range(args.repeats):
        for name, (fit, threads) in fits.items():
            began = time.perf_counter()
            centroids[name] = fit(rows, start, args.iterations, threads)
            seconds[name].append(time.perf_counter() - began)

    base, first = seconds[next(iter(fits))], inertia(rows, centroids[next(iter(fits))])
    print(f"{args.rows} x {args.size}, k = {args.clusters}, {args.iterations} iterations from the same start ", end="")
    print(f"(k-means++ on {START_ROWS} k rows: {started:.2f} s)\n")
    print("| k-means | seconds | its time / ours | inertia | inertia / ours | SHA-256 of the centroids |")
    print("|---|---|---|---|---|---|")
    for name in fits:
        ratio = statistics.median(one / other for one, other in zip(seconds[name], base, strict=True))
        total = inertia(rows, centroids[name])
        digest = hashlib.sha256(np.ascontiguousarray(centroids[name], np.float32).tobytes()).hexdigest()[:8]
        print(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio:.2f} | {total:.2f} | {total / first:.6f} "
            f"| {digest} |"
        )


if __name__ == "__main__":
    main()
