"""Plan an export: which selected samples go into which output shard, from the counts of each source shard alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_image.errors import ArgumentError


@dataclass(frozen=True)
class Take:
    """Selected samples of one source shard.

    Attributes
    ----------
    source : int
        The shard's number in the plan's order.
    positions : ndarray of int64
        Which of its selected samples, in the order of their offset in the tar.
    places : ndarray of int64
        Their places in the output shard.
    """

    source: int
    positions: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Naming:
    """How output shards and their samples are named.

    Attributes
    ----------
    shard_digits, offset_digits : int
    """

    shard_digits: int
    offset_digits: int

    def shard(self, number: int) -> str:
        """Return an output shard's name."""
        return f"{number:0{self.shard_digits}d}"

    def sample(self, number: int, place: int) -> str:
        """Return a sample's new id: the shard's number, then its place in it."""
        return f"{self.shard(number)}{place:0{self.offset_digits}d}"


def make_naming(total: int, samples_per_shard: int, max_shards: int) -> Naming:
    """Return the names for `total` samples.

    Raises
    ------
    ArgumentError
        If `max_shards` digits are too few for the output shards.
    """
    shards = count_outputs(total, samples_per_shard)
    if shards > 10**max_shards:
        raise ArgumentError(
            f"{total} samples at {samples_per_shard} a shard make {shards} shards, which {max_shards} digits cannot "
            "number: "
            f"give max_shards={len(str(shards - 1))}"
        )
    return Naming(max_shards, len(str(samples_per_shard - 1)))


def count_outputs(total: int, samples_per_shard: int) -> int:
    """Return the number of output shards."""
    return -(-total // samples_per_shard)


def takes_of(counts: Sequence[int], number: int, samples_per_shard: int, shuffle_seed: int | None) -> list[Take]:
    """Return what output shard `number` takes from each source shard.

    Parameters
    ----------
    counts : sequence of int
        Selected samples of each source shard, in the order of the shards' names.
    shuffle_seed : int, optional
        Permutes all samples (numpy's PCG64); by default they stay in order.
    """
    ends = np.cumsum(np.asarray(counts, np.int64))
    total = int(ends[-1]) if len(ends) else 0
    first, last = number * samples_per_shard, min((number + 1) * samples_per_shard, total)
    if shuffle_seed is None:
        wanted = np.arange(first, last, dtype=np.int64)
    else:
        wanted = np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(total)[first:last]
    sources = np.searchsorted(ends, wanted, side="right")
    starts = ends - np.asarray(counts, np.int64)
    takes = []
    for source in np.unique(sources).tolist():
        places = np.flatnonzero(sources == source)
        takes.append(Take(int(source), wanted[places] - starts[source], places.astype(np.int64)))
    return takes
