"""Near-duplicates within one cluster, and k-means: ours, the published ways, and the products that both need."""

from __future__ import annotations

from typing import Any

THRESHOLD = 0.95


def _cluster(rows: int, size: int) -> Any:
    """Return rows of which some 30% are near-copies, as SemDeDup (arXiv 2303.09540) measured in LAION."""
    import numpy as np

    rng = np.random.default_rng(0)
    made = (rng.normal(size=(1, size)) + rng.normal(size=(rows, size))).astype(np.float32)
    copies = np.flatnonzero(rng.random(rows) < 0.3)
    made[copies] = made[rng.integers(0, rows, len(copies))] + 0.05 * rng.normal(size=(len(copies), size))
    return made


def judge(rows: int, size: int, cores: int, representative: bool = True) -> Any:
    """Ours."""
    import torch

    from nemo_image.dedup.pairs.judge import judge as ours
    from nemo_image.dedup.pairs.vectors import MemoryVectors

    torch.set_num_threads(cores)
    vectors = MemoryVectors(_cluster(rows, size))

    def run() -> dict[str, Any]:
        found = ours(vectors, [THRESHOLD], representative=representative)
        return {"count": rows, "removed": int((found.similarity >= THRESHOLD).sum())}

    return run


def full_matrix(rows: int, size: int, cores: int) -> Any:
    """SemDeDup's: all products at once, their upper triangle, its largest in each column."""
    import torch

    torch.set_num_threads(cores)
    vectors = torch.from_numpy(_cluster(rows, size))

    def run() -> dict[str, Any]:
        units = vectors / vectors.norm(dim=1, keepdim=True)
        largest = (units @ units.T).triu_(1).max(dim=0).values
        return {"count": rows, "removed": int((largest >= THRESHOLD).sum())}

    return run


def half_the_products(rows: int, size: int, cores: int, block: int = 2048) -> Any:
    """The products of each pair once, in blocks, and nothing done with them."""
    import torch

    torch.set_num_threads(cores)
    vectors = torch.from_numpy(_cluster(rows, size))
    out = torch.empty(block * rows)

    def run() -> dict[str, Any]:
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            torch.mm(
                vectors[start:stop],
                vectors[start:].T,
                out=out[: (stop - start) * (rows - start)].view(-1, rows - start),
            )
        return {"count": rows}

    return run


def _clouds(rows: int, size: int, clusters: int) -> tuple[Any, Any]:
    """Return unit rows around 400 broad centres, and some of them to start from."""
    import numpy as np

    made = np.random.default_rng(0)
    centres = made.normal(size=(400, size)).astype(np.float32)
    found = centres[made.integers(0, 400, rows)] + 1.5 * made.normal(size=(rows, size)).astype(np.float32)
    found = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return found, found[made.choice(rows, clusters, replace=False)].copy()


def _inertia(rows: Any, centroids: Any) -> float:
    """Return the sum of squared distances to the nearest centroids, in float64."""
    import numpy as np

    wide, total = centroids.astype(np.float64), 0.0
    for first in range(0, len(rows), 10_000):
        part = rows[first : first + 10_000].astype(np.float64)
        total += ((part**2).sum(1) - 2 * (part @ wide.T - (wide**2).sum(1) / 2).max(1)).sum()
    return float(total)


def lloyd(rows: int, size: int, clusters: int, iterations: int, cores: int) -> Any:
    """Ours, without its start."""
    from nemo_image.dedup.clusters.kmeans import lloyd as ours
    from nemo_image.engine.threads import local_share

    sample, start = _clouds(rows, size, clusters)

    def run() -> dict[str, Any]:
        with local_share(cores):
            centroids = ours(sample, start, iterations, tolerance=0)
        return {"count": rows, "inertia": lambda: _inertia(sample, centroids)}

    return run


def faiss(rows: int, size: int, clusters: int, iterations: int, cores: int) -> Any:
    """faiss-cpu from the same start, on all rows (by default it would take 256 a cluster)."""
    import faiss as library

    library.omp_set_num_threads(cores)
    sample, start = _clouds(rows, size, clusters)

    def run() -> dict[str, Any]:
        model = library.Kmeans(size, clusters, niter=iterations, max_points_per_centroid=rows)
        model.train(sample, init_centroids=start)
        return {"count": rows, "inertia": lambda: _inertia(sample, model.centroids)}

    return run


def products(rows: int, size: int, clusters: int, iterations: int, cores: int) -> Any:
    """The products of rows and centroids in float32, a block a core, and nothing done with them."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    sample, start = (torch.from_numpy(one) for one in _clouds(rows, size, clusters))
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))

    def run() -> dict[str, Any]:
        for _ in range(iterations):
            list(pool.map(lambda first: len(sample[first : first + 1024] @ start.T), range(0, rows, 1024)))
        return {"count": rows}

    return run
