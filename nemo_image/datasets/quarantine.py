"""Bad images in one place: ids, reasons, where their bytes lie, and the bytes themselves if asked for.

One Parquet file a shard that has any, ``_nemo_image/quarantine/<shard>.parquet``, made from the shard's finished
metadata and tar alone. So it can be made again at any time, and a run that finds it missing does so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.samples import samples_of_rows
from nemo_image.datasets.shard_pass import open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import TarError
from nemo_image.shards import files, parquet
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader
from nemo_image.shards.row_reader import PIECE_ROWS, RowReader

QUARANTINE = "quarantine"
MEMBER, OFFSET, SIZE, IMAGE = "member", "offset", "size", "image_bytes"

_PIECE_BYTES = 32 * 2**20
"""Bytes of images that are held at once."""


def count_bad(failures: Mapping[str, int]) -> int:
    """Return how many of the failures in a shard's record are a picture's own."""
    return sum(count for category, count in failures.items() if category != schema.MISSING)


class Quarantine:
    """The bad images of one output folder.

    Parameters
    ----------
    source : DatasetSource
        Where the tars lie.
    root : str
        The folder of the finished metadata.
    with_bytes : bool
        Whether the images' bytes are kept too.
    """

    def __init__(self, source: DatasetSource, root: str, with_bytes: bool = False) -> None:
        self.source = source
        self.root = root
        self.with_bytes = with_bytes

    def url(self, shard: str) -> str:
        """Return the file of a shard."""
        return files.join(self.root, FOLDER, QUARANTINE, shard + ".parquet")

    def is_current(self, shard: str, failures: Mapping[str, int]) -> bool:
        """Tell whether a finished shard's bad images, as its record counts them, are here as they should be."""
        wanted = count_bad(failures)
        if not wanted:
            return True
        summary = parquet.summary_or_none(self.url(shard), self.source.storage_options)
        return summary is not None and summary.rows == wanted and (not self.with_bytes or IMAGE in summary.schema.names)

    def update(self, shard: str, failures: Mapping[str, int]) -> None:
        """Write the file of a shard whose metadata is finished, or remove it if all its images are good."""
        url, options = self.url(shard), self.source.storage_options
        if not count_bad(failures):
            if files.exists(url, options):
                fs, path = files.open_fs(url, options)
                fs.rm_file(path)
            return
        with ExitStack() as stack:
            metadata = files.join(self.root, shard + ".parquet")
            rows = stack.enter_context(RowReader(metadata, [self.source.id_col, schema.IMAGE_ERROR], options))
            fields = [(schema.SHARD, pa.string()), *zip(rows.schema.names, rows.schema.types, strict=True)]
            fields += [(MEMBER, pa.string()), (OFFSET, pa.int64()), (SIZE, pa.int64())]
            fields += [(IMAGE, pa.binary())] if self.with_bytes else []
            out = stack.enter_context(parquet.table_writer(url, pa.schema(fields), options))
            for table in self._bad_rows(shard, rows):
                out.write(table)

    def _bad_rows(self, shard: str, rows: RowReader) -> Iterator[pa.Table]:
        with open_tar(self.source, shard) as reader:
            for start in range(0, rows.rows, PIECE_ROWS):
                table = rows.read(start, min(start + PIECE_ROWS, rows.rows))
                reasons = backend.series_of(table[schema.IMAGE_ERROR], pd.RangeIndex(len(table)))
                table = table.filter(pa.array(schema.is_bad_image(reasons).to_numpy(dtype=bool)))
                if len(table):
                    yield from self._located(shard, reader, table)

    def _located(self, shard: str, reader: ShardReader, table: pa.Table) -> Iterator[pa.Table]:
        """Add to rows where their images lie, and the bytes, a bounded number at once."""
        ids = table[self.source.id_col].to_pylist()
        images, _ = samples_of_rows(reader, self.source, shard, ids)
        members = [images.get(row) for row in range(len(ids))]
        table = table.add_column(0, schema.SHARD, pa.array([shard] * len(ids), pa.string()))
        for name, kind, attribute in (
            (MEMBER, pa.string(), "name"),
            (OFFSET, pa.int64(), "offset"),
            (SIZE, pa.int64(), "size"),
        ):
            values = [None if member is None else _plain(getattr(member, attribute)) for member in members]
            table = table.append_column(name, pa.array(values, kind))
        if not self.with_bytes:
            yield table
            return
        for start, stop in _by_bytes(members):
            blobs = [_bytes_of(reader, member) for member in members[start:stop]]
            yield table.slice(start, stop - start).append_column(IMAGE, pa.array(blobs, pa.binary()))


def read_quarantine(source: DatasetSource, shards: Sequence[str]) -> pd.DataFrame:
    """Return the bad images of a dataset that was saved, as one frame; empty if there are none."""
    quarantine = Quarantine(source, source.metadata_root)
    tables = []
    for shard in shards:
        url = quarantine.url(shard)
        if files.exists(url, source.storage_options):
            tables.append(parquet.read_table(url, None, source.storage_options))
    if not tables:
        names = [schema.SHARD, source.id_col, schema.IMAGE_ERROR, MEMBER, OFFSET, SIZE]
        kinds = {OFFSET: "int64", SIZE: "int64"}
        return schema.empty_frame((name, schema.arrow_dtype(kinds.get(name, "string"))) for name in names)
    table = pa.concat_tables(tables, promote_options="permissive")
    index = pd.RangeIndex(len(table))
    return pd.DataFrame({name: backend.series_of(table[name], index) for name in table.column_names}, index=index)


def _plain(value: Any) -> Any:
    """Return a member's name as UTF-8 has a place for it."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _by_bytes(members: Sequence[Member | None]) -> Iterator[tuple[int, int]]:
    ends = np.cumsum([0 if member is None else member.size for member in members])
    start = 0
    while start < len(members):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _PIECE_BYTES, side="right")))
        yield start, stop
        start = stop


def _bytes_of(reader: ShardReader, member: Member | None) -> bytes | None:
    try:
        return None if member is None else reader.read(member)
    except TarError:
        return None
