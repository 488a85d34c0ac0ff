"""Read one shard's metadata as the partition of a lazy frame."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import backend, schema
from nemo_image.datasets.shard_pass import ShardPass, in_window, match_rows, open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import IdMismatchError, MetadataFileError
from nemo_image.shards import files, parquet
from nemo_image.shards.read import ShardReader

logger = logging.getLogger("nemo_image")


class Here(Enum):
    """Stands for a shard in a task that is the same for all shards: the one that is being loaded."""

    HERE = "here"


HERE = Here.HERE

_loading: ContextVar[str] = ContextVar("nemo_image_loading")


@contextmanager
def loading(shard: str) -> Iterator[None]:
    """Let :data:`HERE` mean a shard in a ``with`` block."""
    token = _loading.set(shard)
    try:
        yield
    finally:
        _loading.reset(token)


class ShardLoader:
    """Loads a shard's rows: the function behind ``dd.from_map``, one partition a shard.

    ``columns`` is how Dask pushes a projection down, so that only the columns that a computation needs are read.
    """

    def __init__(self, source: DatasetSource) -> None:
        self.source = source

    def __call__(self, shard: str | Here, columns: Sequence[str] | None = None) -> Any:
        """Return the rows of `shard` as a frame of Arrow columns (or of cuDF), in the file's order."""
        if isinstance(shard, Here):
            shard = _loading.get()
        source = self.source
        wanted = [*source.schema.names, schema.SHARD] if columns is None else list(columns)
        table = self._table(shard, [name for name in wanted if name != schema.SHARD])
        under_way = in_window(source, shard)
        first = 0 if under_way is None or under_way.window is None else under_way.window[0]
        index = pd.RangeIndex(first, first + len(table))
        frame = pd.DataFrame({name: backend.series_of(table[name], index) for name in table.column_names}, index=index)
        if schema.SHARD in wanted:
            frame[schema.SHARD] = schema.shard_column(shard, len(frame))
        return self._in_kind(frame[wanted])

    def meta(self) -> Any:
        """Return the empty frame that stands for every partition."""
        frame = schema.empty_frame((field.name, schema.arrow_dtype(field.type)) for field in self.source.schema)
        frame[schema.SHARD] = schema.shard_meta()
        return self._in_kind(frame)

    def _in_kind(self, frame: pd.DataFrame) -> Any:
        return backend.to_cudf(frame) if self.source.frames == "cudf" else frame

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ShardLoader", self.source.__dask_tokenize__(), self.source.frames)

    def _table(self, shard: str, columns: list[str]) -> pa.Table:
        source = self.source
        own = [name for name in columns if not any(name in names for names in source.sidecars.values())]
        need_ids = len(own) < len(columns) or source.on_mismatch != "null"
        read = own if source.id_col in own or not need_ids else [*own, source.id_col]
        under_way = in_window(source, shard)
        table = read_rows(source, shard, read) if under_way is None else _read_window(under_way, read)
        for folder, names in source.sidecars.items():
            taken = [name for name in columns if name in names]
            if taken:
                table = _join_sidecar(source, table, folder, shard, taken)
        if source.on_mismatch != "null":
            table = self._checked(shard, table)
        return table.select(columns)

    def _checked(self, shard: str, table: pa.Table) -> pa.Table:
        source = self.source
        with open_tar(source, shard) as reader:
            found = match_rows(reader, source, shard, table[source.id_col].to_pylist()) >= 0
        if found.all():
            return table
        if source.on_mismatch == "raise":
            missing = table[source.id_col].filter(pa.array(~found))
            raise IdMismatchError(
                f"{source.parquet_url(shard)}: {len(missing)} rows have no sample in the tar, the first with "
                f"{source.id_col} {missing[0].as_py()!r} (on_mismatch='null' keeps such rows, 'drop' leaves them out)"
            )
        return table.filter(pa.array(found))


