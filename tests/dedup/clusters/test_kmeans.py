"""k-means against scikit-learn's, from the same start."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from nemo_image import backend
from nemo_image.dedup.clusters import kmeans, nearest
from nemo_image.dedup.clusters.kmeans import START_ROWS, TOLERANCE, fit_kmeans, kmeans_start, lloyd
from nemo_image.engine.threads import local_share, torch_threads
from nemo_image.errors import ArgumentError, MissingDependencyError

Floats = np.ndarray
ROOT = Path(__file__).resolve().parents[2]


def unit(rows: Floats) -> Floats:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def groups(rows: int, size: int, count: int, noise: float, seed: int = 0) -> Floats:
    """Return unit rows in a random order, around `count` centres."""
    made = np.random.default_rng(seed)
    centres = unit(made.normal(size=(count, size)))
    return unit(centres[made.integers(0, count, rows)] + noise * made.normal(size=(rows, size)) / np.sqrt(size))


def distances(rows: Floats, centroids: Floats) -> Floats:
    """Return squared distances in float64, shape (n, k)."""
    return np.stack([((rows - one.astype(np.float64)) ** 2).sum(1) for one in centroids], axis=1)


def inertia(rows: Floats, centroids: Floats) -> float:
    return float(distances(rows, centroids).min(1).sum())


def reference(rows: Floats, start: Floats, max_iter: int, tol: float = TOLERANCE) -> Any:
    return KMeans(len(start), init=start, n_init=1, max_iter=max_iter, tol=tol).fit(rows)


def test_separated_groups_as_scikit_learn() -> None:
    rows = groups(9000, 32, 12, 0.3)
    start = kmeans_start(rows[:200], 12, 0)
    found = lloyd(rows, start, 100)
    wanted = reference(rows, start, 100)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.cluster_centers_, atol=1e-6)
    assert (distances(rows, found).argmin(1) == wanted.labels_).all()
    assert inertia(rows, found) == pytest.approx(wanted.inertia_, rel=1e-6)


@pytest.mark.parametrize("max_iter", [1, 2, 7])
def test_each_iteration_as_scikit_learn(max_iter: int) -> None:
    rows = groups(9000, 24, 3, 2.0)
    start = rows[:40]
    wanted = reference(rows, start, max_iter, tol=0)
    assert wanted.n_iter_ == max_iter
    np.testing.assert_allclose(lloyd(rows, start, max_iter, tolerance=0), wanted.cluster_centers_, atol=1e-4)


def test_inertia_of_unclustered_rows() -> None:
    rows = groups(10_000, 64, 1, 50.0)
    start = kmeans_start(rows[:800], 50, 3)
    wanted = reference(rows, start, 20, tol=0).inertia_
    assert inertia(rows, lloyd(rows, start, 20, tolerance=0)) == pytest.approx(wanted, rel=1e-3)


def test_near_copies_are_told_apart() -> None:
    """Groups 1e-5 apart, which a float32 product of unit rows alone cannot see."""
    made = np.random.default_rng(0)
    base, steps = unit(made.normal(size=(1, 64))), unit(made.normal(size=(4, 64)))
    wanted = made.integers(0, 4, 6000)
    rows = (base + 1e-5 * steps[wanted]).astype(np.float32)
    found = lloyd(rows, rows[np.unique(wanted, return_index=True)[1]], 10)
    assert (distances(rows, found).argmin(1) == wanted).all()
    units = rows @ found.T - (found * found).sum(1) / 2
    assert (units.argmax(1) != wanted).any()


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_iterations_end_as_scikit_learn(tol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop ends where rows stay, or where centroids move less than the tolerance."""
    # All in one direction: the variance, which scales the tolerance, is a sixth of that of rows around 0.
    rows = unit(groups(5000, 16, 4, 1.0) + 0.5)
    start = rows[:5]
    wanted = reference(rows, start, 1000, tol)
    calls = []
    whole = kmeans._assign_all
    monkeypatch.setattr(kmeans, "_assign_all", lambda *settings: calls.append(1) or whole(*settings))
    found = lloyd(rows, start, 1000, tolerance=tol)
    assert 15 < len(calls) == wanted.n_iter_
    assert tol == 0 or wanted.n_iter_ < reference(rows, start, 1000, 0).n_iter_
    np.testing.assert_allclose(found, wanted.cluster_centers_, atol=1e-5)


def test_empty_clusters_take_the_farthest_rows() -> None:
    rows = groups(5000, 16, 6, 0.4)
    far = np.full((3, 16), 7.0) + np.arange(3)[:, None]
    start = np.concatenate([rows[:5], far]).astype(np.float32)
    assert set(distances(rows, start).argmin(1)) <= set(range(5))
    for max_iter in (1, 2, 50):
        wanted = reference(rows, start, max_iter)
        np.testing.assert_allclose(lloyd(rows, start, max_iter), wanted.cluster_centers_, atol=1e-5)


