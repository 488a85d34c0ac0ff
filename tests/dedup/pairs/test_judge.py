"""Judging the rows of a cluster, against a brute force in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.dedup.pairs import cosine, tiles, winners
from nemo_image.dedup.pairs import judge as judging
from nemo_image.dedup.pairs.judge import Judged, judge, single_precision_holds
from nemo_image.dedup.pairs.vectors import DiskVectors, Floats, MemoryVectors
from nemo_image.engine.threads import torch_threads
from nemo_image.errors import ArgumentError

Bools = npt.NDArray[np.bool_]

THRESHOLDS = [1.0, 0.99999, 0.99, 0.7, 0.0]


def brute_force(
    rows: Floats, thresholds: Sequence[float], representative: bool, fixed: int = 0, silent: Bools | None = None
) -> Judged:
    """Compare all pairs in float64, one row after the other."""
    doubles = rows.astype(np.float64)
    norms = np.sqrt((doubles**2).sum(axis=1))
    cosines = np.clip(doubles @ doubles.T / np.outer(norms, norms), -1, 1).astype(np.float32)
    levels = thresholds if representative else [np.inf]
    similarity = np.zeros((len(levels), len(rows)), np.float32)
    twin = np.full((len(levels), len(rows)), -1)
    for level, threshold in enumerate(levels):
        kept = np.ones(len(rows), bool) if silent is None else ~silent
        for row in range(fixed, len(rows)):
            earlier = np.flatnonzero(kept[:row])
            if not len(earlier):
                continue
            place = cosines[row, earlier].argmax()
            if cosines[row, earlier[place]] >= 0:
                similarity[level, row] = cosines[row, earlier[place]]
                twin[level, row] = earlier[place]
                kept[row] &= float(similarity[level, row]) < threshold
    return Judged(similarity, twin)


def assert_same(found: Judged, wanted: Judged) -> None:
    assert found.similarity.dtype == np.float32
    assert found.twin.dtype == np.int64
    np.testing.assert_array_equal(found.similarity, wanted.similarity)
    np.testing.assert_array_equal(found.twin, wanted.twin)


def random(rng: np.random.Generator, count: int, size: int) -> Floats:
    return rng.normal(size=(count, size)).astype(np.float32)


def clustered(rng: np.random.Generator, count: int, size: int) -> Floats:
    """Copies of every closeness."""
    centres = rng.normal(size=(max(1, count // 10), size))
    noise = 10.0 ** rng.uniform(-6, 0, size=(count, 1)) * rng.normal(size=(count, size))
    return (centres[rng.integers(0, len(centres), count)] + noise).astype(np.float32)


def all_equal(rng: np.random.Generator, count: int, size: int) -> Floats:
    return np.repeat(random(rng, 1, size), count, axis=0)


def near_copies(rng: np.random.Generator, count: int, size: int) -> Floats:
    return (rng.normal(size=size) + 1e-7 * rng.normal(size=(count, size))).astype(np.float32)


def nearly_near_copies(rng: np.random.Generator, count: int, size: int) -> Floats:
    """Cosines that float64 tells apart, and float32 does not."""
    return (rng.normal(size=size) + 1e-3 * rng.normal(size=(count, size))).astype(np.float32)


def proportional(rng: np.random.Generator, count: int, size: int) -> Floats:
    """v, 2 v, 3 v, … of some v, equal bytes among them."""
    directions = rng.normal(size=(max(1, count // 20), size)).astype(np.float32)
    return directions[rng.integers(0, len(directions), count)] * rng.integers(1, 5, (count, 1)).astype(np.float32)


def whole_numbers(rng: np.random.Generator, count: int, size: int) -> Floats:
    """Many equal cosines, zero among them."""
    rows = rng.integers(-1, 2, size=(count, size)).astype(np.float32)
    rows[~rows.any(axis=1)] = 1
    return rows


def one_direction_each(rng: np.random.Generator, count: int, size: int) -> Floats:
    """Multiples of unit vectors: cosines of exactly 1, 0 and -1."""
    return np.eye(size, dtype=np.float32)[rng.integers(0, size, count)] * rng.choice(
        [-2, -1, 1, 2], size=(count, 1)
    ).astype(np.float32)


KINDS: list[Callable[[np.random.Generator, int, int], Floats]] = [
    random,
    clustered,
    all_equal,
    near_copies,
    nearly_near_copies,
    proportional,
    whole_numbers,
    one_direction_each,
]


@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("size", [1, 2, 17, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force_for_every_block(kind: Any, size: int, representative: bool) -> None:
    for count, fixed, block_rows in ((50, 0, 1), (50, 17, 7), (1100, 300, 128), (1100, 0, 1024)):
        rows = kind(np.random.default_rng(size), count, size)
        found = judge(
            MemoryVectors(rows), THRESHOLDS, representative=representative, fixed=fixed, block_rows=block_rows
        )
        assert_same(found, brute_force(rows, THRESHOLDS, representative, fixed))


def set_sizes(patch: pytest.MonkeyPatch, group: int, width: int, hits: int, pairs: int) -> None:
    """Make tiles so small that a few rows take every path."""
    patch.setattr(tiles, "GROUP", group)
    patch.setattr(tiles, "TILE_COLUMNS", width)
    for module in (tiles, winners):
        patch.setattr(module, "HITS_A_ROW", hits)
        patch.setattr(module, "PAIRS_A_ROW", pairs)


def widen_bounds(patch: pytest.MonkeyPatch, single: float, double: float) -> None:
    """Doubt more pairs than need be, which may change nothing."""
    singles, doubles = cosine.single_bound, cosine.double_bound
    for module in (judging, winners):
        patch.setattr(module, "single_bound", lambda size: single * singles(size))
    for module in (judging, winners, cosine):
        patch.setattr(module, "double_bound", lambda size: double * doubles(size))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_brute_force_for_every_tile_and_bound(data: st.DataObject) -> None:
    count, size = data.draw(st.integers(0, 250)), data.draw(st.sampled_from([1, 2, 3, 17, 64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = np.concatenate([data.draw(st.sampled_from(KINDS))(rng, count, size) for _ in range(2)])
    rows = rows[rng.permutation(len(rows))]
    exponents = data.draw(st.lists(st.floats(0, 9), min_size=1, max_size=6))
    thresholds = [*(1 - 10**-exponent for exponent in exponents), data.draw(st.sampled_from([0.0, 0.5, 1.0]))]
    fixed = data.draw(st.integers(0, len(rows)))
    silent = data.draw(st.sampled_from([None, rng.random(len(rows)) < 0.3]))
    block_rows = data.draw(st.sampled_from([1, 7, 33, 1024]))
    representative = data.draw(st.booleans())
    wanted = brute_force(rows, thresholds, representative, fixed, silent)
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(
            patch,
            data.draw(st.sampled_from([1, 8, 64])),
            data.draw(st.sampled_from([64, 128])),
            data.draw(st.sampled_from([1, 2, 16])),
            data.draw(st.sampled_from([1, 2, 32])),
        )
        widen_bounds(patch, data.draw(st.sampled_from([1, 1000])), data.draw(st.sampled_from([1, 1e7])))
        found = judge(
            MemoryVectors(rows),
            thresholds,
            representative=representative,
            fixed=fixed,
            silent=silent,
            block_rows=block_rows,
        )
    assert_same(found, wanted)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_products_as_wrong_as_their_bounds_allow_change_nothing(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = kind(rng, data.draw(st.integers(2, 150)), data.draw(st.sampled_from([2, 17])))
    thresholds = data.draw(st.sampled_from([[1.0], [1 - 1e-6, 0.9999], [0.5, 0.0], THRESHOLDS]))
    representative = data.draw(st.booleans())
    product = tiles.Multiplier.product

    def wrong(self: tiles.Multiplier, columns: tiles.Columns, kind: torch.dtype) -> torch.Tensor:
        bound = winners.single_bound(self.size) if kind == torch.float32 else winners.double_bound(self.size)
        right = product(self, columns, kind)
        # What a repeated column is wrong by is nobody's business: it is never looked at on its own.
        errors = rng.choice([-0.9, 0.9], size=(len(right), len(columns.indices)))[:, columns.places] * bound
        return right.add_(torch.from_numpy(errors))

    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch, 8, 64, *data.draw(st.sampled_from([(1, 1), (2, 4), (16, 32)])))
        # A float64 product then errs by a part of what float32 numbers near 1 lie apart, or by more.
        widen_bounds(patch, 10, data.draw(st.sampled_from([1e6, 1e7, 1e8])))
        patch.setattr(tiles.Multiplier, "product", wrong)
        patch.setattr(judging, "single_precision_holds", lambda device: data.draw(st.booleans()))
        found = judge(MemoryVectors(rows), thresholds, representative=representative, block_rows=40)
    assert_same(found, brute_force(rows, thresholds, representative))


def test_a_tie_across_tiles_goes_to_the_first_whatever_their_number_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tile leaves one pair to be settled; the second is multiplied in float64 for its many."""
    set_sizes(monkeypatch, 8, 64, 2, 4)
    rows = random(np.random.default_rng(0), 129, 16)
    sought = np.eye(16, dtype=np.float32)[0]
    rows[10] = 2 * sought
    rows[64:128] = sought + 3e-5 * rows[64:128]
    rows[128] = sought
    # Rows 10 and 64 to 127 are all at 1.
    assert (brute_force(rows[10:], [1.0], False).similarity[0, -65:] == 1).all()
    found = judge(MemoryVectors(rows), [1.0], representative=False, block_rows=128)
    assert (found.similarity[0, 128], found.twin[0, 128]) == (1, 10)


