"""Plan an export: which selected samples go into which output shard, from the counts of each source shard alone.

Unshuffled, the samples stay in order. Shuffled, the source shards are put into an order drawn from the seed and cut
into groups; the samples of each group are permuted, and outputs are cut from one group after the other. So an output
reads the source shards of one group, or of two at a border, and nobody ever holds a permutation of more than a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_image.errors import ArgumentError

GROUP = 16
"""Source shards whose samples are shuffled together. An output reads rows and samples of that many: more shuffle
better, and have each source's Parquet file read by as many more outputs."""

Positions = npt.NDArray[np.int64]


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
    positions: Positions
    places: Positions


@dataclass(frozen=True)
class Stretch:
    """A stretch of the samples of some source shards taken together: what an output shard has of one group.

    Attributes
    ----------
    sources : tuple of int
        Their numbers.
    counts : tuple of int
        Selected samples of each.
    first, last : int
        The stretch, in samples: from `first` to before `last` of all of theirs.
    seed : tuple of int, or None
        The seed and the group's number: permute the samples first.
    """

    sources: tuple[int, ...]
    counts: tuple[int, ...]
    first: int
    last: int
    seed: tuple[int, int] | None = None


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


class Plan:
    """The order of all selected samples, cut into output shards. Its size is that of the counts.

    Parameters
    ----------
    counts : sequence of int
        Selected samples of each source shard, in the order of the shards' names.
    samples_per_shard : int
    shuffle_seed : int, optional
        Shuffles; by default the samples stay in order.
    """

    def __init__(self, counts: Sequence[int], samples_per_shard: int, shuffle_seed: int | None = None) -> None:
        every = np.asarray(counts, np.int64)
        self._samples_per_shard = samples_per_shard
        self._seed = shuffle_seed
        self._order = np.flatnonzero(every)
        if shuffle_seed is not None:
            self._order = _generator(shuffle_seed).permutation(self._order)
        self._counts = every[self._order]
        self._ends = np.cumsum(self._counts)
        self.total = int(self._ends[-1]) if len(self._ends) else 0
        # A group is never less than an output on average: where an output needs more sources, it shuffles them all.
        n_groups = min(-(-len(self._order) // GROUP), max(1, self.total // samples_per_shard))
        self._edges = np.arange(n_groups + 1, dtype=np.int64) * len(self._order) // max(1, n_groups)
        self._group_ends = self._ends[self._edges[1:] - 1]

    def __len__(self) -> int:
        """Return the number of output shards."""
        return count_outputs(self.total, self._samples_per_shard)

    def stretches(self, number: int) -> list[Stretch]:
        """Return what output shard `number` consists of; :func:`takes_of` says it sample by sample."""
        first = number * self._samples_per_shard
        last = min(first + self._samples_per_shard, self.total)
        if self._seed is None:
            return [self._stretch(*self._between(self._ends, first, last), first, last, None)]
        found = []
        low, high = self._between(self._group_ends, first, last)
        for group in range(low, high):
            begin, stop = int(self._edges[group]), int(self._edges[group + 1])
            from_, to = max(first, self._start(begin)), min(last, int(self._ends[stop - 1]))
            found.append(self._stretch(begin, stop, from_, to, (self._seed, group)))
        return found

    @staticmethod
    def _between(ends: Positions, first: int, last: int) -> tuple[int, int]:
        low, high = np.searchsorted(ends, [first, last - 1], side="right")
        return int(low), int(high) + 1

    def _start(self, source: int) -> int:
        return int(self._ends[source] - self._counts[source])

    def _stretch(self, begin: int, stop: int, first: int, last: int, seed: tuple[int, int] | None) -> Stretch:
        sources, counts = self._order[begin:stop].tolist(), self._counts[begin:stop].tolist()
        before = self._start(begin)
        return Stretch(tuple(sources), tuple(counts), first - before, last - before, seed)


def takes_of(stretches: Sequence[Stretch]) -> list[Take]:
    """Return what an output shard takes from each source shard; sources of which it takes nothing are left out."""
    takes = []
    place = 0
    for stretch in stretches:
        counts = np.asarray(stretch.counts, np.int64)
        ends = np.cumsum(counts)
        if stretch.seed is None:
            wanted = np.arange(stretch.first, stretch.last, dtype=np.int64)
        else:
            seed, group = stretch.seed
            wanted = _generator(seed, group).permutation(int(ends[-1]))[stretch.first : stretch.last]
        sources = np.searchsorted(ends, wanted, side="right")
        for source in np.unique(sources).tolist():
            found = np.flatnonzero(sources == source)
            positions = wanted[found] - (ends[source] - counts[source])
            takes.append(Take(stretch.sources[source], positions, place + found.astype(np.int64)))
        place += len(wanted)
    return takes


def _generator(seed: int, *group: int) -> np.random.Generator:
    """Return the generator of the order of the source shards, or of the samples of one group of them."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=group)))