def read_rows(source: DatasetSource, shard: str, columns: Sequence[str]) -> pa.Table:
    """Read columns of a shard's own metadata, cast to the dataset's types.

    Raises
    ------
    MetadataFileError
        If the file is unreadable, or a column's values do not fit the dataset's type.
    """
    url = source.parquet_url(shard)
    if source.built_from_tars and not _exists(url, source.storage_options):
        with open_tar(source, shard) as reader:
            return _conform(metadata_of_tar(reader), source, shard, columns)
    table, present = parquet.read_present(url, columns, source.storage_options)
    _require_id(source, url, present)
    return _conform(table, source, shard, columns)


def _read_window(under_way: ShardPass, columns: Sequence[str]) -> pa.Table:
    """Read the present window's rows of columns of a shard's own metadata, as :func:`read_rows` does."""
    source, shard = under_way.source, under_way.shard
    assert under_way.window is not None
    start, stop = under_way.window
    url = source.parquet_url(shard)
    if source.built_from_tars and not _exists(url, source.storage_options):
        table = under_way.whole("metadata", lambda: read_rows(source, shard, source.schema.names))
        return table.select(columns).slice(start, stop - start)
    # The id is read along, so that there is a column that tells the number of rows.
    present = parquet.read_summary(url, source.storage_options).schema.names
    _require_id(source, url, present)
    read = [name for name in dict.fromkeys([*columns, source.id_col]) if name in present]
    return _conform(under_way.rows(url, read).read(start, stop), source, shard, columns)


def _require_id(source: DatasetSource, url: str, present: Sequence[str]) -> None:
    if source.id_col not in present:
        raise MetadataFileError(f"{url} has no column {source.id_col!r} (id_col); it has {', '.join(present)}")


def _conform(table: pa.Table, source: DatasetSource, shard: str, columns: Sequence[str]) -> pa.Table:
    arrays = []
    for name in columns:
        kind = source.schema.field(name).type
        if name not in table.column_names:
            # Absent in this shard, there in others: null, as unified schemas say.
            arrays.append(pa.nulls(len(table), kind))
            continue
        arrays.append(_cast(table[name], kind, source.parquet_url(shard), name))
    rows = len(table)
    return pa.table(dict(zip(columns, arrays, strict=True))) if columns else pa.table({"": pa.nulls(rows)}).select([])


def _cast(column: pa.ChunkedArray, kind: pa.DataType, url: str, name: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(schema.plain_type(column.type))
    try:
        # Safe casting: 3.0 becomes 3, 3.5 is refused.
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise MetadataFileError(
            f"{url}: column {name!r} is {column.type} here and {kind} in the dataset, and its values do not fit "
            f"({str(error).splitlines()[0]}); dataset.unify_schemas() finds a type for both, if there is one"
        ) from error


def _join_sidecar(source: DatasetSource, table: pa.Table, folder: str, shard: str, names: Sequence[str]) -> pa.Table:
    url = files.join(folder, shard + ".parquet")
    if not _exists(url, source.storage_options):
        for name in names:
            table = table.append_column(name, pa.nulls(len(table), source.schema.field(name).type))
        return table
    in_file = parquet.read_summary(url, source.storage_options).schema.names
    found, beside = rows_by_id(source, shard, url, table[source.id_col], [name for name in names if name in in_file])
    places = np.full(len(table), -1, np.int64)
    places[found] = np.arange(len(found))
    taken = pa.array(places, mask=places < 0)
    for name in names:
        kind = source.schema.field(name).type
        column = _cast(beside[name], kind, url, name).take(taken) if name in in_file else pa.nulls(len(table), kind)
        table = table.append_column(name, column)
    return table


def rows_by_id(
    source: DatasetSource, shard: str, url: str, ids: Any, columns: Sequence[str]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], pa.Table]:
    """Find rows of a shard's further Parquet file (a sidecar, an earlier output) by their ids.

    Parameters
    ----------
    url : str
        The file; it has the column `id_col` and `columns`.
    ids : pyarrow array
        The ids wanted.

    Returns
    -------
    found : ndarray of int64
        The positions in `ids` of those that the file has, ascending.
    table : pyarrow.Table
        The file's rows for them, in the same order.

    Raises
    ------
    IdMismatchError
        If an id stands more than once in the file.
    """
    under_way = in_window(source, shard)
    if under_way is None:
        table = parquet.read_table(url, list(dict.fromkeys([source.id_col, *columns])), source.storage_options)
        positions = id_positions(ids, table[source.id_col], url)
        found = np.flatnonzero(positions >= 0)
        return found, table.select(columns).take(pa.array(positions[found]))
    present = under_way.whole(url, lambda: parquet.read_table(url, [source.id_col], source.storage_options))
    positions = id_positions(ids, present[source.id_col], url)
    found = np.flatnonzero(positions >= 0)
    return found, under_way.rows(url, columns).take(positions[found])