def test_many_tiles() -> None:
    rng = np.random.default_rng(3)
    rows = np.concatenate([clustered(rng, 3500, 8), nearly_near_copies(rng, 2500, 8)])[rng.permutation(6000)]
    for representative in (True, False):
        found = judge(MemoryVectors(rows), [0.999999], representative=representative)
        assert_same(found, brute_force(rows, [0.999999], representative))


@pytest.mark.parametrize("representative", [True, False])
def test_disk_and_memory_are_equal(representative: bool, tmp_path: Path) -> None:
    rows = clustered(np.random.default_rng(5), 1500, 32)
    (tmp_path / "rows.f32").write_bytes(np.concatenate([rows[:4], rows]).astype("<f4").tobytes())
    disk = DiskVectors(tmp_path / "rows.f32", 4, len(rows), 32)
    found = judge(disk, THRESHOLDS, representative=representative, fixed=100, block_rows=200)
    assert_same(found, judge(MemoryVectors(rows), THRESHOLDS, representative=representative, fixed=100))


@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("kind", [random, clustered, near_copies, nearly_near_copies])
def test_threads_change_nothing(kind: Any, representative: bool) -> None:
    rows = kind(np.random.default_rng(6), 1500, 257)
    found = []
    for count in (1, 2):
        with torch_threads(count):
            found.append(judge(MemoryVectors(rows), THRESHOLDS, representative=representative, block_rows=500))
    assert_same(*found)


