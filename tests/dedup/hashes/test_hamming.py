"""Near hashes, against a loop over all pairs."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import imagehash
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.dedup.hashes import hamming, multi_index
from nemo_image.dedup.hashes.hamming import hashes_from_hex, near_hashes
from nemo_image.dedup.hashes.multi_index import near_pairs, plan_bands, popcount, spread
from nemo_image.errors import ArgumentError

Hashes = npt.NDArray[np.uint64]


def judged(hashes: list[int], max_distance: int, representative: bool, fixed: int) -> tuple[list[int], list[int]]:
    """The definition, in plain Python."""
    distances, twins, sources = [], [], []
    for row, one in enumerate(hashes):
        near = [((one ^ hashes[other]).bit_count(), other) for other in sources] if row >= fixed else []
        distance, twin = min(near, default=(65, -1))
        falls = distance <= max_distance
        distances.append(distance if falls else -1)
        twins.append(twin if falls else -1)
        if not falls or not representative:
            sources.append(row)
    return distances, twins


def check(hashes: Hashes, max_distance: int, representative: bool = True, fixed: int = 0) -> npt.NDArray[np.int16]:
    distance, twin = near_hashes(hashes, max_distance, representative=representative, fixed=fixed)
    assert (distance.dtype, twin.dtype) == (np.int16, np.int64)
    assert (distance.tolist(), twin.tolist()) == judged(hashes.tolist(), max_distance, representative, fixed)
    return distance


def random_hashes(count: int, seed: int) -> Hashes:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def flipped(hashes: Hashes, bits: int, seed: int) -> Hashes:
    """Return copies that differ from each of the hashes in so many bits."""
    rng = np.random.default_rng(seed)
    places = np.argsort(rng.random((len(hashes), 64)), axis=1)[:, :bits].astype(np.uint64)
    return hashes ^ np.bitwise_or.reduce(np.uint64(1) << places, axis=1, initial=np.uint64(0))


def groups(count: int, seed: int, bits: int) -> Hashes:
    """Return copies of few hashes, each with up to so many bits flipped: chains, near groups, equal hashes."""
    rng = np.random.default_rng(seed)
    copies = random_hashes(max(1, count // 6), seed)[rng.integers(0, max(1, count // 6), count)]
    for round_ in range(bits):
        copies = np.where(rng.random(count) < 0.6, flipped(copies, 1, seed + round_), copies)
    return copies


@pytest.fixture(params=["as it is", "small pieces"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut everything into pieces so small that few rows go the ways of many."""
    if request.param == "small pieces":
        for module, name, value in (
            (hamming, "_LEAF", 4),
            (hamming, "_PAIRS_A_ROW", 1),
            (hamming, "_PAIRS_AT_ONCE", 3),
            (multi_index, "_PAIRS_AT_ONCE", 5),
            (multi_index, "_QUERIES_AT_ONCE", 50),
            (multi_index, "_CROWDED", 3),
            (multi_index, "_TILE", 7),
            (multi_index, "_TILE_QUERIES", 2),
            (multi_index, "_NS_CALL", 0.0),  # bands are worth it then
            (multi_index, "_NS_INDEX", 0.0),
        ):
            monkeypatch.setattr(module, name, value)


# -------------------------------------------------------------------------------------------------- the definition


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("max_distance", [0, 1, 2, 3, 4, 5, 8, 13, 32, 63, 64])
def test_equal_to_a_loop_over_all_pairs(max_distance: int, representative: bool) -> None:
    for seed, fixed in ((1, 0), (2, 70), (3, 250), (4, 249)):
        check(groups(250, seed, min(max_distance + 2, 12)), max_distance, representative, fixed)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), representative=st.booleans(), max_distance=st.integers(0, 10))
def test_equal_to_a_loop_over_few_values(data: Any, representative: bool, max_distance: int) -> None:
    # Few bits in few places: many equal hashes, many at equal distances.
    bits = data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=8))
    masks = st.integers(0, 2 ** len(bits) - 1)
    values = data.draw(st.lists(masks, max_size=40))
    hashes = np.array([sum((value >> k & 1) << bit for k, bit in enumerate(bits)) for value in values], np.uint64)
    check(hashes, max_distance, representative, data.draw(st.integers(0, len(values))))


@pytest.mark.parametrize("representative", [True, False])
def test_a_chain(representative: bool) -> None:
    # Each is 2 bits from the next: 0 - 3 - 15 - 63 - 255.
    hashes = np.array([0, 3, 15, 63, 255], np.uint64)
    distance, twin = near_hashes(hashes, 2, representative=representative)
    assert twin.tolist() == ([-1, 0, -1, 2, -1] if representative else [-1, 0, 1, 2, 3])
    assert distance.tolist() == ([-1, 2, -1, 2, -1] if representative else [-1, 2, 2, 2, 2])


