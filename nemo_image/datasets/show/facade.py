"""What a dataset shows of itself in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_image import backend, schema
from nemo_image.datasets.show.cards import Card, RowName, card_columns, fetch_cards, short
from nemo_image.datasets.show.pieces import DuplicateGroups, Galleries, Gallery, Histograms, duplicate_groups
from nemo_image.datasets.show.plan import plan_of
from nemo_image.datasets.show.survey import Survey, survey
from nemo_image.datasets.show.thumbnails import thumbnails
from nemo_image.errors import ArgumentError, RunError

if TYPE_CHECKING:
    from nemo_image.datasets.state import DatasetState


class Showing:
    """The ``show`` methods of a dataset. Each looks at all rows but :meth:`show`; the counts are exact."""

    @property
    def state(self) -> DatasetState:
        """The dataset's parts at this moment."""
        raise NotImplementedError

    def show(self, n: int = 10) -> Gallery:
        """Show the first `n` pictures with captions and scores, in a notebook.

        Raises
        ------
        ArgumentError
            If `n` is less than 1.
        """
        _require_some(n)
        # From as many partitions as it takes: a filter may leave the first ones empty.
        return Gallery.of(backend.to_pandas(self.state.frame.head(n, npartitions=-1)), self.state.source)

    def show_scores(self, *columns: str, thresholds: Sequence[float] = ()) -> Histograms:
        """Show histograms of columns of numbers; of all scores by default.

        Parameters
        ----------
        thresholds : sequence of float
            Values to mark.

        Raises
        ------
        MissingColumnError
            If there is no such column.
        ArgumentError
            If a column holds no numbers.
        """
        names = list(columns) or list(plan_of(self.state.frame, self.state.source.id_col).scores)
        found = self._surveyed(names)
        return Histograms.of(found, names, dict.fromkeys(names, tuple(thresholds)))

    def show_around(self, column: str, threshold: float, n: int = 6) -> Galleries:
        """Show the `n` pictures just below a threshold of a score, and the `n` at or just above it.

        Raises
        ------
        MissingColumnError
            If there is no such column.
        ArgumentError
            If it holds no numbers, or `n` is less than 1.
        """
        _require_some(n)
        found = self._surveyed([column], {column: [threshold]}, n)
        below, above = found.around(column, threshold, n)
        rows = found.distributions[column].count
        passed = found.not_below[column, threshold]
        parts = {
            f"Just below {threshold:g} ({rows - passed:,} rows are below)": below,
            f"{threshold:g} and just above ({passed:,} rows are not below)": above,
        }
        return self._galleries(parts, column, found)

    def show_extremes(self, column: str, n: int = 6) -> Galleries:
        """Show the `n` pictures with the highest values of a score, and the `n` with the lowest.

        Raises
        ------
        MissingColumnError
            If there is no such column.
        ArgumentError
            If it holds no numbers, or `n` is less than 1.
        """
        _require_some(n)
        found = self._surveyed([column], {column: []}, n)
        highest, lowest = (found.extremes(column, n, greatest=greatest) for greatest in (True, False))
        return self._galleries({f"Highest {column}": highest, f"Lowest {column}": lowest}, column, found)

    def show_duplicates(self, n: int = 6, copies: int = 5) -> DuplicateGroups:
        """Show groups of copies side by side: the `n` / 2 largest, and as many drawn at random.

        Parameters
        ----------
        n : int, default 6
            Groups.
        copies : int, default 5
            Copies of each that are shown.

        Raises
        ------
        MissingColumnError
            If no deduplication has been run.
        ArgumentError
            If a number is less than 1.
        """
        _require_some(n)
        _require_some(copies, "copies")
        state = self.state
        state.require_columns([schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD])
        return duplicate_groups(state, self._surveyed([]), thumbnails, n, copies, card_columns(state.source))

    def _surveyed(
        self, columns: Sequence[str], thresholds: dict[str, Sequence[float]] | None = None, n: int = 1
    ) -> Survey:
        state = self.state
        state.require_columns(columns)
        id_col = state.source.id_col
        copies = [one for one in (schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD) if one in state.frame.columns]
        frame = state.frame[list(dict.fromkeys([schema.SHARD, id_col, *columns, *([] if columns else copies)]))]
        plan = plan_of(frame, id_col, thresholds, n)
        unfit = [one for one in columns if one not in plan.numbers]
        if unfit:
            raise ArgumentError(f"column {unfit[0]!r} holds no numbers")
        found = survey(state, plan)
        if found.failures:
            shard, cause = next(iter(found.failures.items()))
            raise RunError(
                f"{len(found.failures)} of the shards cannot be read, {shard} for one: {cause}", found.failures
            )
        return found

    def _galleries(self, parts: dict[str, list[RowName]], column: str, found: Survey) -> Galleries:
        source = self.state.source
        names = [name for some in parts.values() for name in some]
        cards = fetch_cards(names, source, thumbnails, card_columns(source))

        def valued(name: RowName) -> Card:
            card = cards[name]
            card.values = {column: short(float(found.values(name)[column])), **card.values}
            return card

        return Galleries({title: [valued(name) for name in some] for title, some in parts.items()}, column)


def _require_some(n: int, name: str = "n") -> None:
    if n < 1:
        raise ArgumentError(f"{name} must be at least 1, not {n}")