def test_low_precision_products_are_not_trusted() -> None:
    rows = clustered(np.random.default_rng(7), 1100, 64)
    wanted = brute_force(rows, [0.9999], True)
    assert single_precision_holds("cpu")
    torch.set_float32_matmul_precision("medium")
    try:
        assert not single_precision_holds("cpu")
        assert not single_precision_holds("cuda")
        assert_same(judge(MemoryVectors(rows), [0.9999], representative=True), wanted)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_without_trust_nothing_is_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "single_precision_holds", lambda device: False)
    kinds = set()
    product = tiles.Multiplier.product

    def seen(self: tiles.Multiplier, columns: tiles.Columns, kind: torch.dtype) -> torch.Tensor:
        kinds.add(kind)
        return product(self, columns, kind)

    monkeypatch.setattr(tiles.Multiplier, "product", seen)
    rows = clustered(np.random.default_rng(8), 300, 8)
    assert_same(
        judge(MemoryVectors(rows), [0.99], representative=True, block_rows=100), brute_force(rows, [0.99], True)
    )
    assert kinds == {torch.float64}


def test_autocast_changes_nothing() -> None:
    rows = clustered(np.random.default_rng(9), 1100, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = judge(MemoryVectors(rows), [0.9999], representative=True)
    assert_same(found, brute_force(rows, [0.9999], True))


@pytest.mark.gpu
@pytest.mark.parametrize("representative", [True, False])
def test_the_gpu_gives_the_same_bits(representative: bool) -> None:
    for kind in KINDS:
        rows = kind(np.random.default_rng(10), 6000, 96)
        found = judge(MemoryVectors(rows), THRESHOLDS, representative=representative, device="cuda")
        assert_same(found, judge(MemoryVectors(rows), THRESHOLDS, representative=representative))


# What single rows get


def two(first: Sequence[float], second: Sequence[float], threshold: float = 1.0) -> tuple[float, int]:
    """Return the second row's similarity and twin; the same with and without `representative`."""
    rows = MemoryVectors(np.array([first, second], np.float32))
    found = [judge(rows, [threshold], representative=representative) for representative in (True, False)]
    assert_same(*found)
    assert (found[0].similarity[0, 0], found[0].twin[0, 0]) == (0, -1)
    return float(found[0].similarity[0, 1]), int(found[0].twin[0, 1])


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.0])
def test_two_rows(threshold: float) -> None:
    assert two([1, 2, 2], [1, 2, 2], threshold) == (1, 0)
    assert two([1, 2, 2], [3, 6, 6], threshold) == (1, 0)
    assert two([3, 0], [4, 3], threshold) == (np.float32(0.8), 0)
    assert two([1, 0], [0, 1], threshold) == (0, 0)
    assert two([1, 0], [-1, 1e-3], threshold) == (0, -1)
    assert two([1], [-2], threshold) == (0, -1)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-30, 1e-20, 1e18, 1e30, 3e38])
