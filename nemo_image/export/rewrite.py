"""Give a sample's members and its JSON their new id."""

from __future__ import annotations

import json
import math
from typing import Any

from nemo_image.schema import KEY
from nemo_image.shards.keys import own_extension


def renamed(name: str, new_key: str) -> str:
    """Return a member's name under a new key; the extension keeps its case."""
    extension = own_extension(name) if "/" in name else name.partition(".")[2]
    return f"{new_key}.{extension}"


def rewritten_json(data: bytes, fields: dict[str, Any], old_key: str, new_key: str) -> bytes | None:
    """Return a sample's JSON with its id fields replaced; None where it is no JSON object, or cannot be kept whole.

    Parameters
    ----------
    data : bytes
        The member as it is.
    fields : dict
        Fields to set: the id, and the one that keeps the old id.
    old_key, new_key : str
        A field ``key`` that says the old key gets the new one.
    """
    try:
        values = _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    if str(values.get(KEY)) == old_key:
        values[KEY] = new_key
    values |= fields
    try:
        return _ENCODER.encode(values).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can say
        return json.dumps(values).encode()
    except RecursionError:
        return None


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")  # and would be written as Infinity, which is no JSON
    return value


# json.loads and json.dumps would make one for each call that asks for anything unusual.
_DECODER = json.JSONDecoder(parse_float=_float)
_ENCODER = json.JSONEncoder(ensure_ascii=False)
