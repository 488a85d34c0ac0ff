"""The Parquet rows of an output shard: what is known of its images, in columns of one explicit Arrow schema.

.. code-block:: text

    shard, key                      of the output
    original_shard, original_key    of the input
    caption                         if any image has one
    (metadata)                      the source's fields, and those that stages added
    width, height                   of the stored image
    image_embedding, text_embedding, clip_score, aesthetic_score, nsfw_score
                                    those that a stage makes, or that any image has
    image_error

A field of the source that has one of these names gives way, and keeps its values as ``source_<name>`` where it says
more than ours does; what is null, or equal to ours, is not repeated. Only `width` and `height` of the source stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nemo_image import schema
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.writing.arrow_columns import arrow_column, concatenated, encodable

ORIGINAL_SHARD = "original_shard"
ORIGINAL_KEY = "original_key"
SOURCE_PREFIX = "source_"

RESULTS = {
    schema.IMAGE_EMBEDDING: pa.list_(pa.float32()),
    schema.TEXT_EMBEDDING: pa.list_(pa.float32()),
    schema.CLIP_SCORE: pa.float32(),
    schema.AESTHETIC_SCORE: pa.float32(),
    schema.NSFW_SCORE: pa.float32(),
}
"""Results that are attributes of an image."""

SIZES = (schema.WIDTH, schema.HEIGHT)
_FIRST = (schema.SHARD, schema.KEY, ORIGINAL_SHARD, ORIGINAL_KEY, schema.CAPTION)
_LAST = (*SIZES, *RESULTS, schema.IMAGE_ERROR)

Columns = dict[str, pa.Array | pa.ChunkedArray]


@dataclass(slots=True)
class _Row:
    """What a row needs of an image, but for its bytes."""

    key: str
    image_id: str
    shard: str
    caption: str | None
    caption_read: str | None
    metadata: Mapping[str, Any]
    sizes: tuple[int | None, int | None]
    results: tuple[Any, ...]
    image_error: str | None


class Rows:
    """Collects the rows of one output shard."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._fields: list[pa.Schema] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, image: ImageObject, key: str, fields: pa.Schema) -> None:
        """Add an image under its key in the output; `fields` are the types of its metadata."""
        if not self._fields or self._fields[-1] is not fields:
            self._fields.append(fields)
        image.stored_size()
        vectors = [_own(image.embedding), _own(image.text_embedding)]
        self._rows.append(
            _Row(
                key,
                image.image_id,
                image.shard,
                image.caption,
                image.original_caption,
                image.metadata,
                (image.width, image.height),
                (*vectors, image.clip_score, image.aesthetic_score, image.nsfw_score),
                image.image_error,
            )
        )

    def table(self, shard: str, results: Collection[str]) -> pa.Table:
        """Return the rows as the table of an output shard that holds the images too.

        Parameters
        ----------
        shard : str
            The output's.
        results : collection of str
            Columns that stages make: they are there also if all of their values are null.
        """
        columns: Columns = {
            schema.SHARD: shard_column(shard, len(self)),
            schema.KEY: _strings(one.key for one in self._rows),
            ORIGINAL_SHARD: _strings(one.shard for one in self._rows).dictionary_encode(),
            ORIGINAL_KEY: _strings(one.image_id for one in self._rows),
        }
        if any(one.caption is not None for one in self._rows):
            columns[schema.CAPTION] = _strings(one.caption for one in self._rows)
        return self._finished(columns, results, frozenset())

    def results_table(self, shard: str, results: Collection[str], source_names: Collection[str]) -> pa.Table:
        """Return the rows as a file of results alone, to be joined with the source by its shard and key.

        Parameters
        ----------
        shard : str
            The source's.
        results : collection of str
            As for :meth:`table`.
        source_names : collection of str
            Columns that the source has, which are not repeated. A caption that a stage changed is in `new_caption`.
        """
        columns: Columns = {
            schema.SHARD: shard_column(shard, len(self)),
            schema.KEY: _strings(one.image_id for one in self._rows),
        }
        if any(one.caption != one.caption_read for one in self._rows):
            changed = (None if one.caption == one.caption_read else one.caption for one in self._rows)
            columns[free_name("new_caption", {*source_names, *self._names()})] = _strings(changed)
        return self._finished(columns, results, frozenset(source_names) - {*results})

    def _finished(self, columns: Columns, results: Collection[str], skipped: frozenset[str]) -> pa.Table:
        """Add the metadata but for the fields `skipped`, and the results."""
        values = zip(*(one.results for one in self._rows), strict=True) if self._rows else ((),) * len(RESULTS)
        made = {
            name: column
            for name, column in zip(RESULTS, values, strict=True)
            if name in results or any(value is not None for value in column)
        }
        ours: dict[str, Sequence[Any]] = {
            schema.SHARD: [one.shard for one in self._rows],
            schema.KEY: [one.image_id for one in self._rows],
            schema.CAPTION: [one.caption_read for one in self._rows],
            ORIGINAL_SHARD: (None,) * len(self),
            ORIGINAL_KEY: (None,) * len(self),
            **made,
            schema.IMAGE_ERROR: [one.image_error for one in self._rows],
        }
        self._add_metadata(columns, ours, skipped)
        for place, name in enumerate(SIZES):
            if name not in skipped:
                columns[name] = self._size(name, place)
        for name, column in made.items():
            columns[name] = _vectors(column) if pa.types.is_list(RESULTS[name]) else pa.array(column, RESULTS[name])
        columns[schema.IMAGE_ERROR] = _strings(one.image_error for one in self._rows)
        return in_order(columns, results)

    def _add_metadata(self, columns: Columns, ours: Mapping[str, Sequence[Any]], skipped: frozenset[str]) -> None:
        names = self._names()
        for name in names:
            if name in skipped or name in SIZES:
                continue
            values = [one.metadata.get(name) for one in self._rows]
            target = encodable(str(name))
            if name in ours:
                if not any(map(_says_more, values, ours[name])):
                    continue
                target = free_name(SOURCE_PREFIX + target, {*names, *columns})
            columns[free_name(target, columns)] = arrow_column(values, self._kinds(name))

    def _names(self) -> dict[str, None]:
        """Return the names of the metadata's fields: the source's in its order, then those that stages added."""
        names = {name: None for fields in self._fields for name in fields.names}
        for one in self._rows:
            names |= dict.fromkeys(one.metadata)
        return names

    def _kinds(self, name: str) -> list[pa.DataType]:
        return [fields.field(name).type for fields in self._fields if name in fields.names]

    def _size(self, name: str, place: int) -> pa.Array:
        """Return the width or height: the source's, where it has one."""
        found = [one.metadata.get(name) for one in self._rows]
        if all(value is None for value in found):
            return pa.array([one.sizes[place] for one in self._rows], pa.int32())
        values = [one.sizes[place] if value is None else value for one, value in zip(self._rows, found, strict=True)]
        return arrow_column(values, [*self._kinds(name), pa.int32()])