def test_norms_of_any_size(scale: float) -> None:
    assert two([scale, 0], [0.6, 0.8]) == (np.float32(0.6), 0)
    assert two([0.6, 0.8], [0, scale]) == (np.float32(0.8), 0)
    rows = random(np.random.default_rng(0), 300, 16)
    rows[::3] *= np.float32(1e-30)
    rows[1::3] *= np.float32(1e30)
    assert_same(judge(MemoryVectors(rows), [0.5], representative=True), brute_force(rows, [0.5], True))


def test_the_threshold_is_taken_as_a_float64() -> None:
    """A row whose similarity is the threshold falls; at the next larger float64 it does not."""
    rows = MemoryVectors(np.array([[1, 0], [0.8, 0.6], [0.8, 0.6]], np.float32))
    at = float(np.float32(0.8))
    found = judge(rows, [at, np.nextafter(at, 1), np.nextafter(at, 0)], representative=True)
    # Row 2 finds row 1 only where that is kept.
    assert found.twin[:, 2].tolist() == [0, 1, 0]


def test_a_chain_of_copies() -> None:
    """a ~ b ~ c, a and c too far apart: with `representative` c is kept, as b fell."""
    angles = np.radians([0, 10, 20, 30])
    rows = MemoryVectors(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    threshold = float(np.cos(np.radians(12)))
    kept = judge(rows, [threshold], representative=True)
    assert kept.twin.tolist() == [[-1, 0, 0, 2]]
    np.testing.assert_allclose(kept.similarity[0], np.cos(np.radians([90, 10, 20, 10])), atol=1e-6)
    chains = judge(rows, [threshold], representative=False)
    assert chains.twin.tolist() == [[-1, 0, 1, 2]]


@pytest.mark.parametrize("representative", [True, False])
def test_fixed_rows_are_kept_and_not_judged(representative: bool) -> None:
    rows = np.array([[1, 0], [2, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    found = judge(MemoryVectors(rows), [0.9], representative=representative, fixed=3)
    assert found.similarity.tolist() == [[0, 0, 0, 0, 1]]
    assert found.twin.tolist() == [[-1, -1, -1, 0, 0]]


@pytest.mark.parametrize("representative", [True, False])
def test_no_row_is_compared_with_a_silent_one(representative: bool) -> None:
    rows = np.array([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1]], np.float32)
    silent = np.array([True, False, False, True, True])
    found = judge(MemoryVectors(rows), [0.9], representative=representative, silent=silent)
    assert found.similarity.tolist() == [[0, 0, 0, 1, 1]]
    assert found.twin.tolist() == [[-1, -1, 1, 2, 1]]


@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("count", [0, 1])
def test_no_rows_and_one(count: int, representative: bool) -> None:
    found = judge(MemoryVectors(np.ones((count, 3), np.float32)), [0.9, 0.5], representative=representative)
    shape = (2 if representative else 1, count)
    assert_same(found, Judged(np.zeros(shape, np.float32), np.full(shape, -1)))
    all_fixed = judge(MemoryVectors(np.ones((5, 3), np.float32)), [0.9], representative=representative, fixed=5)
    assert (all_fixed.twin == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": []}, "thresholds=.*at least one"),
        ({"thresholds": [0.5, 1.1]}, r"thresholds=\[0.5, 1.1\].*from 0 to 1"),
        ({"thresholds": [-0.1]}, "thresholds=.*from 0 to 1"),
        ({"thresholds": [float("nan")]}, "thresholds=.*from 0 to 1"),
        ({"fixed": 5}, "fixed=5: there are 4 rows"),
        ({"fixed": -1}, "fixed=-1"),
        ({"block_rows": 0}, "block_rows=0"),
        ({"silent": np.zeros(3, bool)}, "silent .*give 4 booleans"),
        ({"silent": np.zeros(4)}, "silent has float64 .*give 4 booleans"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    rows = MemoryVectors(np.ones((4, 2), np.float32))
    with pytest.raises(ArgumentError, match=message):
        judge(rows, **{"thresholds": [0.5], "representative": True, **arguments})


# How much is computed


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of each product from now on."""
    shapes: list[tuple[int, int]] = []
    product = tiles.Multiplier.product

    def seen(self: tiles.Multiplier, columns: tiles.Columns, kind: torch.dtype) -> torch.Tensor:
        result = product(self, columns, kind)
        shapes.append((result.shape[0], result.shape[1]))
        return result

    monkeypatch.setattr(tiles.Multiplier, "product", seen)
    return shapes


def test_rows_that_fell_are_not_compared_with(multiplied: list[tuple[int, int]]) -> None:
    rows = all_equal(np.random.default_rng(0), 20_000, 8)
    judge(MemoryVectors(rows), [1.0], representative=True)
    # The first block with itself, once in each number type; then each block with the one row kept.
    assert multiplied[:2] == [(1024, 1024)] * 2
    assert {width for _, width in multiplied[2:]} == {tiles.GROUP}
    assert len(multiplied) <= 2 + 2 * (20_000 // 1024)


def test_equal_bytes_are_compared_once(multiplied: list[tuple[int, int]]) -> None:
    rows = np.repeat(random(np.random.default_rng(0), 50, 8), 100, axis=0)
    judge(MemoryVectors(rows), [1.0], representative=False)
    assert multiplied == [(50, tiles.GROUP)]


def test_a_block_that_is_settled_is_compared_no_further(multiplied: list[tuple[int, int]]) -> None:
    rows = near_copies(np.random.default_rng(0), 20_000, 8) * np.arange(1, 20_001, dtype=np.float32)[:, None]
    judge(MemoryVectors(rows), [1.0], representative=False)
    blocks = -(-20_000 // 1024)
    assert len(multiplied) <= 2 * blocks


def test_products_are_multiplied_once(multiplied: list[tuple[int, int]]) -> None:
    rows = random(np.random.default_rng(0), 10_000, 64)
    judge(MemoryVectors(rows), [0.9, 0.99], representative=True, block_rows=1000)
    # Five tiles of the earlier rows, and the block itself.
    assert sum(height * width for height, width in multiplied) <= 10_000**2 * (0.5 + 0.05 + 0.01)
    assert max(width for _, width in multiplied) <= tiles.TILE_COLUMNS


def test_very_many_patterns_do_not_widen_a_tile(multiplied: list[tuple[int, int]]) -> None:
    """Rows are kept at thresholds so different that each fills a group of its own."""
    rows = clustered(np.random.default_rng(0), 2500, 3)
    thresholds = np.linspace(0.9, 1, 40).tolist()
    found = judge(MemoryVectors(rows), thresholds, representative=True, block_rows=500)
    assert_same(found, brute_force(rows, thresholds, True))
    assert max(width for _, width in multiplied) <= 2 * tiles.TILE_COLUMNS


# The canonical cosine and its bounds


def decimal_cosine(left: Floats, right: Floats) -> float:
    """Return the cosine, to 80 digits and then rounded twice (to float64, to float32)."""
    with localcontext() as context:
        context.prec = 80
        a, b = ([Decimal(float(number)) for number in row] for row in (left, right))
        dot, a_square, b_square = (
            sum((x * y for x, y in zip(p, q, strict=True)), Decimal(0)) for p, q in ((a, b), (a, a), (b, b))
        )
        return float(dot / (a_square.sqrt() * b_square.sqrt()))


@pytest.mark.parametrize("size", [1, 2, 17, 512])
def test_the_canonical_cosine(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = np.concatenate([kind(rng, 6, size) for kind in KINDS])
    rows[::7] *= np.float32(1e30)
    for left in rows:
        for right in rows[::5]:
            found = cosine.exact_cosine(left, right)
            assert found == np.float32(decimal_cosine(left, right))
            assert found == cosine.exact_cosine(right, left)


def test_the_canonical_cosine_has_no_order() -> None:
    """A sum that float64 gets wrong: the small product is lost beside the large ones."""
    left = np.concatenate([np.full(32, 1e10), np.full(32, -1e10), [1e-10]]).astype(np.float32)
    right = np.abs(left)
    wanted = np.float32(decimal_cosine(left, right))
    assert wanted > 0
    rng = np.random.default_rng(0)
    for order in (rng.permutation(65) for _ in range(5)):
        assert cosine.exact_cosine(left[order], right[order]) == wanted
        found = judge(MemoryVectors(np.stack([left[order], right[order]])), [0.5], representative=True)
        assert (found.similarity[0, 1], found.twin[0, 1]) == (wanted, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 700, 3000])
def test_products_lie_within_their_bounds(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = np.concatenate([kind(rng, 30, size) for kind in (random, near_copies, proportional)])
    rows = np.concatenate([rows, np.abs(rows)])
    multiplier = tiles.Multiplier(MemoryVectors(rows), "cpu")
    everything = np.arange(len(rows))
    multiplier.load(everything)
    columns = tiles.lay_out(everything, np.zeros(len(rows), np.int32))
    pairs = rng.integers(0, len(rows), (300, 2))
    exact = np.array([decimal_cosine(rows[left], rows[right]) for left, right in pairs])
    for kind, bound in ((torch.float32, cosine.single_bound), (torch.float64, cosine.double_bound)):
        found = multiplier.product(columns, kind).numpy()[pairs[:, 0], pairs[:, 1]]
        assert np.abs(found - exact).max() <= bound(size)


@pytest.mark.parametrize("value", [1.0, 0.75, 0.5, 1e-3, 1e-30, 0.0])
def test_the_edge_is_where_rounding_changes(value: float) -> None:
    edge = cosine.edge(np.float32(value))
    assert np.nextafter(edge, 2).astype(np.float32) == np.float32(value)
    assert np.nextafter(edge, -2).astype(np.float32) < np.float32(value) or value == 0
    assert edge < value
