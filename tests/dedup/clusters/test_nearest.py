"""Nearest centroids against sums in extended precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_image.dedup.clusters import nearest
from nemo_image.dedup.clusters.nearest import Scores, nearest_centroids
from nemo_image.engine.threads import torch_threads
from nemo_image.errors import ArgumentError

Floats = np.ndarray

# Sums in float64 differ by about this much with their order.
ROUNDING = 1e-13


def oracle(vectors: Floats, centroids: Floats) -> tuple[Floats, Floats]:
    """Return all squared distances from the unit vectors, and all cosine distances, in extended precision."""
    wide, others = vectors.astype(np.longdouble), centroids.astype(np.longdouble)
    units = wide / np.sqrt((wide**2).sum(1))[:, None]
    squared = np.stack([((units - one) ** 2).sum(1) for one in others], axis=1)
    lengths = np.sqrt((others**2).sum(1))
    cosines = (units @ others.T) / np.where(lengths > 0, lengths, 1)
    return squared, 1 - np.clip(cosines, -1, 1)


def check(vectors: Floats, centroids: Floats, n_probe: int = 1, **settings: object) -> None:
    clusters, distance = nearest_centroids(vectors, centroids, n_probe, **settings)  # type: ignore[arg-type]
    assert clusters.dtype == np.int32
    assert clusters.shape == (len(vectors), n_probe)
    assert distance.dtype == np.float32
    squared, distances = oracle(vectors, centroids)
    wanted = np.argsort(squared, axis=1, kind="stable")[:, :n_probe]
    rows = np.arange(len(vectors))[:, None]
    # Another cluster only where it is as near but for the order of sums, and then the lower number.
    assert (np.abs(squared[rows, clusters] - squared[rows, wanted]) <= ROUNDING * (1 + squared[rows, wanted])).all()
    clear = (np.diff(np.sort(squared, axis=1), axis=1) > ROUNDING * 10).all(axis=1)
    assert (clusters == wanted)[clear].all()
    # A rounding to float32, and those of sums of products near 1.
    exact = distances[rows[:, 0], clusters[:, 0]]
    assert (np.abs(distance - exact) <= exact * 2.0**-24 + (vectors.shape[1] + 16) * 2.0**-52).all()


def clustered(rows: int, size: int, groups: int, noise: float, seed: int = 0) -> tuple[Floats, Floats]:
    """Return rows of any length around group centres, and the centres, moved a little."""
    made = np.random.default_rng(seed)
    centres = made.normal(size=(groups, size))
    near = centres[made.integers(0, groups, rows)] + noise * made.normal(size=(rows, size))
    lengths = made.uniform(0.1, 20, rows)[:, None]
    units = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    return (near * lengths).astype(np.float32), (0.9 * units).astype(np.float32)


def near_copies(rows: int, size: int, groups: int, noise: float) -> tuple[Floats, Floats]:
    """Return rows and centroids that are all one vector but for `noise`."""
    made = np.random.default_rng(1)
    base = made.normal(size=size)
    base /= np.linalg.norm(base)
    spread = [base + noise * made.normal(size=(count, size)) for count in (rows, groups)]
    return spread[0].astype(np.float32), spread[1].astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 17, 512])
@pytest.mark.parametrize("n_probe", [1, 3])
def test_random_and_clustered_rows(size: int, n_probe: int) -> None:
    made = np.random.default_rng(2)
    check(made.normal(size=(500, size)).astype(np.float32), made.normal(size=(40, size)).astype(np.float32), n_probe)
    check(*clustered(500, size, 30, 0.3), n_probe)


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("n_probe", [1, 4])
def test_what_float32_cannot_tell(noise: float, n_probe: int) -> None:
    vectors, centroids = near_copies(300, 64, 20, noise)
    squared, _ = oracle(vectors, centroids)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    plain = (units @ centroids.T - (centroids * centroids).sum(1) / 2).argmax(1)
    if noise < 1e-4:
        assert (plain != squared.argmin(1)).any()
    check(vectors, centroids, n_probe)


def test_equal_centroids_give_the_lowest_number() -> None:
    vectors, centroids = clustered(200, 32, 6, 0.2)
    clusters, distance = nearest_centroids(vectors, np.repeat(centroids, 3, axis=0), 5)
    first, alone = nearest_centroids(vectors, centroids, 2)
    assert (clusters[:, :3] == 3 * first[:, :1] + [0, 1, 2]).all()
    assert (clusters[:, 3:] == 3 * first[:, 1:] + [0, 1]).all()
    assert (distance == alone).all()
    # Exactly between two, whichever comes first.
    between = np.array([[1, 1, 0], [0, 5, 5]], np.float32)
    assert nearest_centroids(between, np.eye(3, dtype=np.float32), 3)[0].tolist() == [[0, 1, 2], [1, 2, 0]]


def test_what_float64_cannot_tell_is_equal() -> None:
    """A difference of 1e-20, which the differences from the mean still show."""
    centroids = np.array([[0.5, 0], [0.5, 1e-20]], np.float32)
    vectors = np.ones((1, 2), np.float32)
    for pair in (centroids, centroids[::-1]):
        assert nearest_centroids(vectors, pair)[0].tolist() == [[0]]
        assert nearest_centroids(vectors, pair, 2)[0].tolist() == [[0, 1]]


def test_longer_centroids_reach_farther() -> None:
    """A cluster of spread rows has a short mean: the nearest centroid is not the one of the greatest cosine."""
    centroids = np.array([[0.9, 0.1], [0.05, 0.05]], np.float32)
    vectors = np.array([[0, 3]], np.float32)
    clusters, distance = nearest_centroids(vectors, centroids, 2)
    assert clusters.tolist() == [[1, 0]]
    assert distance == np.float32(1 - np.sqrt(0.5))
    check(vectors, centroids)


def test_zero_centroid() -> None:
    centroids = np.array([[0, 0], [2, 0]], np.float32)
    clusters, distance = nearest_centroids(np.array([[1, 0], [0, 1], [0.9, 0.5]], np.float32), centroids)
    assert clusters.tolist() == [[0], [0], [0]]
    assert distance.tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_vectors_of_any_length(scale: float) -> None:
    vectors, centroids = clustered(100, 16, 8, 0.3)
    scaled = vectors * np.float32(scale)
    check(scaled, centroids)
    # Numbers so small have lost digits; twice the vector has not.
    assert (nearest_centroids(scaled * 2, centroids)[1] == nearest_centroids(scaled, centroids)[1]).all()


@pytest.mark.parametrize("data", ["clustered", "near copies", "equal"])
@pytest.mark.parametrize("n_probe", [1, 3])
def test_blocks_and_threads_do_not_show(data: str, n_probe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, centroids = {
        "clustered": clustered(1500, 100, 23, 1.0),
        "near copies": near_copies(1500, 100, 23, 1e-7),
        "equal": tuple(np.ones((count, 100), np.float32) for count in (1500, 23)),
    }[data]
    wanted = nearest_centroids(vectors, centroids, n_probe)
    for block_rows, threads, at_once, numbers in [
        (1, 1, 4096, 2**20),
        (7, 2, 5, 300),
        (128, 1, 7, 100),
        (1024, 2, 1, 1),
    ]:
        monkeypatch.setattr(nearest, "CENTROIDS_AT_ONCE", at_once)
        monkeypatch.setattr(nearest, "_NUMBERS_AT_ONCE", numbers)
        with torch_threads(threads):
            found = nearest_centroids(vectors, centroids, n_probe, block_rows=block_rows)
        assert found[0].tobytes() == wanted[0].tobytes()
        assert found[1].tobytes() == wanted[1].tobytes()
    monkeypatch.undo()
    parts = [nearest_centroids(part, centroids, n_probe) for part in np.split(vectors, [1, 2, 600, 601, 1400])]
    assert np.concatenate([one for one, _ in parts]).tobytes() == wanted[0].tobytes()
    assert np.concatenate([one for _, one in parts]).tobytes() == wanted[1].tobytes()


@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1), st.data()
)
def test_few_distinct_numbers(rows: int, size: int, groups: int, levels: int, seed: int, data: st.DataObject) -> None:
    """Small whole numbers, so that ties and zero centroids are common."""
    made = np.random.default_rng(seed)
    vectors = made.integers(1, levels + 1, (rows, size)).astype(np.float32)
    centroids = made.integers(-levels, levels + 1, (groups, size)).astype(np.float32)
    check(vectors, centroids, data.draw(st.integers(1, groups)), block_rows=data.draw(st.integers(1, 40)))


def test_a_program_that_lets_torch_cut_its_products() -> None:
    """TF32 and bfloat16 are beyond the error bound: such a program's candidates come from float64."""
    vectors, centroids = near_copies(300, 64, 20, 1e-3)
    wanted = nearest_centroids(vectors, centroids, 2)
    before = torch.get_float32_matmul_precision()
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        _, scores, _ = next(Scores(centroids, "cpu").of(unit))
        assert scores.dtype == torch.float64
        found = nearest_centroids(vectors, centroids, 2)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


