"""The metadata row of each sample of a tar, in the tar's order, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets.opening import plain_schema
from nemo_image.errors import IdMismatchError, MetadataFileError
from nemo_image.shards import files, parquet
from nemo_image.shards.read import ShardReader, match_samples
from nemo_image.shards.row_reader import RowReader

WINDOW_ROWS = parquet.ROW_GROUP_ROWS
"""Rows that are in memory at once, with all their columns."""

_PYTHON_ROWS = 256  # of those, as Python's objects, which take more


class SampleRows:
    """The rows of the Parquet file beside a tar.

    Parameters
    ----------
    reader : ShardReader
        The tar.
    url : str
        The Parquet file.
    id_col : str
        The column that names a row's sample; see :func:`~nemo_image.shards.read.match_samples`.

    Attributes
    ----------
    fields : pyarrow.Schema
        The columns, without our own `shard`, in the types in which they are held.
    without_sample : int
        Rows that mean no sample of the tar.
    repeated : int
        Rows that mean a sample which a row before them means: that one counts.
    missing : int
        Samples that no row means.

    Raises
    ------
    MetadataFileError
        If the file is unreadable, or has no column `id_col`.
    IdMismatchError
        If none of its rows means a sample, or one id means several.
    """

    def __init__(self, reader: ShardReader, url: str, id_col: str) -> None:
        self.url = url
        self._storage_options = reader.storage_options
        summary = parquet.read_summary(url, self._storage_options)
        if id_col not in summary.schema.names:
            raise MetadataFileError(
                f"{url} has no column {id_col!r} (id_col); it has {', '.join(summary.schema.names)}"
            )
        ours = summary.footer is not None
        self.fields = plain_schema(pa.schema([one for one in summary.schema if not _is_our_shard(one, ours)]))
        self._row_of = self._match(reader, id_col)
        self.missing = int((self._row_of < 0).sum())

    def _match(self, reader: ShardReader, id_col: str) -> npt.NDArray[np.int64]:
        """Return the row of each sample, -1 for none."""
        column = parquet.read_table(self.url, [id_col], self._storage_options)[id_col]
        with parquet.reading(self.url):
            ids = column.to_pylist()
        found = match_samples(reader, ids, id_col)
        rows = np.flatnonzero(found >= 0)
        if len(ids) and len(reader.index) and not len(rows):
            raise IdMismatchError(
                f"none of the {len(ids)} values of {id_col!r} in {self.url} (the first is {ids[0]!r}) names a sample "
                f"of {reader.tar_url} (the first is {reader.index.samples[0].key!r}): give id_col the column that does"
            )
        samples, firsts = np.unique(found[rows], return_index=True)
        self.without_sample = len(ids) - len(rows)
        self.repeated = len(rows) - len(samples)
        row_of = np.full(len(reader.index), -1, np.int64)
        row_of[samples] = rows[firsts]
        return row_of

    def in_order(self) -> Iterator[dict[str, Any] | None]:
        """Yield the row of each sample of the tar, as plain values by column; None where there is none.

        Raises
        ------
        MetadataFileError
            If the file cannot be read to its end, or a value has no Python counterpart.
        """
        with RowReader(self.url, self.fields.names, self._storage_options) as reader:
            for start in range(0, len(self._row_of), WINDOW_ROWS):
                rows = self._row_of[start : start + WINDOW_ROWS]
                made = self._as_dicts(reader.take(rows[rows >= 0]))
                for row in rows:
                    yield next(made) if row >= 0 else None

    def _as_dicts(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        names = table.column_names
        for start in range(0, len(table), _PYTHON_ROWS):
            columns = [self._as_list(column, name) for name, column in _columns(table.slice(start, _PYTHON_ROWS))]
            for values in zip(*columns, strict=True):
                yield dict(zip(names, values, strict=True))

    def _as_list(self, column: pa.ChunkedArray, name: str) -> list[Any]:
        try:
            return _plain(column)
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise MetadataFileError(
                f"{self.url}: column {name!r} holds a value that Python has no place for ({error}): correct it, or "
                "leave the column out"
            ) from error


def rows_beside(reader: ShardReader, id_col: str) -> SampleRows | None:
    """Return the rows of the Parquet file beside a tar; None where there is no such file.

    Raises
    ------
    MetadataFileError, IdMismatchError
        As :class:`SampleRows`.
    """
    url = reader.tar_url[: -len(".tar")] + ".parquet"
    with parquet.reading(url):
        exists = files.exists(url, reader.storage_options)
    return SampleRows(reader, url, id_col) if exists else None


def _is_our_shard(field: pa.Field, ours: bool) -> bool:
    """Tell whether a column is the one in which we keep a row's shard, which each image says of itself."""
    return field.name == schema.SHARD and (ours or pa.types.is_dictionary(field.type))


def _columns(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    return zip(table.column_names, table.columns, strict=True)


def _plain(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(schema.plain_type(column.type))
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise
        stored = column.cast(pa.large_binary()).to_pylist()
        values = [None if one is None else one.decode("utf-8", "replace") for one in stored]
    return values
