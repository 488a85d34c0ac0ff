"""One Parquet file of tables that come one after the other, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets.opening import join_types
from nemo_image.errors import DatasetError
from nemo_image.shards import files, parquet

MakeFooter = Callable[[Sequence[str], int], parquet.Footer]


def write_tables(
    url: str, tables: Iterable[pa.Table], make_footer: MakeFooter, storage_options: files.StorageOptions = None
) -> int:
    """Write tables as one file, which appears whole at the end; return its number of rows.

    The file's types are those that hold the values of the first `ROW_GROUP_ROWS` rows, which the writer holds in memory
    anyway. Rows after them must fit. Where those first rows say nothing of a column's type, because it is all null, the
    other rows wait in a temporary file until the end.

    Parameters
    ----------
    tables : iterable of pyarrow.Table
        Columns may be absent from some of them.
    make_footer : callable
        Takes the columns and the number of rows.

    Raises
    ------
    DatasetError
        If a column's values have no common type.
    """
    rest = iter(tables)
    held: list[pa.Table] = []
    while sum(map(len, held)) < parquet.ROW_GROUP_ROWS and (table := next(rest, None)) is not None:
        held.append(table)
    kinds: dict[str, pa.DataType] = {}
    for table in held:
        _join(kinds, table.schema, url)
    if any(pa.types.is_null(kind) for kind in kinds.values()):
        with _spooled(rest, kinds, url) as spooled:
            return _write(url, chain(held, spooled), kinds, make_footer, storage_options)
    return _write(url, chain(held, rest), kinds, make_footer, storage_options)


def _write(
    url: str,
    tables: Iterable[pa.Table],
    kinds: dict[str, pa.DataType],
    make_footer: MakeFooter,
    storage_options: files.StorageOptions,
) -> int:
    wanted = pa.schema([(name, schema.SHARD_TYPE if name == schema.SHARD else kind) for name, kind in kinds.items()])
    with parquet.table_writer(url, wanted, storage_options) as writer:
        for table in tables:
            writer.write(_conform(table, wanted, url))
        writer.footer = make_footer(wanted.names, writer.rows)
        return writer.rows


def _join(kinds: dict[str, pa.DataType], found: pa.Schema, url: str) -> None:
    """Widen the types in `kinds` to hold the values of another table's columns."""
    for field in found:
        before = kinds.get(field.name, pa.null())
        joined = join_types(before, schema.plain_type(field.type))
        if joined is None:
            raise DatasetError(
                f"{url}: column {field.name!r} holds {before} in some rows and {field.type} in others: give it values "
                "of one type"
            )
        kinds[field.name] = joined


def _conform(table: pa.Table, wanted: pa.Schema, url: str) -> pa.Table:
    more = [name for name in table.column_names if name not in wanted.names]
    if more:
        raise DatasetError(
            f"{url}: column {more[0]!r} first appears after {parquet.ROW_GROUP_ROWS:,} rows: give all rows the same "
            "columns"
        )
    columns = []
    for field in wanted:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        try:
            columns.append(_cast(column, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DatasetError(
                f"{url}: column {field.name!r} is {field.type} in the first {parquet.ROW_GROUP_ROWS:,} rows, and later "
                f"{column.type}, with values that do not fit: give it values of one type"
            ) from error
    return pa.table(columns, schema=wanted)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(kind):
        return column.cast(kind.value_type).combine_chunks().dictionary_encode().cast(kind)
    return column.cast(kind)


@contextmanager
def _spooled(tables: Iterable[pa.Table], kinds: dict[str, pa.DataType], url: str) -> Iterator[Iterator[pa.Table]]:
    """Put tables into a temporary file, and join their types into `kinds`; give them back from there."""
    sizes: list[int] = []
    with tempfile.TemporaryFile(prefix="nemo-image-table-") as file:
        for table in tables:
            _join(kinds, table.schema, url)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
            sizes.append(file.write(sink.getvalue()))
        file.seek(0)
        yield (pa.ipc.open_stream(file.read(size)).read_all() for size in sizes)