def test_a_copy_of_a_fallen_row_has_a_twin_of_its_own() -> None:
    # Row 1 falls to row 0 at 3 bits. Row 2 is kept, only 1 bit from row 1; so row 3, which equals row 1, falls to it.
    hashes = np.array([0, 0b0111, 0b1111, 0b0111], np.uint64)
    distance, twin = near_hashes(hashes, 3)
    assert distance.tolist() == [-1, 3, -1, 1]
    assert twin.tolist() == [-1, 0, -1, 2]


def test_the_earliest_of_equally_near_rows() -> None:
    hashes = np.array([0b11, 0b11 << 40, 0b11 << 20, 0], np.uint64)
    for representative in (True, False):
        distance, twin = near_hashes(hashes, 3, representative=representative)
        assert (distance[3], twin[3]) == (2, 0)


def test_fixed_rows_are_kept_though_they_are_near() -> None:
    hashes = np.array([5, 5, 4, 5, 4, 2**40], np.uint64)
    for representative in (True, False):
        distance, twin = near_hashes(hashes, 1, representative=representative, fixed=3)
        assert distance.tolist() == [-1, -1, -1, 0, 0, -1]
        assert twin.tolist() == [-1, -1, -1, 0, 2, -1]


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("max_distance", [4, 8])
@pytest.mark.parametrize("representative", [True, False])
def test_planted_copies_among_many(max_distance: int, representative: bool) -> None:
    # Of 2 * 10**8 random pairs, some 0.3 are within 9 bits by chance; with this seed, none.
    originals = random_hashes(20_000, 5)
    copies = [flipped(originals[bits::100], bits, bits) for bits in range(max_distance + 2)]
    hashes = np.concatenate([originals, *copies])
    distance, twin = near_hashes(hashes, max_distance, representative=representative)
    expected = np.repeat(np.arange(max_distance + 2), 200)
    rows = np.concatenate([np.arange(bits, 20_000, 100) for bits in range(max_distance + 2)])
    found = expected <= max_distance
    assert (distance[:20_000] == -1).all()
    assert (distance[20_000:] == np.where(found, expected, -1)).all()
    assert (twin[20_000:] == np.where(found, rows, -1)).all()


def test_a_dense_group_is_compared_with_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8,000 different hashes, all within 8 bits of each other: 32 million pairs.
    center = np.full(8000, 0x123456789ABCDEF0, np.uint64)
    hashes = np.unique(flipped(center, 4, 0))
    assert len(hashes) > 7900
    compared = []
    monkeypatch.setattr(hamming, "near_pairs", counted(compared))
    distance, twin = near_hashes(hashes, 8)
    assert set(twin.tolist()) == {-1, 0}
    expected = popcount(hashes[1:] ^ hashes[0])
    assert distance.tolist() == [-1, *expected.tolist()]
    assert sum(compared) < 50 * len(hashes)  # of the 4,000 pairs a row


def counted(compared: list[int]) -> Any:
    """Return `near_pairs`, with the number of pairs that it gave noted."""

    def near(*arguments: Any) -> Any:
        for pairs in near_pairs(*arguments):
            compared.append(len(pairs[0]))
            yield pairs

    return near


def test_a_dense_group_among_others() -> None:
    dense = flipped(np.full(1500, 99, np.uint64), 3, 0)
    rng = np.random.default_rng(1)
    hashes = rng.permutation(np.concatenate([dense, random_hashes(1500, 1)]))
    for representative in (True, False):
        check(hashes, 6, representative)


@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("max_distance", [0, 4, 64])
def test_few_and_equal_rows(max_distance: int, representative: bool) -> None:
    for count in (0, 1, 2):
        check(random_hashes(count, 0), max_distance, representative)
    distance, twin = near_hashes(np.full(50_000, 7, np.uint64), max_distance, representative=representative)
    assert distance.tolist() == [-1] + [0] * 49_999
    assert twin.tolist() == [-1] + [0] * 49_999


def test_many_copies_of_a_row_that_fell() -> None:
    hashes = np.array([0] + [1] * 3000, np.uint64)
    distance, twin = near_hashes(hashes, 1)
    assert distance.tolist() == [-1] + [1] * 3000
    assert twin.tolist() == [-1] + [0] * 3000


def test_the_caller_keeps_its_hashes() -> None:
    hashes = groups(200, 0, 4)
    before = hashes.copy()
    strided = np.repeat(hashes, 2)[::2]
    expected = near_hashes(hashes, 4)
    assert all((one == other).all() for one, other in zip(near_hashes(strided, 4), expected, strict=True))
    assert (hashes == before).all()