def merged(tables: Sequence[pa.Table], shard: str, keys: Sequence[str], results: Collection[str]) -> pa.Table:
    """Return the rows of several output shards as those of one, under new keys.

    Parameters
    ----------
    tables : sequence of pyarrow.Table
        As :meth:`Rows.table` makes them, or slices of such.
    shard : str
        The output's.
    keys : sequence of str
        The key of each row in it.
    results : collection of str
        As for :meth:`Rows.table`.
    """
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    columns: Columns = {}
    for name in names:
        parts = [table[name] if name in table.column_names else _nulls(len(table)) for table in tables]
        columns[name] = concatenated(parts)
    columns[schema.SHARD] = shard_column(shard, len(keys))
    columns[schema.KEY] = _strings(keys)
    columns[ORIGINAL_SHARD] = columns[ORIGINAL_SHARD].dictionary_encode()
    return in_order(columns, results)


def in_order(columns: Columns, results: Collection[str]) -> pa.Table:
    """Return columns as a table in the usual order; `results` that are missing are null."""
    rows = len(columns[schema.KEY])
    columns = columns | {name: pa.nulls(rows, RESULTS.get(name)) for name in results if name not in columns}
    first = [name for name in _FIRST if name in columns]
    last = [name for name in _LAST if name in columns]
    between = [name for name in columns if name not in (*first, *last)]
    return pa.table({name: columns[name] for name in (*first, *between, *last)})


def shard_column(shard: str, rows: int) -> pa.DictionaryArray:
    """Return a column that says the same shard in each row."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [encodable(shard)])


def _own(vector: Any) -> npt.NDArray[np.float32] | None:
    """Return a copy of a vector, which keeps no other vectors of its batch in memory."""
    return None if vector is None else np.array(vector, np.float32)


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name, with underscores behind it until it is free."""
    while name in taken:
        name += "_"
    return name


def _strings(values: Iterable[str | None]) -> pa.Array:
    return pa.array([encodable(value) for value in values], pa.string())


def _nulls(rows: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(rows)])


def _vectors(vectors: Sequence[npt.NDArray[np.float32] | None]) -> pa.ListArray:
    """Return embeddings as a column of lists, null where there is none."""
    lengths = [0 if one is None else len(one) for one in vectors]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = [one for one in vectors if one is not None]
    missing = pa.array([one is None for one in vectors], pa.bool_())
    flat = np.concatenate(values) if values else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=missing)


def _says_more(value: Any, own: Any) -> bool:
    """Tell whether a value of the source would be lost if ours stood alone."""
    if value is None:
        return False
    if isinstance(own, np.ndarray):
        try:
            return not np.array_equal(np.asarray(value, np.float32), own)
        except (TypeError, ValueError):
            return True
    return own is None or str(value) != str(own)