def test_scores_keep_their_bound() -> None:
    """The float32 scores lie within the margin of their exact values, and not far within it."""
    for vectors, centroids in (clustered(400, 512, 50, 1.0), near_copies(400, 512, 50, 1e-4)):
        units = (vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
        ((_, scores, margin),) = Scores(centroids, "cpu").of(units)
        wide = centroids.astype(np.longdouble)
        mean = centroids.mean(axis=0, dtype=np.float64).astype(np.longdouble)
        exact = units.astype(np.longdouble) @ (wide - mean).T - ((wide - mean) * (wide + mean)).sum(1) / 2
        error = np.abs(scores.numpy() - exact).max()
        assert margin / 2000 < error < margin


def test_read_only_and_empty_rows() -> None:
    vectors, centroids = clustered(10, 4, 3, 0.1)
    vectors.flags.writeable = centroids.flags.writeable = False
    check(vectors, centroids)
    clusters, distance = nearest_centroids(vectors[:0], centroids, 2)
    assert clusters.shape == (0, 2)
    assert distance.shape == (0,)


def test_unusable_arguments() -> None:
    vectors, centroids = clustered(10, 4, 3, 0.1)
    for n_probe in (0, 4):
        with pytest.raises(ArgumentError, match=f"n_probe={n_probe}.*clusters, 3"):
            nearest_centroids(vectors, centroids, n_probe)
    with pytest.raises(ArgumentError, match=r"4 numbers .* vectors of 3"):
        nearest_centroids(vectors[:, :3], centroids)


@pytest.mark.gpu
@pytest.mark.parametrize("n_probe", [1, 3])
def test_the_gpu_gives_the_same_bits(n_probe: int) -> None:
    for vectors, centroids in (clustered(3000, 512, 200, 1.0), near_copies(3000, 512, 20, 1e-6)):
        wanted = nearest_centroids(vectors, centroids, n_probe)
        found = nearest_centroids(vectors, centroids, n_probe, device="cuda")
        assert all((one == other).all() for one, other in zip(found, wanted, strict=True))
