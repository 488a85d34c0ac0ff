"""Small pictures for people, decoded where no picture can do harm."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_image.engine.decoding.isolated import Isolated, Parts
from nemo_image.errors import ImageError

PIXELS = 256
"""Longest side: sharp on a screen with two dots a pixel at the size at which galleries show it."""

BYTES = 24_000
"""A picture that stays larger is compressed further."""

_QUALITIES = (80, 60, 40, 20)
_MEMORY = 2 * 2**30


@dataclass
class Thumbnails:
    """Of several pictures, each as JPEG, or the reason why there is none."""

    jpegs: list[bytes | None]
    errors: list[str | None]


def thumbnail(data: bytes, pixels: int = PIXELS) -> bytes:
    """Return a picture, upright, as a JPEG of at most `pixels` on its longer side and about `BYTES` bytes.

    Nothing else of the file is kept: no EXIF, no profile.

    Raises
    ------
    ImageError
        If it cannot be decoded.
    """
    from nemo_image.shards.decode import decode_pillow

    _, image = decode_pillow(data)
    image.thumbnail((pixels, pixels))
    for quality in _QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() <= BYTES:
            break
    return out.getvalue()


def thumbnails(blobs: Sequence[bytes | None]) -> Thumbnails:
    """Return the thumbnails of several pictures; None stands for one that is not there."""
    made = Thumbnails([], [])
    for blob in blobs:
        jpeg, reason = None, None
        try:
            jpeg = None if blob is None else thumbnail(blob)
        except ImageError as error:
            reason = error.reason
        made.jpegs.append(jpeg)
        made.errors.append(reason)
    return made


def safe_thumbnails(blobs: Sequence[bytes | None]) -> Thumbnails:
    """Return the thumbnails of several pictures, made in a child process: one that crashes it costs itself only."""
    if not any(blob is not None for blob in blobs):
        return Thumbnails([None] * len(blobs), [None] * len(blobs))
    with Isolated(thumbnails, _merge, memory=_MEMORY) as decode:
        made: Thumbnails = decode(blobs)
    return made


def _merge(count: int, parts: Parts[Thumbnails]) -> Thumbnails:
    whole = Thumbnails([None] * count, [None] * count)
    for rows, part in parts:
        for place, row in enumerate(rows):
            if isinstance(part, str):
                whole.jpegs[row], whole.errors[row] = None, part
            else:
                whole.jpegs[row], whole.errors[row] = part.jpegs[place], part.errors[place]
    return whole
