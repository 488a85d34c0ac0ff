"""Pictures with captions and scores, for a notebook."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nemo_image import backend, schema
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.samples import samples_of_rows
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import ImageError
from nemo_image.shards.read import ShardReader

THUMBNAIL_PIXELS = 192
CAPTION_CHARACTERS = 200


@dataclass
class Card:
    """One row as it is shown: a JPEG thumbnail or the reason why there is none, the caption, and short values."""

    title: str
    jpeg: bytes | None
    reason: str | None
    caption: str | None
    values: dict[str, str]


class Gallery:
    """Cards of a dataset's rows; a notebook shows them as pictures, a terminal as text."""

    def __init__(self, cards: list[Card]) -> None:
        self.cards = cards

    @classmethod
    def of(cls, frame: pd.DataFrame, source: DatasetSource) -> Gallery:
        """Make a card of each row."""
        frame = frame.reset_index(drop=True)
        cards: dict[int, Card] = {}
        for shard, places in rows_by_shard(frame).items() if len(frame) else ():
            rows = frame.iloc[places]
            for place, card in zip(places, _cards_of_shard(source, shard, rows), strict=True):
                cards[int(place)] = card
        return cls([cards[place] for place in sorted(cards)])

    def _repr_html_(self) -> str:
        return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(map(_card_html, self.cards))}</div>'

    def __repr__(self) -> str:
        return "\n".join(
            f"{card.title}: {card.reason or card.caption or ''} {card.values or ''}".rstrip() for card in self.cards
        )


def _cards_of_shard(source: DatasetSource, shard: str, rows: pd.DataFrame) -> list[Card]:
    ids = rows[source.id_col].tolist()
    cards = []
    with ShardReader(source.tar_url(shard), source.storage_options) as reader:
        images, errors = samples_of_rows(reader, source, shard, ids)
        samples = {sample.image: sample for sample in reader.index.samples if sample.image is not None}
        for number, (_, row) in enumerate(rows.iterrows()):
            jpeg, reason, caption = None, errors.get(number), row.get(schema.CAPTION)
            if number in images:
                try:
                    jpeg = thumbnail(reader.read(images[number]))
                except ImageError as error:
                    reason = error.reason
                if caption is None or caption is pd.NA:
                    caption = reader.read_caption(samples[images[number]])
            text = None if caption is None or caption is pd.NA else str(caption)
            cards.append(Card(f"{shard}/{ids[number]}", jpeg, reason, text, _short_values(rows, row, source.id_col)))
    return cards


def thumbnail(data: bytes, pixels: int = THUMBNAIL_PIXELS) -> bytes:
    """Return a picture as a JPEG of at most `pixels` on its longer side.

    Raises
    ------
    ImageError
        If it cannot be decoded.
    """
    from PIL import Image

    from nemo_image.shards.decode import decode_rgb

    _, tensor = decode_rgb(data, decoder="pillow")
    image = Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((pixels, pixels))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def _short_values(rows: pd.DataFrame, row: pd.Series, id_col: str) -> dict[str, str]:
    hidden = {schema.SHARD, id_col, schema.CAPTION, schema.IMAGE_ERROR}
    names = [name for name in rows.columns if name not in hidden and not backend.is_embedding_dtype(rows[name].dtype)]
    return {name: _short(row[name]) for name in names if row[name] is not pd.NA and row[name] is not None}


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CAPTION_CHARACTERS else text[:CAPTION_CHARACTERS] + "…"


def _card_html(card: Card) -> str:
    if card.jpeg is not None:
        data = base64.b64encode(card.jpeg).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" style="max-width:100%" alt="">'
    else:
        picture = f"<em>{html.escape(card.reason or 'no image')}</em>"
    caption = html.escape((card.caption or "")[:CAPTION_CHARACTERS])
    values = "<br>".join(f"{html.escape(name)}: {html.escape(value)}" for name, value in card.values.items())
    style = f"width:{THUMBNAIL_PIXELS}px;font-size:12px;overflow-wrap:anywhere"
    parts = [
        picture,
        f"<div><b>{html.escape(card.title)}</b></div>",
        f"<div>{caption}</div>",
        f"<small>{values}</small>",
    ]
    return f'<div style="{style}">{"".join(parts)}</div>'