def id_positions(wanted: Any, present: Any, where: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return, for each id of `wanted`, its position in `present`, or -1.

    Parameters
    ----------
    wanted, present : pyarrow array of ids
        Compared by value; as strings where their types differ.
    where : str
        The file of `present`, for the error.

    Raises
    ------
    IdMismatchError
        If an id stands more than once in `present`.
    """
    if wanted.type != present.type:
        wanted, present = wanted.cast(pa.string()), present.cast(pa.string())
    if isinstance(present, pa.ChunkedArray):
        present = present.combine_chunks()
    require_unique(present, where)
    positions = pc.index_in(wanted, value_set=present, skip_nulls=True)
    return np.asarray(pc.fill_null(positions, -1)).astype(np.int64)


def require_unique(ids: Any, where: str) -> None:
    """Raise if an id stands more than once (nulls do not count).

    Raises
    ------
    IdMismatchError
        Naming the first few.
    """
    counts = pc.value_counts(ids.drop_null())
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = ", ".join(repr(value) for value in repeated[:5].to_pylist())
        raise IdMismatchError(f"{where}: {len(repeated)} ids stand more than once, for example {first}")


def metadata_of_tar(reader: ShardReader) -> pa.Table:
    """Build a shard's metadata from its tar: ``key``, ``caption`` and the fields of each sample's JSON.

    A field whose values have no common type becomes its JSON text.
    """
    samples = reader.index.samples
    columns: dict[str, list[Any]] = {schema.KEY: [sample.key for sample in samples]}
    captions = [reader.read_caption(sample) for sample in samples]
    fields = [reader.read_json(sample) or {} for sample in samples]
    names = sorted({name for one in fields for name in one if name not in (schema.KEY, schema.SHARD)})
    for name in names:
        # Half a surrogate pair in a name is written as its escape.
        columns[name.encode("utf-8", "backslashreplace").decode()] = [one.get(name) for one in fields]
    if any(caption is not None for caption in captions):
        spoken = columns.get(schema.CAPTION, [None] * len(samples))
        columns[schema.CAPTION] = [a if a is not None else b for a, b in zip(captions, spoken, strict=True)]
    return pa.table({name: _infer(values) for name, values in columns.items()})


def _infer(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
    except UnicodeEncodeError:
        # JSON may escape half of a surrogate pair, which UTF-8 has no place for: replaced, as bad bytes are.
        return _infer([_encodable(value) for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return _as_texts(values)
    return column if _fits_parquet(column.type) else _as_texts(values)


def _as_texts(values: list[Any]) -> pa.Array:
    texts = [value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array([_encodable(text) for text in texts], pa.string())


def _fits_parquet(kind: pa.DataType) -> bool:
    """Tell whether Parquet has the type: it knows no struct without fields, which ``{}`` becomes."""
    if not pa.types.is_nested(kind):
        return True
    return kind.num_fields > 0 and all(_fits_parquet(kind.field(number).type) for number in range(kind.num_fields))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_encodable(one) for one in value]
    if isinstance(value, dict):
        return {_encodable(name): _encodable(one) for name, one in value.items()}
    return value


def _exists(url: str, storage_options: Mapping[str, Any]) -> bool:
    return files.exists(url, storage_options)
