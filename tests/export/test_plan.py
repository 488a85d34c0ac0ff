"""The plan: every selected sample in exactly one place, whole shards, names that fit, few sources an output."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from nemo_image.errors import ArgumentError
from nemo_image.export import plan
from nemo_image.export.plan import GROUP, Plan, make_naming, takes_of


def order_of(counts: Sequence[int], size: int, seed: int | None) -> list[list[tuple[int, int]]]:
    """Return (source, position) for each place of each output shard; fail if a place is taken twice or left out."""
    packed = Plan(counts, size, seed)
    outputs = []
    for number in range(len(packed)):
        places: dict[int, tuple[int, int]] = {}
        for take in takes_of(packed.stretches(number)):
            for place, position in zip(take.places.tolist(), take.positions.tolist(), strict=True):
                assert place not in places
                places[place] = (take.source, position)
        assert sorted(places) == list(range(len(places)))
        outputs.append([places[place] for place in range(len(places))])
    return outputs


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=60).filter(lambda counts: sum(counts) > 0),
    size=st.integers(1, 50),
    seed=st.none() | st.integers(0, 5),
)
def test_every_sample_once_and_only_the_last_shard_short(counts: list[int], size: int, seed: int | None) -> None:
    outputs = order_of(counts, size, seed)
    total = sum(counts)
    assert [len(output) for output in outputs[:-1]] == [size] * (len(outputs) - 1)
    assert len(outputs[-1]) == total - size * (len(outputs) - 1)
    seen = list(itertools.chain.from_iterable(outputs))
    everything = [(source, position) for source, count in enumerate(counts) for position in range(count)]
    assert sorted(seen) == everything
    if seed is None:
        assert seen == everything


def test_shuffled_order_is_the_one_of_the_recipe() -> None:
    """The recipe, with all samples in memory: shards in a drawn order, cut evenly, each group permuted."""
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 30, 50).tolist()
    size, seed = 20, 11
    sources = [source for source, count in enumerate(counts) if count]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(sources).tolist()
    n_groups = -(-len(order) // GROUP)
    seeds = np.random.SeedSequence(seed).spawn(n_groups)
    wanted: list[tuple[int, int]] = []
    for group in range(n_groups):
        members = order[len(order) * group // n_groups : len(order) * (group + 1) // n_groups]
        samples = [(source, position) for source in members for position in range(counts[source])]
        shuffled = np.random.Generator(np.random.PCG64(seeds[group])).permutation(len(samples))
        wanted += [samples[place] for place in shuffled]
    assert n_groups > 2
    assert list(itertools.chain.from_iterable(order_of(counts, size, seed))) == wanted


def test_few_sources_are_permuted_uniformly() -> None:
    """All 24 orders of four samples come equally often; compared by chi-squared with 23 degrees of freedom."""
    trials = 4800
    seen = Counter(tuple(order_of([2, 0, 1, 1], 4, seed)[0]) for seed in range(trials))
    everything = [(0, 0), (0, 1), (2, 0), (3, 0)]
    expected = trials / 24
    statistic = sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(everything))
    assert sum(seen.values()) == trials
    assert statistic < chi2.ppf(0.999, 23)


@given(st.lists(st.integers(50, 100), min_size=1, max_size=100), st.integers(0, 3))
def test_an_output_reads_the_sources_of_two_groups_at_most(counts: list[int], seed: int) -> None:
    packed = Plan(counts, 50, seed)
    for number in range(len(packed)):
        stretches = packed.stretches(number)
        assert len(stretches) <= 2
        assert all(len(stretch.sources) <= GROUP for stretch in stretches)


def test_outputs_of_many_small_sources_are_mixed_throughout() -> None:
    """What an output needs more sources for than a group has is one group: no order of smaller groups inside it."""
    packed = Plan([10] * 1000, 5000, 1)
    assert [len(packed.stretches(number)) for number in range(len(packed))] == [1, 1]
    assert [len(packed.stretches(number)[0].sources) for number in range(len(packed))] == [500, 500]


def test_ten_thousand_million_samples_in_a_million_outputs() -> None:
    """The client holds what the counts take, some numbers a source, and a worker a group of samples."""
    counts = np.full(1_000_000, 10_000)
    tracemalloc.start()
    try:
        packed = Plan(counts, 10_000, 7)
        assert (packed.total, len(packed)) == (10**10, 10**6)
        touched = [packed.stretches(number) for number in (0, 499_999, 999_999)]
        assert tracemalloc.get_traced_memory()[1] < 8 * 8 * len(counts)  # bytes
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for stretches in touched:
            takes = takes_of(stretches)
            assert sum(len(take.places) for take in takes) == 10_000
            assert len(takes) <= 2 * GROUP
        assert tracemalloc.get_traced_memory()[1] - before < 8 * 4 * GROUP * 10_000
    finally:
        tracemalloc.stop()


def test_groups_and_seeds_draw_differently() -> None:
    size = 100
    orders = [tuple(p for _, p in output) for seed in (0, 1) for output in order_of([size] * 2 * GROUP, size, seed)]
    assert len(set(orders)) == len(orders) == 4 * GROUP


def test_names() -> None:
    naming = make_naming(total=25, samples_per_shard=10, max_shards=3)
    assert naming.shard(2) == "002"
    assert naming.sample(2, 4) == "0024"
    assert make_naming(1, 10_000, 5).sample(1, 9999) == "000019999"
    assert make_naming(1, 10_001, 5).sample(0, 7) == "0000000007"


def test_too_few_digits() -> None:
    assert make_naming(10, 1, 1).shard(9) == "9"
    with pytest.raises(ArgumentError, match="max_shards=2"):
        make_naming(11, 1, 1)


def test_nothing_selected() -> None:
    assert len(Plan([0, 0], 5, 1)) == 0
    assert plan.count_outputs(0, 5) == 0
