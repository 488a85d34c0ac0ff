"""What goes into a list of duplicates, and what names its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import schema
from nemo_image.datasets.load import read_rows
from nemo_image.datasets.parquet_folder import Naming, RowNames
from nemo_image.datasets.source import DatasetSource
from nemo_image.dedup.exchange.scatter import ROWS
from nemo_image.dedup.hashes.hash_run import DISTANCE
from nemo_image.errors import ArgumentError
from nemo_image.shards import files, parquet

ID = "id"
RESERVED = (ID, schema.SHARD, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD)


@dataclass(frozen=True)
class Listing:
    """What goes into a list of duplicates.

    Attributes
    ----------
    found : str
        The folder of the deduplication's result.
    source : DatasetSource
        The rows that were judged.
    naming : {"id", "file", "row"}
        What names them; see :class:`~nemo_image.datasets.parquet_folder.ParquetFolder`.
    id_type : pyarrow.DataType
        Of the ids in the list.
    shards : list of str
        All of them.
    rows : int
        Of all shards.
    extras : list of str
        Columns of the result to write too.
    fields : list of str
        Columns of the rows to write too.
    token : str
        Tells this list from others.
    """

    found: str
    source: DatasetSource
    naming: Naming
    id_type: pa.DataType
    shards: Sequence[str]
    rows: int
    extras: Sequence[str]
    fields: Sequence[str]
    token: str

    @property
    def options(self) -> Mapping[str, Any]:
        """For fsspec."""
        return self.source.storage_options

    def schema(self) -> pa.Schema:
        """Return the list's columns."""
        kinds: dict[str, pa.DataType] = {ID: self.id_type}
        if self.naming != "id":
            kinds[schema.SHARD] = schema.SHARD_TYPE
        kinds[schema.DUPLICATE_OF] = self.id_type
        if self.naming != "id":
            kinds[schema.DUPLICATE_OF_SHARD] = pa.string()
        kinds |= {name: _EXTRAS[name] for name in self.extras}
        return pa.schema([*kinds.items(), *((name, self.source.schema.field(name).type) for name in self.fields)])

    def names(self, shard: str) -> pa.Array:
        """Return the names of all rows of a shard, in its order, as the result has them."""
        ids = read_rows(self.source, shard, [self.source.id_col])[self.source.id_col].combine_chunks()
        return RowNames(self.source).names(shard, ids) if self.naming == "row" else ids

    def removed(self, shard: str) -> pa.Table:
        """Return what was found of a shard's duplicates, by their names; no rows where none of its rows was judged."""
        names = [self.source.id_col, schema.IS_DUPLICATE, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD, *self.extras]
        table = parquet.read_table(files.join(self.found, ROWS, shard + ".parquet"), names, self.options)
        return table.filter(pc.fill_null(table[schema.IS_DUPLICATE], False)).drop_columns([schema.IS_DUPLICATE])


_EXTRAS = {schema.MAX_SIMILARITY: pa.float32(), schema.CLUSTER: pa.int32(), DISTANCE: pa.int32()}


def check_fields(fields: Sequence[str], extras: Sequence[str]) -> None:
    """Raise if columns cannot stand in a list beside its own.

    Raises
    ------
    ArgumentError
        Naming the first.
    """
    taken = [name for name in fields if name in (*RESERVED, *extras)]
    if taken:
        raise ArgumentError(
            f"metadata_fields: the list of duplicates has a column {taken[0]!r} of its own: leave it out"
        )


def plain(table: pa.Table) -> pa.Table:
    """Return a table with dictionaries as their values."""
    return table.cast(pa.schema([(one.name, schema.plain_type(one.type)) for one in table.schema]))
