"""Names: the key and extension of a tar member, and which key an id of the metadata means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image.errors import IdMismatchError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})

_DECIMAL = re.compile(r"(-?)0*([0-9]{1,20})")  # 20 digits hold every 64-bit integer
_SEVERAL = -2  # the place of what names several keys


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a tar member's name into key and extension, as WebDataset defines them.

    The key is the path up to the first dot of the base name, without a leading ``./``; the extension is the rest,
    lower-cased: ``a/b.Seg.png`` has the key ``a/b`` and the extension ``seg.png``.

    Returns
    -------
    tuple of str, or None
        None for a name with no extension, a folder, or a base name that begins with a dot.
    """
    if "/" not in name:
        key, _, extension = name.partition(".")
        return (key, extension.lower()) if key and extension else None
    start = 0
    while name.startswith("./", start):
        start += 2
    name = name[start:]
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or dot == len(name) - 1:
        return None
    return name[:dot], name[dot + 1 :].lower()


def own_extension(name: str) -> str:
    """Return what is behind the first dot of a member's base name, in the case that it has."""
    return name[name.index(".", name.rfind("/") + 1) + 1 :]


def match_ids(ids: Iterable[Any], keys: Sequence[str], *, base_names: bool = True) -> npt.NDArray[np.int64]:
    """Find the key that each id names.

    A string names the key that equals it, or else the one key whose base name (``b`` of ``a/b``) equals it. An
    integer, or a float that nulls made of one, names the key (or else the base name) that is a decimal number of that
    value, zero-padded or not. Anything else, and a float too large to be exact, names none.

    Parameters
    ----------
    ids : iterable of length n
        Strings, numbers, None or NaN; a list, array or series.
    keys : sequence of str
    base_names : bool
        Whether base names count.

    Returns
    -------
    array of int64, shape (n,)
        The key's position, -1 for none.

    Raises
    ------
    IdMismatchError
        If an integer names several keys.
    """
    table = _Keys(keys, base_names)
    found = [
        -1 if value is None else table.of_text(value) if isinstance(value, str) else table.of_number(value)
        for value in plain_ids(ids)
    ]
    return np.array(found, np.int64)


def plain_ids(ids: Iterable[Any]) -> list[str | int | None]:
    """Return ids as strings, integers and, for what can name nothing, None.

    Parameters
    ----------
    ids : iterable
        As for :func:`match_ids`.
    """
    kind = getattr(ids, "dtype", None)
    kind = getattr(kind, "numpy_dtype", kind)  # pandas' own dtypes
    digits = np.finfo(kind).nmant + 1 if isinstance(kind, np.dtype) and kind.kind == "f" else 53
    exact_below = 2.0 ** min(digits, 53)
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    usual = (str, int)
    return [value if type(value) in usual else _unusual_id(value, exact_below) for value in values]


def _unusual_id(value: Any, exact_below: float) -> str | int | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < exact_below else None
    return None


class _Keys:
    """Positions of keys by name, by base name and by value; each table is made when it is first needed."""

    def __init__(self, keys: Sequence[str], base_names: bool) -> None:
        self._use_base_names = base_names
        self._names: dict[str, int] = {}
        for place, key in enumerate(keys):
            self._names.setdefault(key, place)
        self._base_names: dict[str, int] | None = None
        self._numbers: dict[int, int] | None = None
        self._base_numbers: dict[int, int] | None = None

    def of_text(self, text: str) -> int:
        place = self._names.get(text)
        if place is not None or not self._use_base_names:
            return -1 if place is None else place
        if self._base_names is None:
            self._base_names = {}
            for key, position in self._names.items():
                base = key.rpartition("/")[2]
                self._base_names[base] = _SEVERAL if base in self._base_names else position
        return max(self._base_names.get(text, -1), -1)

    def of_number(self, number: int) -> int:
        if self._numbers is None:
            self._numbers = _by_value(self._names.items())
        place = self._numbers.get(number)
        if place is None and self._use_base_names:
            if self._base_numbers is None:
                self._base_numbers = _by_value((key.rpartition("/")[2], place) for key, place in self._names.items())
            place = self._base_numbers.get(number)
        if place == _SEVERAL:
            raise IdMismatchError(
                f"the id {number} names several samples, {self._named(number)}: give ids that equal the keys as strings"
            )
        return -1 if place is None else place

    def _named(self, number: int) -> str:
        keys = [key for key in self._names if number in (_value(key), _value(key.rpartition("/")[2]))]
        return ", ".join(map(repr, keys[:5]))


def _by_value(names: Iterable[tuple[str, int]]) -> dict[int, int]:
    table: dict[int, int] = {}
    for name, place in names:
        value = _value(name)
        if value is not None:
            table[value] = _SEVERAL if value in table else place
    return table


def _value(name: str) -> int | None:
    if name.isdigit() and name.isascii() and len(name) <= 20:
        return int(name)
    match = _DECIMAL.fullmatch(name)
    return int(match[1] + match[2]) if match else None
