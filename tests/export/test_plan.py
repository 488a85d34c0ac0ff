"""The plan: every selected sample in exactly one place, whole shards, names that fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_image.errors import ArgumentError
from nemo_image.export.plan import count_outputs, make_naming, takes_of


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0),
    size=st.integers(1, 15),
    seed=st.none() | st.integers(0, 5),
)
def test_every_sample_once_and_only_the_last_shard_short(counts: list[int], size: int, seed: int | None) -> None:
    seen = []
    outputs = count_outputs(sum(counts), size)
    for number in range(outputs):
        takes = takes_of(counts, number, size, seed)
        places = np.concatenate([take.places for take in takes])
        length = size if number < outputs - 1 else sum(counts) - size * (outputs - 1)
        assert sorted(places.tolist()) == list(range(length))
        order: dict[int, tuple[int, int]] = {}
        for take in takes:
            positions = zip(take.places.tolist(), take.positions.tolist(), strict=True)
            order |= {place: (take.source, position) for place, position in positions}
        seen += [order[place] for place in range(length)]
    everything = [(source, position) for source, count in enumerate(counts) for position in range(count)]
    assert sorted(seen) == everything
    if seed is None:
        assert seen == everything


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