def test_equal_rows() -> None:
    rows = np.repeat(groups(1, 48, 1, 1.0), 5000, axis=0)
    for count in (1, 3, 40):
        found = fit_kmeans(rows, count, max_iter=20, random_state=0)
        assert found.shape == (count, 48)
        assert (found == rows[0]).all()


def test_fewer_distinct_rows_than_clusters() -> None:
    distinct = groups(5, 48, 5, 1.0)
    rows = distinct[np.random.default_rng(0).integers(0, 5, 3000)]
    found = fit_kmeans(rows, 9, max_iter=20, random_state=0)
    assert {one.tobytes() for one in found} == {one.tobytes() for one in distinct}
    # No row is far from its centroid: an empty cluster's stays where it began.
    start = distinct[[0, 1, 2, 3, 4, 3, 1]]
    assert (lloyd(rows, start, 5) == start).all()


def test_one_row_and_a_cluster_for_each() -> None:
    rows = groups(37, 16, 5, 1.0)
    assert (fit_kmeans(rows[:1], 1, max_iter=10, random_state=0) == rows[:1]).all()
    found = fit_kmeans(rows, 37, max_iter=10, random_state=0)
    assert sorted(map(tuple, found)) == sorted(map(tuple, rows))
    single = fit_kmeans(rows, 1, max_iter=10, random_state=0)
    np.testing.assert_allclose(single[0], rows.mean(0, dtype=np.float64), atol=1e-7)


def test_the_start_looks_at_the_first_rows_and_the_seed() -> None:
    rows = groups(2000, 16, 5, 1.0)
    changed = rows.copy()
    changed[START_ROWS * 10 :] = rows[START_ROWS * 10 :][::-1]
    one = fit_kmeans(rows, 10, max_iter=1, random_state=0)
    # The same rows in another order: the same start, and the same means but for rounding.
    np.testing.assert_allclose(fit_kmeans(changed, 10, max_iter=1, random_state=0), one, atol=1e-6)
    assert np.abs(fit_kmeans(rows, 10, max_iter=1, random_state=1) - one).max() > 1e-3
    assert np.abs(fit_kmeans(rows[::-1].copy(), 10, max_iter=1, random_state=0) - one).max() > 1e-3


def test_many_centroids_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = groups(3000, 16, 5, 1.0)
    whole = lloyd(rows, rows[:50], 5)
    monkeypatch.setattr(nearest, "CENTROIDS_AT_ONCE", 7)
    np.testing.assert_allclose(lloyd(rows, rows[:50], 5), whole, atol=1e-6)


