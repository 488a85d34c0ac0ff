"""Rows as they are shown: a small picture, its caption, a few values."""

from __future__ import annotations

import numbers
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.load import ShardLoader, read_rows
from nemo_image.datasets.samples import samples_of_rows
from nemo_image.datasets.show.thumbnails import Thumbnails
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.run import run_tasks
from nemo_image.errors import NemoImageError, one_line
from nemo_image.shards.read import ShardReader

CAPTION_CHARACTERS = 300
VALUE_CHARACTERS = 60
VALUES = 16
"""Values of a row that a card holds at most."""

_NOT_VALUES = frozenset({schema.SHARD, schema.CAPTION, schema.IMAGE_ERROR})

Decode = Callable[[Sequence[bytes | None]], Thumbnails]


@dataclass(frozen=True, slots=True)
class RowName:
    """Which row: its shard, and its id (or, where `column` is given, what it has there)."""

    shard: str
    id: Any
    column: str | None = None


@dataclass
class Card:
    """One row as it is shown: a JPEG thumbnail or the reason why there is none, the caption, and short values.

    A veiled one is blurred until the reader asks to see it. `unsafe` is the row's ``nsfw_score`` as it is stored, where
    that is known. `lost_shard` names the shard where that could not be read; `reason` is then the cause.
    """

    title: str
    jpeg: bytes | None = None
    reason: str | None = None
    caption: str | None = None
    values: dict[str, str] = field(default_factory=dict)
    veiled: bool = False
    unsafe: float | None = None
    lost_shard: str | None = None

    @property
    def alt(self) -> str:
        """What the picture shows, for those who do not see it."""
        return f"Picture {self.title}" + (f": {self.caption[:120]}" if self.caption else "")


def cards_of_frame(frame: pd.DataFrame, source: DatasetSource, decode: Decode) -> list[Card]:
    """Return a card of each row of a computed frame, in its order, with the values that it has there."""
    frame = frame.reset_index(drop=True)
    ids = frame[source.id_col].tolist()
    cards: dict[int, Card] = {}
    for shard, places in rows_by_shard(frame).items() if len(frame) else ():
        names = [RowName(shard, ids[place]) for place in places]
        for place, card in zip(places, FetchCards(source, decode)(names), strict=True):
            row = frame.iloc[place]
            if schema.CAPTION in frame.columns and is_text(row[schema.CAPTION]):
                card.caption = clean(row[schema.CAPTION], CAPTION_CHARACTERS)
            card.values = values_of(row, source.id_col)
            cards[int(place)] = card
    return [cards[place] for place in range(len(frame))]


def fetch_cards(
    names: Iterable[RowName], source: DatasetSource, decode: Decode, columns: Sequence[str] = ()
) -> dict[RowName, Card]:
    """Return the cards of rows by their names, from the cluster if there is one: a task a shard.

    Parameters
    ----------
    columns : sequence of str
        Values to read from the shards' files.
    """
    by_shard: dict[str, list[RowName]] = defaultdict(list)
    for name in dict.fromkeys(names):
        by_shard[name.shard].append(name)
    work = FetchCards(source, decode, columns)
    found: dict[RowName, Card] = {}
    for cards in run_tasks(_Named(work), list(by_shard.values()), on_error=_lost, count=len(by_shard)):
        found.update(cards)
    return found


class _Named:
    """Returns cards by their names."""

    task_name = "nemo-image-pictures"

    def __init__(self, fetch: FetchCards) -> None:
        self.fetch = fetch

    def __call__(self, names: Sequence[RowName]) -> dict[RowName, Card]:
        try:
            return dict(zip(names, self.fetch(names), strict=True))
        except NemoImageError as error:
            return _lost(names, error)


def _lost(names: Sequence[RowName], error: BaseException) -> dict[RowName, Card]:
    reason = clean(one_line(error), CAPTION_CHARACTERS)
    return {name: Card(_title(name), reason=reason, lost_shard=name.shard) for name in names}


