"""A shard's Parquet file: its footer, its columns, and writing it as a whole.

The footer carries our own record (key ``nemo_image``): what made each added column, the identity of the tar that it was
made from, and the shard's account of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_image import schema
from nemo_image.errors import MetadataFileError, MissingColumnError
from nemo_image.shards import files, retries
from nemo_image.shards.sources import open_file

VERSION = 1
ROW_GROUP_ROWS = 10_000

StorageOptions = Mapping[str, Any] | None


@dataclass(frozen=True)
class Footer:
    """What nemo_image says of a file in its footer.

    Attributes
    ----------
    columns : dict of str to dict
        The fingerprint of each column that nemo_image added.
    pending : dict of str to int
        Rows for which such a column is not computed yet.
    source : dict or None
        Identity (size in bytes, time, etag) of the tar that the columns were made from.
    metadata_source : dict or None
        Identity of the Parquet file that the rows came from, where that is another file.
    plan : str or None
        Token of the frame whose rows the file holds; None where it holds all rows of its source.
    record : dict
        The shard's ledger record.
    versions : dict of str to str
        The libraries that made it; recorded, never compared.
    idx_size : int or None
        Size in bytes of the index file beside the tar, where both were written with this file.
    digest : str or None
        XXH3-128 of the file's data, which is all of it before the footer.
    """

    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pending: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None
    metadata_source: Mapping[str, Any] | None = None
    plan: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    idx_size: int | None = None
    digest: str | None = None

    def to_bytes(self) -> bytes:
        """Return the footer's text."""
        values = {"version": VERSION, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        return json.dumps(values, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Footer:
        """Read :meth:`to_bytes`; fields of later versions are passed over."""
        values = json.loads(text)
        return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class FileSummary:
    """What a Parquet file's footer tells: Arrow schema, number of rows, and our record if there is one."""

    schema: pa.Schema
    rows: int
    footer: Footer | None


_known: ContextVar[dict[str, FileSummary] | None] = ContextVar("nemo_image_footers", default=None)


def read_summary(url: str, storage_options: StorageOptions = None) -> FileSummary:
    """Read a file's footer.

    Raises
    ------
    MetadataFileError
        If the file is missing or is no Parquet.
    """
    known = _known.get()
    if known is not None and url in known:
        return known[url]
    summary = _read_summary(url, storage_options)
    if known is not None:
        known[url] = summary
    return summary


@contextmanager
def remembering() -> Iterator[None]:
    """Read each file's footer once in a ``with`` block, but for those that are written in it.

    One task asks for the same few footers again and again, and on an object store each answer takes a while.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _read_summary(url: str, storage_options: StorageOptions) -> FileSummary:
    with _opened(url, storage_options) as file:
        text = (file.metadata.metadata or {}).get(schema.FOOTER_KEY)
        try:
            footer = Footer.from_bytes(text) if text else None
        except (ValueError, TypeError) as error:
            raise MetadataFileError(f"{url}: the footer's nemo_image record is garbled ({error})") from error
        return FileSummary(file.schema_arrow, file.metadata.num_rows, footer)


def summary_or_none(url: str, storage_options: StorageOptions = None) -> FileSummary | None:
    """Read a file's footer; None where there is no such file, or none that can be read."""
    try:
        if not files.exists(url, storage_options):
            return None
        return read_summary(url, storage_options)
    except MetadataFileError as error:
        if isinstance(error.__cause__, retries.GaveUpError):
            raise  # it may be good: taken for missing, what it holds would be lost
        return None


def read_table(url: str, columns: Sequence[str] | None = None, storage_options: StorageOptions = None) -> pa.Table:
    """Read a file's columns (all by default) in the order asked for.

    Raises
    ------
    MetadataFileError
        If the file is missing or is no Parquet.
    MissingColumnError
        If it lacks a column.
    """
    with _opened(url, storage_options) as file:
        names = file.schema_arrow.names
        missing = [name for name in columns or () if name not in names]
        if missing:
            raise MissingColumnError(f"{url} has no column {', '.join(map(repr, missing))}; it has {', '.join(names)}")
        return file.read(use_threads=False) if columns is None else _read(file, columns)


def read_present(
    url: str, columns: Iterable[str], storage_options: StorageOptions = None
) -> tuple[pa.Table, Sequence[str]]:
    """Read those of the columns that a file has; return them, and the names of all that it has.

    Raises
    ------
    MetadataFileError
        If the file is missing or is no Parquet.
    """
    with _opened(url, storage_options) as file:
        names: Sequence[str] = file.schema_arrow.names
        return _read(file, [name for name in columns if name in names]), names


def _read(file: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
    if not columns:
        return empty_table(file.metadata.num_rows)
    return file.read(columns=list(columns), use_threads=False).select(list(columns))


def empty_table(rows: int) -> pa.Table:
    """Return a table of `rows` rows and no columns."""
    return pa.table({"": pa.nulls(rows)}).select([])


def read_row_group(url: str, group: int, storage_options: StorageOptions = None) -> pa.Table:
    """Read one row group of a file."""
    with _opened(url, storage_options) as file:
        return file.read_row_group(group, use_threads=False)


def write_table(url: str, table: pa.Table, footer: Footer | None, storage_options: StorageOptions = None) -> int:
    """Write a table as one Parquet file, atomically, and return the number of rows that the written file counts.

    See :func:`table_writer`.
    """
    with table_writer(url, table.schema, storage_options) as writer:
        writer.write(table)
        writer.footer = footer
    return read_summary(url, storage_options).rows


class TableWriter:
    """Writes a Parquet file piece by piece, in row groups of `ROW_GROUP_ROWS` whatever the pieces are.

    Attributes
    ----------
    rows : int
        Written so far.
    footer : Footer or None
        To be set before the end; `digest` of what was written is added to it.
    """

    def __init__(self, writer: pq.ParquetWriter, arrow_schema: pa.Schema) -> None:
        self.rows = 0
        self.footer: Footer | None = None
        self._writer = writer
        self._schema = arrow_schema
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0

    def write(self, table: pa.Table) -> None:
        """Add rows; their columns are the file's, in its order."""
        table = table.replace_schema_metadata(self._schema.metadata)
        self._waiting.append(table)
        self._waiting_rows += len(table)
        self.rows += len(table)
        if self._waiting_rows >= ROW_GROUP_ROWS:
            self._write_groups(self._waiting_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS)

    def close(self) -> None:
        """Write the rows that are left."""
        if self._waiting_rows or not self.rows:
            self._write_groups(self._waiting_rows)

    def _write_groups(self, rows: int) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else self._schema.empty_table()
        self._writer.write_table(table.slice(0, rows), row_group_size=ROW_GROUP_ROWS)
        rest = table.slice(rows)
        self._waiting, self._waiting_rows = [rest] if len(rest) else [], len(rest)


@contextmanager
def table_writer(url: str, arrow_schema: pa.Schema, storage_options: StorageOptions = None) -> Iterator[TableWriter]:
    """Write a Parquet file piece by piece; it appears under its name, whole, at the end of the ``with`` block.

    pandas' own schema metadata is left out: readers without nemo_image must not need our dtypes. Other metadata of
    the schema stays.
    """
    metadata = {
        key: value for key, value in (arrow_schema.metadata or {}).items() if key not in (b"pandas", schema.FOOTER_KEY)
    }
    arrow_schema = arrow_schema.with_metadata(metadata or None)
    with files.atomic_writer(url, storage_options) as out:
        hashed = files.HashedFile(out)
        with pq.ParquetWriter(hashed, arrow_schema, write_page_checksum=True) as writer:
            pieces = TableWriter(writer, arrow_schema)
            yield pieces
            pieces.close()
            if pieces.footer is not None:
                footer = replace(pieces.footer, digest=hashed.hash.hexdigest())
                writer.add_key_value_metadata({schema.FOOTER_KEY: footer.to_bytes()})
    (_known.get() or {}).pop(url, None)


def count_pending(
    table: pa.Table, made_by: Mapping[str, Mapping[str, Any]], computed: Iterable[str] = ()
) -> dict[str, int]:
    """Count, for each column, the rows that have neither a value nor a reason in ``image_error``.

    Of a column whose values may be null when they are computed (its fingerprint names another, ``computed_with``), the
    rows are counted that have no value in that other one; none where `computed` says that all rows are.

    Parameters
    ----------
    table : pyarrow.Table
    made_by : dict of str to dict
        The columns' fingerprints.
    computed : iterable of str
        The columns of which every row of `table` has just been computed.
    """
    pending = {}
    settled = set(computed)
    for name, made in made_by.items():
        tells = made.get(schema.COMPUTED_WITH, name)
        if tells not in table.column_names:
            if name in settled:
                pending[name] = 0
                continue
            tells = name
        null = table[tells].is_null()
        if schema.IMAGE_ERROR in table.column_names:
            null = pc.and_(null, table[schema.IMAGE_ERROR].is_null())
        pending[name] = 0 if name == schema.IMAGE_ERROR else int(pc.sum(null).as_py() or 0)
    return pending


def write_groups(url: str, groups: Sequence[pa.Table], storage_options: StorageOptions = None) -> None:
    """Write several tables of one schema as the row groups of one file, atomically."""
    with files.atomic_writer(url, storage_options) as out, pq.ParquetWriter(out, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, len(group)))


def open_parquet(url: str, storage_options: StorageOptions = None, buffer_size: int = 0) -> pq.ParquetFile:
    """Open a Parquet file; ``close(force=True)`` gives it back.

    Parameters
    ----------
    buffer_size : int
        Bytes of a column that are read at once; 0 reads a row group's columns whole.

    Raises
    ------
    MetadataFileError
        If the file is missing, is no Parquet, or has two columns of one name.
    """
    with reading(url):
        raw = open_file(url, storage_options)
        try:
            file = pq.ParquetFile(raw, buffer_size=buffer_size, pre_buffer=False, page_checksum_verification=True)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise MetadataFileError(f"{url} has more than one column {twice!r}: rename or remove one")
            return file
        except BaseException:
            raw.close()
            raise


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Name the file in whatever reading it raises."""
    try:
        yield
    except FileNotFoundError as error:
        raise MetadataFileError(f"{url}: no such file") from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
        raise MetadataFileError(f"{url}: cannot be read as Parquet ({_first_line(error)})") from error


@contextmanager
def _opened(url: str, storage_options: StorageOptions) -> Iterator[pq.ParquetFile]:
    file = open_parquet(url, storage_options)
    try:
        with reading(url):
            yield file
    finally:
        file.close(force=True)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