@pytest.mark.parametrize(
    ("hashes", "max_distance", "fixed", "says"),
    [
        (np.zeros(3, np.int64), 4, 0, "uint64, not int64"),
        (np.zeros((3, 2), np.uint64), 4, 0, r"of shape \(3, 2\)"),
        (np.broadcast_to(np.uint64(0), 2**31), 4, 0, "fewer than 2147483648"),
        (np.zeros(3, np.uint64), -1, 0, "0 to 64 bits, not -1"),
        (np.zeros(3, np.uint64), 65, 0, "not 65"),
        (np.zeros(3, np.uint64), 2.5, 0, "not 2.5"),
        (np.zeros(3, np.uint64), 4, 4, "0 to the number of hashes, 3, not 4"),
        (np.zeros(3, np.uint64), 4, -1, "not -1"),
    ],
)
def test_bad_arguments(hashes: Hashes, max_distance: int, fixed: int, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        near_hashes(hashes, max_distance, fixed=fixed)


# ------------------------------------------------------------------------------------------------------- the index


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 4, 7, 8, 12, 30, 64])
def test_all_pairs_of_two_sets(radius: int) -> None:
    both = groups(500, 1, 2)
    queries, references = both[:300], both[300:]
    found = set()
    for part in near_pairs(both, np.arange(300), np.arange(300, 500), radius):
        found |= set(zip(*(values.tolist() for values in part), strict=True))
    expected = {
        (query, reference, distance)
        for (query, one), (reference, other) in product(enumerate(queries.tolist()), enumerate(references.tolist()))
        if (distance := (one ^ other).bit_count()) <= radius
    }
    assert found == expected
    assert len(expected) > 20


@pytest.mark.parametrize("radius", range(0, 65, 3))
@pytest.mark.parametrize("count", [1, 1000, 10**5, 10**7])
def test_the_bands_miss_nothing(radius: int, count: int) -> None:
    plan = plan_bands(count, count, radius)
    # Pigeonholes: a pair that each band misses differs in more than `flips` bits of each.
    assert sum(band.flips + 1 for band in plan) > radius or plan[0].width == 0
    taken = [bit for band in plan for bit in range(band.shift, band.shift + band.width)]
    assert len(taken) == len(set(taken))
    assert all(0 <= bit < 64 for bit in taken)
    for band in plan:
        if band.probes < 5000:
            masks = set(band.masks())
            assert len(masks) == band.probes == sum(math.comb(band.width, k) for k in range(band.flips + 1))
            assert all(mask.bit_count() <= band.flips and mask < 2**band.width for mask in masks)


def test_bands_where_they_pay() -> None:
    assert plan_bands(10**6, 10**6, 40)[0].width == 0
    plan = plan_bands(10**7, 10**7, 4)
    candidates = sum(10**7 * band.probes / 2**band.width for band in plan)
    assert candidates < 1000  # of ten million


@pytest.mark.parametrize("count", [popcount, multi_index._popcount_by_table])
def test_bits_are_counted(count: Any) -> None:
    values = np.concatenate([random_hashes(998, 3), np.array([0, 2**64 - 1], np.uint64)])
    expected = [value.bit_count() for value in values.tolist()]
    assert count(values).tolist() == expected
    assert count(values.reshape(8, 125)).ravel().tolist() == expected


def test_spreading_keeps_distances() -> None:
    hashes = random_hashes(300, 0)
    moved = spread(hashes)
    assert (popcount(moved[:, None] ^ moved) == popcount(hashes[:, None] ^ hashes)).all()
    assert (moved != hashes).any()


# ------------------------------------------------------------------------------------------------------ hexadecimal


def test_hexadecimal_as_imagehash_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "_TEXTS_AT_ONCE", 7)
    bits = np.random.default_rng(0).random((20, 8, 8)) < 0.5
    texts = [str(imagehash.ImageHash(one)) for one in bits]
    hashes = hashes_from_hex(texts)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [int(text, 16) for text in texts]
    for column in (pa.array(texts, pa.large_string()), pa.chunked_array([texts[:3], [], texts[3:]], pa.string())):
        assert hashes_from_hex(column).tolist() == hashes.tolist()
    for (one, other), (first, second) in zip(product(bits[:5], bits), product(hashes[:5], hashes), strict=True):
        assert int(first ^ second).bit_count() == imagehash.ImageHash(one) - imagehash.ImageHash(other)
    assert hashes_from_hex([]).tolist() == []


@pytest.mark.parametrize(
    "odd", ["", "12", "0" * 17, "0123456789abcdeg", "0x23456789abcdef", " 123456789abcdef", "0123456789abcdef\n", None]
)
def test_what_is_no_hash(odd: Any) -> None:
    with pytest.raises(ArgumentError, match="is no 64-bit hash"):
        hashes_from_hex(["0" * 16, odd])