class FetchCards:
    """Makes the cards of rows of one shard: reads their pictures and captions from its tar.

    Parameters
    ----------
    source : DatasetSource
    decode : callable
        From pictures' bytes to thumbnails.
    columns : sequence of str
        Values to read from the shard's own file.
    """

    def __init__(self, source: DatasetSource, decode: Decode, columns: Sequence[str] = ()) -> None:
        self.source = source
        self.decode = decode
        self.columns = list(columns)

    def __call__(self, names: Sequence[RowName]) -> list[Card]:
        """Return the card of each row."""
        source, shard = self.source, names[0].shard
        names = self._by_id(shard, names)
        cards = [Card(_title(name)) for name in names]
        with ShardReader(source.tar_url(shard), source.storage_options) as reader:
            images, errors = samples_of_rows(reader, source, shard, [name.id for name in names])
            samples = {sample.image: sample for sample in reader.index.samples if sample.image is not None}
            blobs = [reader.read(images[row]) if row in images else None for row in range(len(names))]
            for row, member in images.items():
                caption = reader.read_caption(samples[member])
                cards[row].caption = None if caption is None else clean(caption, CAPTION_CHARACTERS)
        made = self.decode(blobs)
        for row, card in enumerate(cards):
            card.jpeg = made.jpegs[row]
            reason = errors.get(row) or made.errors[row]
            card.reason = None if reason is None else clean(reason, CAPTION_CHARACTERS)
        if self.columns:
            self._add_values(shard, names, cards)
        return cards

    def _by_id(self, shard: str, names: Sequence[RowName]) -> list[RowName]:
        """Find the ids of rows that are named by another column."""
        columns = {name.column for name in names} - {None, self.source.id_col}
        known: dict[tuple[str, str], Any] = {}
        for column in columns:
            assert column is not None
            table = read_rows(self.source, shard, [self.source.id_col, column])
            pairs = zip(table[column].to_pylist(), table[self.source.id_col].to_pylist(), strict=True)
            known |= {(column, str(value)): one for value, one in pairs}
        return [
            name if name.column in (None, self.source.id_col)
            else RowName(shard, known.get((str(name.column), str(name.id)), name.id))
            for name in names
        ]  # fmt: skip

    def _add_values(self, shard: str, names: Sequence[RowName], cards: Sequence[Card]) -> None:
        own = [one for one in self.columns if not any(one in taken for taken in self.source.sidecars.values())]
        table = read_rows(self.source, shard, list(dict.fromkeys([self.source.id_col, *own])))
        places = {str(value): place for place, value in enumerate(table[self.source.id_col].to_pylist())}
        taken = [places.get(str(name.id)) for name in names]
        rows = table.take(pa.array(taken, pa.int64())).to_pylist()
        beside = self._unsafe_beside(shard)
        for name, card, row in zip(names, cards, rows, strict=True):
            caption = row.get(schema.CAPTION)
            if card.caption is None and is_text(caption):
                card.caption = clean(caption, CAPTION_CHARACTERS)
            if is_text(row.get(schema.IMAGE_ERROR)):
                card.reason = clean(row[schema.IMAGE_ERROR], CAPTION_CHARACTERS)
            card.values = values_of(row, self.source.id_col)
            card.unsafe = number_of(beside.get(str(name.id), row.get(schema.NSFW_SCORE)))

    def _unsafe_beside(self, shard: str) -> dict[str, Any]:
        """Return the ``nsfw_score`` of a shard's rows by their ids, if a sidecar has it."""
        source = self.source
        if not any(schema.NSFW_SCORE in names for names in source.sidecars.values()):
            return {}
        frame = backend.to_pandas(ShardLoader(source)(shard, [source.id_col, schema.NSFW_SCORE]))
        ids, scores = (backend.arrow_values(frame[name]).to_pylist() for name in (source.id_col, schema.NSFW_SCORE))
        return {str(one): score for one, score in zip(ids, scores, strict=True)}


def values_of(row: Mapping[str, Any] | pd.Series, id_col: str) -> dict[str, str]:
    """Return a row's short values as text; not what a card says elsewhere, nor lists."""
    found = {}
    for name, value in row.items():
        if (
            name in _NOT_VALUES
            or name == id_col
            or value is None
            or value is pd.NA
            or not pd.api.types.is_scalar(value)
        ):
            continue
        found[clean(name, VALUE_CHARACTERS)] = short(value)
        if len(found) == VALUES:
            break
    return found


def card_columns(source: DatasetSource) -> list[str]:
    """Return the columns whose values cards read from the shards' files: the first ones, but for lists."""
    hidden = {source.id_col, schema.SHARD, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD}
    own = {*_NOT_VALUES, *hidden}
    names = [one.name for one in source.schema if not pa.types.is_nested(one.type)]
    always = [name for name in (schema.CAPTION, schema.IMAGE_ERROR, schema.NSFW_SCORE) if name in names]
    return list(dict.fromkeys([*always, *[name for name in names if name not in own][: 2 * VALUES]]))


def short(value: Any) -> str:
    """Return a value as a short text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(f"{value:.4g}" if isinstance(value, float) else str(value), VALUE_CHARACTERS)


def number_of(value: Any) -> float | None:
    """Return a cell's number; None if it holds something else."""
    return None if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)


def clean(text: Any, characters: int) -> str:
    """Return the beginning of a text in one line, without characters that no page may hold.

    What controls direction stays out too: each text is set in its own direction, and must not turn its neighbours'.
    """
    start = str(text)[: 4 * characters]
    kept = "".join(one if unicodedata.category(one) not in ("Cc", "Cs", "Cn") else " " for one in start)
    line = " ".join("".join(one for one in kept if one not in _DIRECTIONS).split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_text(value: Any) -> bool:
    """Tell whether a cell holds a text."""
    return isinstance(value, str)


def _title(name: RowName) -> str:
    return clean(f"{name.shard}/{name.id}", 2 * VALUE_CHARACTERS)
