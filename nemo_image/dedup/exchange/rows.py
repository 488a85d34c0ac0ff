"""A row's place among others: its hash, and the order in which rows are judged.

Both depend on the row's shard, id and values alone, never on the partition or the worker that it comes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from nemo_image import schema
from nemo_image.errors import ArgumentError

ORDER = "order"
"""The column of a run file with the values of the user's own column, by which its rows are judged."""

HASH = "hash"

WORDS = ("hard", "easy", "random")

Hashes = npt.NDArray[np.uint64]


def row_hashes(shards: Sequence[str], ids: Iterable[Any], seed: int) -> Hashes:
    """Return a seeded hash of each row: XXH3-64 of ``shard NUL id``, the id as text.

    Parameters
    ----------
    shards : sequence of str, of length n
    ids : iterable of int or str, of length n
    seed : int
        At least 0.

    Returns
    -------
    ndarray of uint64, shape (n,)
    """
    digest = xxhash.xxh3_64_intdigest
    texts = (f"{shard}\0{one}" for shard, one in zip(shards, ids, strict=True))
    made = (digest(text.encode("utf-8", "surrogatepass"), seed) for text in texts)
    return np.fromiter(made, np.uint64, len(shards))


@dataclass(frozen=True)
class Order:
    """Which rows are judged first, and so are kept.

    Attributes
    ----------
    name : str
        ``"hard"``, ``"easy"``, ``"random"``, ``"id"``, or the name of a column.
    column : bool
        Whether `name` names a column.
    ascending : bool
    """

    name: str
    column: bool = False
    ascending: bool = True

    @classmethod
    def of(cls, which_to_keep: Any, words: Sequence[str] = WORDS) -> Order:
        """Return the order that an argument ``which_to_keep`` means.

        Raises
        ------
        ArgumentError
            If it means none.
        """
        if isinstance(which_to_keep, str) and which_to_keep in words:
            return cls(which_to_keep, ascending=which_to_keep != "hard")
        if isinstance(which_to_keep, tuple | list) and len(which_to_keep) == 2:
            name, ascending = which_to_keep
            if isinstance(name, str) and isinstance(ascending, bool):
                return cls(name, True, ascending)
        named = ", ".join(map(repr, words))
        raise ArgumentError(
            f"which_to_keep must be {named}, or (column, ascending) such as ('aesthetic_score', False), not "
            f"{which_to_keep!r}"
        )

    @property
    def columns(self) -> list[str]:
        """The columns of the metadata that the order needs."""
        return [self.name] if self.column else []

    def sort_keys(self, *before: str) -> list[tuple[str, str]]:
        """Return the keys that put the rows of run files in this order, after the columns `before`; ties go by id."""
        keys = [*before, *([] if self.name == "id" and not self.column else [self._key]), "id", schema.SHARD]
        return [(key, "ascending" if self.ascending or key != self._key else "descending") for key in keys]

    @property
    def _key(self) -> str:
        """The column of the run files that holds the order."""
        if self.column:
            return ORDER
        return HASH if self.name == "random" else schema.CENTROID_DISTANCE

    def require_sortable(self, kind: pa.DataType) -> None:
        """Raise if values of a type have no order.

        Raises
        ------
        ArgumentError
            Naming the column.
        """
        if pa.types.is_nested(kind) or pa.types.is_null(kind) or pa.types.is_dictionary(kind):
            raise ArgumentError(f"which_to_keep: column {self.name!r} holds {kind}, which has no order to keep by")
