"""Where the caption of a picture is found: beside it in the tar, in its JSON, or in a column of the metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nemo_image import schema
from nemo_image.errors import ArgumentError

MAX_CAPTIONS = 100
"""Captions of one picture that are scored; a list of more is cut."""

MAX_CHARACTERS = 2**17
"""Characters of a caption that are looked at; no tokenizer's context reaches so far."""

DEFAULT_SOURCES = (f"column:{schema.CAPTION}", "txt", f"json:{schema.CAPTION}")


@dataclass(frozen=True)
class CaptionSource:
    """One place where captions are looked for.

    Attributes
    ----------
    kind : {"txt", "json", "column"}
    name : str
        The JSON's field, or the column; empty for ``"txt"``.
    """

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind


def parse_sources(captions: str | Sequence[str]) -> tuple[CaptionSource, ...]:
    """Read the argument `captions`: ``"txt"``, ``"json:FIELD"``, ``"column:NAME"``, or several in the order to try.

    Raises
    ------
    ArgumentError
        If it says something else, or nothing.
    """
    given = [captions] if isinstance(captions, str) else list(captions)
    made = []
    for text in given:
        kind, _, name = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not (text == "txt" or (kind in ("json", "column") and name)):
            raise ArgumentError(f"captions={text!r}: say 'txt', 'json:FIELD' or 'column:NAME', or several in a list")
        made.append(CaptionSource(kind, name))
    if not made:
        raise ArgumentError("captions=[] names no source: say 'txt', 'json:FIELD' or 'column:NAME'")
    return tuple(dict.fromkeys(made))


def check_column(name: str, dtype: Any) -> None:
    """Raise if a column cannot hold captions.

    Raises
    ------
    ArgumentError
        If it holds neither texts nor lists of texts.
    """
    kind = getattr(dtype, "pyarrow_dtype", None)
    if kind is None:
        good = str(dtype) in ("object", "str", "string", "category")
    else:
        kind = schema.plain_type(kind)
        inner = kind.value_type if pa.types.is_list(kind) else kind
        good = pa.types.is_string(inner) or pa.types.is_null(inner)
    if not good:
        raise ArgumentError(f"captions='column:{name}': the column holds {dtype}, not texts or lists of texts")


def texts_of(value: Any) -> list[str]:
    """Return the captions in a value of a JSON or of a column: a text, or a list of texts; empty for what is none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [text[:MAX_CHARACTERS] if isinstance(text, str) else "" for text in values[:MAX_CAPTIONS]]


def text_of_bytes(data: bytes) -> list[str]:
    """Return the caption in a ``.txt``: UTF-8, with U+FFFD for what is none."""
    return texts_of(data[: 4 * MAX_CHARACTERS].decode("utf-8-sig", "replace"))
