"""Sets of ids, held compactly, and the keys that they name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from nemo_image import schema
from nemo_image.shards.keys import plain_ids

_HASHED_AT_ONCE = 10_000
_DECIMAL = re.compile(r"(-?)0*([0-9]{1,20})")  # as many digits as ids have


def number_of(key: str) -> str | None:
    """Return the decimal number that a key is, without leading zeros; None if it is none."""
    match = _DECIMAL.fullmatch(key)
    if match is None:
        return None
    return match[2] if match[2] == "0" else match[1] + match[2]


class TextSet:
    """Texts, held compactly: 8 bytes each for a hash, and Arrow's strings in the hashes' order.

    Parameters
    ----------
    texts : iterable of pyarrow array of string
        Without nulls.
    """

    def __init__(self, texts: Iterable[pa.Array | pa.ChunkedArray]) -> None:
        chunks: list[pa.Array] = []
        found = [np.zeros(0, np.uint64)]
        for one in texts:
            for chunk in pa.chunked_array(one).cast(pa.large_string()).chunks:
                chunks.append(chunk)
                # Python's own strings take five times as much: few at a time.
                for start in range(0, len(chunk), _HASHED_AT_ONCE):
                    some = chunk.slice(start, _HASHED_AT_ONCE).to_pylist()
                    found.append(np.fromiter(map(_digest, some), np.uint64, len(some)))
        hashes = np.concatenate(found)
        del found
        order = np.argsort(hashes, kind="stable")
        self._hashes: npt.NDArray[np.uint64] = hashes[order]
        self._texts = pa.chunked_array(chunks, pa.large_string()).combine_chunks().take(pa.array(order))
        del chunks
        pa.default_memory_pool().release_unused()

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def nbytes(self) -> int:
        """The memory that the texts take, in bytes."""
        return int(self._hashes.nbytes + self._texts.nbytes)

    def has(self, texts: Sequence[str | None]) -> list[bool]:
        """Tell which of some texts are in the set; None is not."""
        if not len(self):
            return [False] * len(texts)
        wanted = np.fromiter((0 if one is None else _digest(one) for one in texts), np.uint64, len(texts))
        places = np.searchsorted(self._hashes, wanted)
        near = self._hashes[np.minimum(places, len(self) - 1)] == wanted
        return [
            bool(is_near) and self._is_at(int(place), text)
            for place, is_near, text in zip(places, near, texts, strict=True)
        ]

    def _is_at(self, place: int, text: str | None) -> bool:
        """Tell whether a text is among those with the hash at a place."""
        wanted = self._hashes[place]
        while place < len(self) and self._hashes[place] == wanted:
            if self._texts[place].as_py() == text:
                return True
            place += 1
        return False


@dataclass(frozen=True)
class Ids:
    """Ids to remove: strings, which name the keys that equal them, and integers, which name zero-padded ones too."""

    texts: TextSet
    numbers: TextSet

    @classmethod
    def of(cls, columns: Iterable[pa.ChunkedArray]) -> Ids:
        """Return the ids of some columns: strings, integers, or floats that nulls made of integers."""
        texts: list[pa.ChunkedArray] = []
        numbers: list[pa.ChunkedArray | pa.Array] = []
        for column in columns:
            kind = schema.plain_type(column.type)
            if pa.types.is_string(kind):
                texts.append(column.cast(kind))
            elif pa.types.is_integer(kind):
                numbers.append(column.cast(kind).cast(pa.string()))
            else:
                found = plain_ids(column.to_numpy())
                numbers.append(pa.array([str(one) for one in found if one is not None], pa.string()))
        return cls(TextSet(texts), TextSet(numbers))

    def __len__(self) -> int:
        return len(self.texts) + len(self.numbers)


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
