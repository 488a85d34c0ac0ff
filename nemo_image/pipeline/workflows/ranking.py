"""By which column similar rows are ranked, as NeMo Curator says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_image import schema
from nemo_image.errors import ArgumentError


@dataclass(frozen=True)
class RankingStrategy:
    """Which of similar rows is kept: the first by a column.

    Parameters
    ----------
    metadata_cols : sequence of str
        One column; the id may follow, by which ties go anyway. ``cosine_dist_to_cent`` is the distance from the
        centroid. No column is a seeded choice.
    ascending : bool or sequence of bool, default True
    """

    metadata_cols: Sequence[str] = ()
    ascending: bool | Sequence[bool] = True

    @classmethod
    def metadata_based(cls, metadata_cols: Sequence[str], ascending: bool | Sequence[bool] = True) -> RankingStrategy:
        """Return the order by a column."""
        return cls(metadata_cols, ascending)

    @classmethod
    def random(cls) -> RankingStrategy:
        """Return a seeded choice; `random_state` is the seed."""
        return cls()

    def which_to_keep(self, id_field: str) -> str | tuple[str, bool]:
        """Return the same as ``which_to_keep`` says it.

        Raises
        ------
        ArgumentError
            If it goes by several columns.
        """
        names = list(self.metadata_cols)
        up = [self.ascending] * len(names) if isinstance(self.ascending, bool) else list(self.ascending)
        if len(up) != len(names):
            raise ArgumentError(f"ranking_strategy: {len(names)} columns, but ascending={self.ascending!r}")
        if len(names) == 2 and names[1] in (id_field, "id") and up[1]:
            names, up = names[:1], up[:1]
        if not names:
            return "random"
        if len(names) > 1:
            raise ArgumentError(
                f"ranking_strategy: rows are ranked by one column (ties go by id), not by {', '.join(names)}: make one "
                "column of them"
            )
        if names[0] == schema.CENTROID_DISTANCE:
            return "easy" if up[0] else "hard"
        return names[0], up[0]


def ranked(strategy: Any, which_to_keep: Any, id_field: str) -> str | tuple[str, bool]:
    """Return ``which_to_keep`` for a strategy: ours, or any object with its attributes.

    Raises
    ------
    ArgumentError
        If it is none, or `which_to_keep` is given too.
    """
    if which_to_keep != "hard":
        raise ArgumentError("give which_to_keep or ranking_strategy, not both")
    names = getattr(strategy, "metadata_cols", None)
    if names is None or not hasattr(strategy, "ascending"):
        raise ArgumentError(f"ranking_strategy must be a RankingStrategy, not {strategy!r}")
    return RankingStrategy(names, strategy.ascending).which_to_keep(id_field)
