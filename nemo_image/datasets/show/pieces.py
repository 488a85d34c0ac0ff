"""What a notebook shows, and a report holds: galleries, histograms, groups of copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from nemo_image import schema
from nemo_image.datasets.show.cards import Card, Decode, RowName, cards_of_frame, clean, fetch_cards, number_of
from nemo_image.datasets.show.charts import Chart, chart_of
from nemo_image.datasets.show.groups import Members
from nemo_image.datasets.show.render import render_piece
from nemo_image.datasets.show.survey import Survey, each_partition
from nemo_image.datasets.show.thumbnails import thumbnails
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState

COPIES_SHOWN = 5


class Piece:
    """Something that a notebook shows as HTML, and a terminal as text."""

    macro: str

    def values(self) -> dict[str, Any]:
        """Return what the template's macro takes."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return render_piece(self.macro, **self.values())


class Gallery(Piece):
    """Cards of a dataset's rows."""

    macro = "gallery"

    def __init__(self, cards: list[Card]) -> None:
        self.cards = cards

    @classmethod
    def of(cls, frame: pd.DataFrame, source: DatasetSource) -> Gallery:
        """Make a card of each row."""
        return cls(cards_of_frame(frame, source, thumbnails))

    def values(self) -> dict[str, Any]:
        """Return what the template's macro takes."""
        return {"cards": self.cards}

    def __repr__(self) -> str:
        return "\n".join(
            f"{card.title}: {card.reason or card.caption or ''} {card.values or ''}".rstrip() for card in self.cards
        )


class Galleries(Piece):
    """Several galleries, each with a heading.

    Attributes
    ----------
    parts : dict of str to list of Card
    main : str or None
        The value that stands out on each card.
    """

    macro = "galleries"

    def __init__(self, parts: Mapping[str, list[Card]], main: str | None = None) -> None:
        self.parts = dict(parts)
        self.main = main

    def values(self) -> dict[str, Any]:
        """Return what the template's macro takes."""
        return {"parts": list(self.parts.items()), "main": self.main}

    def __repr__(self) -> str:
        return "\n".join(f"{title}\n{Gallery(cards)!r}" for title, cards in self.parts.items())


class Histograms(Piece):
    """Histograms of some columns."""

    macro = "charts"

    def __init__(self, charts: list[Chart]) -> None:
        self.charts = charts

    @classmethod
    def of(cls, found: Survey, columns: Sequence[str], thresholds: Mapping[str, Sequence[float]]) -> Histograms:
        """Draw columns of a survey."""
        return cls([chart_of(clean(one, 60), found.distributions[one], thresholds.get(one, ())) for one in columns])

    def values(self) -> dict[str, Any]:
        """Return what the template's macro takes."""
        return {"charts": self.charts}

    def __repr__(self) -> str:
        lines = []
        for chart in self.charts:
            lines.append(chart.summary)
            lines += [f"  {bar.range:>24} {'█' * round(0.3 * bar.height)} {bar.count:,}" for bar in chart.bars]
        return "\n".join(lines)


@dataclass
class Group:
    """A row and its copies.

    Attributes
    ----------
    title : str
    kept : Card or None
        The row whose copies they are; None if it was not looked up.
    copies : list of Card
    more : int
        Copies that are not shown.
    """

    title: str
    kept: Card | None
    copies: list[Card] = field(default_factory=list)
    more: int = 0


class DuplicateGroups(Piece):
    """Rows and their copies, side by side."""

    macro = "groups"

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def values(self) -> dict[str, Any]:
        """Return what the template's macro takes."""
        return {"groups": self.groups}

    def __repr__(self) -> str:
        lines = []
        for group in self.groups:
            titles = ", ".join(card.title for card in group.copies)
            lines.append(f"{group.title}: {group.kept.title if group.kept else ''} <- {titles}")
        return "\n".join(lines) or "no row is another's copy"


def duplicate_groups(
    state: DatasetState, found: Survey, decode: Decode, n: int, copies: int = COPIES_SHOWN, columns: Sequence[str] = ()
) -> DuplicateGroups:
    """Return groups of copies: the largest, and as many drawn at random.

    Parameters
    ----------
    found : Survey
        Of the same dataset.
    n : int
        Groups.
    copies : int
        Copies of each that are shown.
    columns : sequence of str
        Texts to read from the shards' files.
    """
    chosen = dict(found.groups.choose(n))
    if not chosen:
        return DuplicateGroups([])
    source = state.source
    beside = [one for one in (schema.DUPLICATE_TIER, schema.MAX_SIMILARITY) if one in state.frame.columns]
    unsafe = [schema.NSFW_SCORE] if schema.NSFW_SCORE in state.frame.columns else []
    wanted = [schema.SHARD, source.id_col, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD, *beside, *unsafe]
    members = Members(source.id_col, list(chosen), copies)
    rows = members.merged(list(each_partition(state, members, list(dict.fromkeys(wanted)), "duplicates")))
    made = state.lineage.provenance.get(schema.DUPLICATE_OF, {})
    column = made.get("settings", {}).get("id_column")
    heads = {
        key: RowName(str(some[schema.DUPLICATE_OF_SHARD].iloc[0]), some[schema.DUPLICATE_OF].iloc[0], column)
        for key, some in rows.groupby("group")
    }
    ids = rows[source.id_col].tolist()
    names = [RowName(str(shard), one) for shard, one in zip(rows[schema.SHARD], ids, strict=True)]
    cards = fetch_cards([*heads.values(), *names], source, decode, columns)
    shown: dict[int, list[Card]] = {key: [] for key in chosen}
    for place, name in enumerate(names):
        card, row = cards[name], rows.iloc[place]
        values = {one: row[one] for one in beside if row[one] is not pd.NA and row[one] is not None}
        card.values = {**_short(values), **card.values}
        score = number_of(row[schema.NSFW_SCORE]) if unsafe else None
        card.unsafe = card.unsafe if score is None else score
        shown[int(row["group"])].append(card)
    return DuplicateGroups(
        [
            Group(_title(count), cards.get(heads[key]) if key in heads else None, shown[key], count - len(shown[key]))
            for key, count in chosen.items()
        ]
    )


def _title(copies: int) -> str:
    return f"{copies + 1:,} pictures, {copies:,} of them {'a copy' if copies == 1 else 'copies'}"


def _short(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{one:.4f}" if isinstance(one, float) else clean(one, 40) for name, one in values.items()}
