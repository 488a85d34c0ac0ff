"""Groups of copies: how many there are, how large, and the members of a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from nemo_image import schema

Hashes = npt.NDArray[np.uint64]
Sizes = npt.NDArray[np.int64]

GROUPS = 2**20
"""Groups whose sizes are kept: 16 bytes each. Of more, every second is left out until they fit, chosen by a hash."""


@dataclass
class GroupSizes:
    """The copies of each row that has any.

    A group is known by a hash of whose copies they are, so that its copies are counted together wherever they lie.

    Attributes
    ----------
    halvings : int
        Of ``2 ** halvings`` groups, one is counted here: with all its copies.
    hashes : ndarray of uint64, shape (n,)
        Ascending.
    copies : ndarray of int64, shape (n,)
        Without the row that is kept.
    """

    halvings: int = 0
    hashes: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    copies: Sizes = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, frame: pd.DataFrame) -> GroupSizes:
        """Count the copies in a frame."""
        places, hashes = group_hashes(frame)
        if not len(places):
            return cls()
        found, counts = np.unique(hashes, return_counts=True)
        return cls(0, found, counts.astype(np.int64))._fitted()

    @classmethod
    def merged(cls, parts: Sequence[GroupSizes]) -> GroupSizes:
        """Add parts."""
        halvings = max(part.halvings for part in parts)
        parts = [part._halved(halvings) for part in parts]
        hashes, places = np.unique(np.concatenate([part.hashes for part in parts]), return_inverse=True)
        copies = np.zeros(len(hashes), np.int64)
        np.add.at(copies, places.reshape(-1), np.concatenate([part.copies for part in parts]))
        return cls(halvings, hashes, copies)._fitted()

    @property
    def is_exact(self) -> bool:
        """Whether all groups are counted."""
        return self.halvings == 0

    @property
    def count(self) -> int:
        """Groups: an estimate where not all are counted."""
        return len(self.hashes) << self.halvings

    def choose(self, n: int) -> list[tuple[int, int]]:
        """Return hash and copies of groups to show: the largest, and as many by chance; `n` in all at most."""
        largest = np.lexsort((self.hashes, -self.copies))[: (n + 1) // 2]
        by_chance = np.setdiff1d(np.arange(min(len(self.hashes), 2 * n)), largest)[: n - len(largest)]
        return [(int(self.hashes[place]), int(self.copies[place])) for place in (*largest, *by_chance)]

    def _halved(self, halvings: int) -> GroupSizes:
        # The low bits: groups to show by chance are those with the smallest hashes.
        stays = self.hashes & np.uint64(2**halvings - 1) == 0
        return GroupSizes(halvings, self.hashes[stays], self.copies[stays])

    def _fitted(self) -> GroupSizes:
        found = self
        while len(found.hashes) > GROUPS:
            found = found._halved(found.halvings + 1)
        return found


def group_hashes(frame: pd.DataFrame) -> tuple[npt.NDArray[np.int64], Hashes]:
    """Return the positions of a frame's copies, and the hash of each one's group."""
    if schema.DUPLICATE_OF not in frame or schema.DUPLICATE_OF_SHARD not in frame:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    places = np.flatnonzero(frame[schema.DUPLICATE_OF].notna().to_numpy(dtype=bool))
    some = frame.iloc[places]
    of = pd.util.hash_array(some[schema.DUPLICATE_OF].astype(str).to_numpy(dtype=object), categorize=False)
    shards = pd.util.hash_array(some[schema.DUPLICATE_OF_SHARD].astype(str).to_numpy(dtype=object))
    return places, pd.util.hash_array(of ^ (shards * np.uint64(0x9E3779B97F4A7C15)))


class Members:
    """Finds the copies of some groups in a partition.

    Parameters
    ----------
    id_col : str
    hashes : sequence of int
        The groups.
    n : int
        Copies of each that are kept.
    """

    def __init__(self, id_col: str, hashes: Sequence[int], n: int) -> None:
        self.id_col = id_col
        self.hashes = np.array(sorted(hashes), np.uint64)
        self.n = n

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the first copies of each group, with its hash in the column ``group``."""
        places, hashes = group_hashes(frame)
        wanted = np.isin(hashes, self.hashes)
        rows = frame.iloc[places[wanted]].copy()
        rows[schema.SHARD] = rows[schema.SHARD].astype(str)
        rows["group"] = hashes[wanted]
        return self.first(rows)

    def first(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the first copies of each group."""
        order = rows.assign(text=rows[self.id_col].astype(str)).sort_values(["group", schema.SHARD, "text"])
        found: pd.DataFrame = order.groupby("group", sort=False).head(self.n).drop(columns="text")
        return found

    def merged(self, parts: Sequence[Any]) -> pd.DataFrame:
        """Return the first copies of each group in several partitions; what is no frame is passed over."""
        frames = [part for part in parts if isinstance(part, pd.DataFrame) and len(part)]
        return self.first(pd.concat(frames, ignore_index=True)) if frames else pd.DataFrame()