@pytest.mark.parametrize("data", ["groups", "empty clusters"])
def test_threads_do_not_show(data: str) -> None:
    rows = groups(40_000, 40, 7, 3.0)
    start = rows[:30].copy()
    if data == "empty clusters":
        start[:4] = 9
    found = set()
    for threads in (1, 2, 3, 5):
        with local_share(threads), threadpool_limits(1 + threads % 2):
            found.add(lloyd(rows, start, 6).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_each_chunk_has_one_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that torch cannot cut a product otherwise on another machine."""
    rows = groups(20_000, 16, 5, 1.0)
    before, seen = torch.get_num_threads(), set()
    whole = kmeans._blocks
    monkeypatch.setattr(kmeans, "_blocks", lambda part: seen.add(torch.get_num_threads()) or whole(part))
    with torch_threads(2), local_share(threads):
        lloyd(rows, rows[:5], 1)
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    assert seen == {1}


FIT = """
import hashlib, numpy, sys
from nemo_image.dedup.clusters.kmeans import fit_kmeans
rows = numpy.load(sys.argv[1])
print(hashlib.sha256(fit_kmeans(rows, 25, max_iter=8, random_state=5).tobytes()).hexdigest())
"""


def test_cores_of_the_process_do_not_show(tmp_path: Path) -> None:
    rows = groups(20_000, 40, 7, 3.0)
    np.save(tmp_path / "rows.npy", rows)
    wanted = hashlib.sha256(fit_kmeans(rows, 25, max_iter=8, random_state=5).tobytes()).hexdigest()
    for threads in ("1", "2"):
        settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        command = [sys.executable, "-c", FIT, str(tmp_path / "rows.npy")]
        if threads == "1" and hasattr(os, "sched_setaffinity"):
            command = [sys.executable, "-c", "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})" + FIT]
            command.append(str(tmp_path / "rows.npy"))
        environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.strip() == wanted


def test_rows_may_be_read_only() -> None:
    rows = groups(600, 16, 5, 1.0)
    wanted = fit_kmeans(rows, 10, max_iter=3, random_state=0)
    rows.flags.writeable = False
    assert (fit_kmeans(rows, 10, max_iter=3, random_state=0) == wanted).all()


def test_unusable_arguments(cluster: Any) -> None:
    rows = groups(20, 16, 5, 1.0)
    for count in (0, 21):
        with pytest.raises(ArgumentError, match=f"n_clusters={count}.* rows to fit, 20"):
            fit_kmeans(rows, count)
    with pytest.raises(ArgumentError, match="max_iter=0"):
        fit_kmeans(rows, 2, max_iter=0)
    with pytest.raises(ArgumentError, match="device='tpu'"):
        fit_kmeans(rows, 2, device="tpu")
    with pytest.raises(ArgumentError, match="without a client"):
        fit_kmeans(rows, 2, client=cluster)


@pytest.mark.parametrize(
    ("device", "module", "message"),
    [
        ("cpu", "sklearn.cluster", "scikit-learn: pip install .*image_cpu"),
        ("cuda", "cupy", "cuML .*: pip install .*image_cuda13"),
    ],
)
def test_missing_packages(device: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=message):
        fit_kmeans(groups(20, 16, 5, 1.0), 2, device=device)


def test_rows_are_spread_over_the_workers(cluster: Any) -> None:
    from distributed import futures_of, wait

    rows = groups(101, 16, 5, 1.0)
    workers = sorted(cluster.ncores())
    for _ in range(10):
        made = backend.spread_rows(cluster, workers, rows, np.asarray, np.empty((0, 0), np.float32))
        assert made.dtype == np.float32
        assert made.chunks == ((51, 50), (16,))
        # As cuML does it.
        parts = futures_of(cluster.persist(made))
        with cluster.as_current():
            wait(parts)
        where = cluster.who_has(parts)
        assert [where[part.key] for part in parts] == [(worker,) for worker in workers]
        assert (cluster.compute(made, sync=True) == rows).all()
    # Fewer rows than workers: no empty block.
    few = backend.spread_rows(cluster, workers, rows[:1], np.asarray, np.empty((0, 0), np.float32))
    assert few.chunks == ((1,), (16,))


class OneGPU:
    """cuML's k-means as far as we call it (its arguments are those of 25.12 and 26.10), done by scikit-learn."""

    made: list[OneGPU] = []  # noqa: RUF012

    def __init__(
        self,
        *,
        n_clusters: int = 8,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
        n_init: Any = "auto",
    ) -> None:
        self.settings = (n_clusters, max_iter, tol, random_state, n_init)
        self.made.append(self)

    def fit(self, rows: Any) -> OneGPU:
        self.rows = rows
        count, max_iter, _, seed, starts = self.settings
        held = self.client.compute(rows, sync=True) if isinstance(self, ManyGPUs) else rows
        fitted = KMeans(count, max_iter=max_iter, random_state=seed, n_init=starts).fit(held)
        self.cluster_centers_ = fitted.cluster_centers_.astype(np.float64)
        return self


class ManyGPUs(OneGPU):
    """``cuml.dask``'s, which takes Dask arrays."""

    def __init__(self, *, client: Any = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.client = client


def test_what_cuml_is_given(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = types.SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray, empty=np.empty)
    monkeypatch.setitem(sys.modules, "cupy", arrays)  # type: ignore[arg-type]
    for name, found in (("cuml", None), ("cuml.cluster", OneGPU), ("cuml.dask", None), ("cuml.dask.cluster", ManyGPUs)):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(KMeans=found))  # type: ignore[arg-type]
    monkeypatch.setattr(OneGPU, "made", [])
    rows = groups(3000, 16, 5, 0.1)
    alone = fit_kmeans(rows, 5, max_iter=30, random_state=4, device="cuda")
    spread = fit_kmeans(rows, 5, max_iter=30, random_state=4, device="cuda:0", client=cluster)
    one, many = OneGPU.made
    assert one.rows is rows
    assert isinstance(many, ManyGPUs)
    assert many.client is cluster
    assert many.rows.chunks == ((1500, 1500), (16,))
    # scikit-learn scales its tolerance by the columns' mean variance, cuML does not.
    wanted = (5, 30, pytest.approx(TOLERANCE * rows.var(axis=0, dtype=np.float64).mean(), rel=1e-5), 4, 1)
    assert one.settings == many.settings == wanted
    for found in (alone, spread):
        assert found.dtype == np.float32
        assert inertia(rows, found) == pytest.approx(inertia(rows, fit_kmeans(rows, 5)), rel=1e-5)


@pytest.mark.gpu
def test_cuml_as_the_cpu() -> None:
    rows = groups(20_000, 64, 10, 0.3)
    found = fit_kmeans(rows, 10, max_iter=100, random_state=0, device="cuda")
    assert found.shape == (10, 64)
    assert found.dtype == np.float32
    assert inertia(rows, found) == pytest.approx(inertia(rows, fit_kmeans(rows, 10)), rel=1e-2)


@pytest.mark.gpu
def test_cuml_on_several_gpus() -> None:
    from dask_cuda import LocalCUDACluster
    from distributed import Client

    rows = groups(20_000, 64, 10, 0.3)
    with LocalCUDACluster() as local, Client(local) as client:
        if len(client.ncores()) < 2:
            pytest.skip("this machine has one GPU")
        found = fit_kmeans(rows, 10, random_state=0, device="cuda", client=client)
    assert inertia(rows, found) == pytest.approx(inertia(rows, fit_kmeans(rows, 10)), rel=1e-2)
