"""The task that writes one shard's embeddings as a partition of clip-retrieval's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend
from nemo_image.datasets.clip_folder import IMAGE_PATH, METADATA, file_url
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.load import id_positions, require_unique
from nemo_image.datasets.save_shard import SaveItem
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import ShardRecord, accounted
from nemo_image.errors import DatasetError, EmbeddingError
from nemo_image.shards import files, parquet


@dataclass
class ClipItem:
    """A shard to write, under the number of its files; `rows` as in :class:`SaveItem`."""

    shard: str
    number: str
    rows: Any


@dataclass(slots=True)
class Written(ShardRecord):
    """A shard's record with the size of its embeddings, a number for each kind; None where it wrote none."""

    size: tuple[int, ...] | None = None


def numbered(items: Iterable[SaveItem], shards: Sequence[str]) -> Iterator[ClipItem]:
    """Number shards in the order of their names, zero-padded as clip-inference does for so many partitions."""
    numbers = {shard: number for number, shard in enumerate(sorted(shards))}
    for item in items:
        if item.shard not in numbers:
            raise DatasetError(f"rows say shard {item.shard!r}, which is none of the dataset's: do not assign 'shard'")
        yield ClipItem(item.shard, str(numbers[item.shard]).zfill(len(str(len(shards)))), item.rows)


class WriteClipShard:
    """Writes a shard's embeddings and metadata; returns its record, whatever happens.

    Parameters
    ----------
    source : DatasetSource
    root : str
        The folder.
    kinds : dict of str to str
        The column of each kind of embeddings.
    fields : pyarrow.Schema
        The columns of the metadata.
    dtype : str
        Of the numbers in the files.
    """

    task_name = "nemo-image-clip-write"

    def __init__(
        self, source: DatasetSource, root: str, kinds: Mapping[str, str], fields: pa.Schema, dtype: str
    ) -> None:
        self.source = source
        self.root = root
        self.kinds = dict(kinds)
        self.fields = fields
        self.dtype = dtype

    def __call__(self, item: ClipItem) -> Written:
        """Write one shard."""
        record = Written(shard=item.shard)
        with accounted(record):
            self._write(item, record)
        return record

    def _write(self, item: ClipItem, record: Written) -> None:
        frame = self._ordered(item, record)
        found = {name: backend.to_matrix(frame[name]) for name in self.kinds.values()} if len(frame) else {}
        rows = np.arange(len(frame))
        for _, has in found.values():
            rows = np.intersect1d(rows, has, assume_unique=True)
        if len(rows) < len(frame):
            record.losses["without_embedding"] = len(frame) - len(rows)
        record.rows_out = 0
        if not len(rows):
            return self._remove(item.number)
        sizes = []
        for kind, name in self.kinds.items():
            matrix, has = found[name]
            self._save(file_url(self.root, kind, item.number), matrix[np.searchsorted(has, rows)], name)
            sizes.append(matrix.shape[1])
        # The metadata comes last: what it lists is there.
        table = backend.frame_to_table(frame.iloc[rows], self.fields)
        url = file_url(self.root, METADATA, item.number)
        record.rows_out = parquet.write_table(url, table, parquet.Footer(), self.source.storage_options)
        record.size = tuple(sizes)
        record.results = dict.fromkeys(self.kinds.values(), record.rows_out)
        return None

    def _ordered(self, item: ClipItem, record: Written) -> pd.DataFrame:
        """Return the shard's rows in the order of the source, those that the user joined last; account for them."""
        url, options, id_col = self.source.parquet_url(item.shard), self.source.storage_options, self.source.id_col
        has_file = parquet.summary_or_none(url, options) is not None
        present = parquet.read_table(url, [id_col], options)[id_col] if has_file else None
        if item.rows is None:
            record.rows_in = record.rows_filtered = 0 if present is None else len(present)
            return pd.DataFrame()
        frame: pd.DataFrame = item.rows()
        others = set(rows_by_shard(frame)) - {item.shard} if len(frame) else set()
        if others:
            raise DatasetError(f"the rows of shard {item.shard} say shard {others.pop()!r}: do not assign 'shard'")
        ids = backend.arrow_values(frame[id_col])
        require_unique(ids, f"the frame's rows of shard {item.shard}")
        places = np.arange(len(frame)) if present is None else id_positions(ids, present, url)
        known = int((places >= 0).sum())
        record.rows_in = known if present is None else len(present)
        record.rows_joined, record.rows_filtered = len(frame) - known, record.rows_in - known
        order = np.argsort(np.where(places < 0, len(frame) + record.rows_in, places), kind="stable")
        ordered = frame.iloc[order]
        return ordered.assign(**{IMAGE_PATH: ordered[id_col]})

    def _save(self, url: str, matrix: npt.NDArray[Any], name: str) -> None:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(matrix, dtype=self.dtype)
        if (np.isinf(stored) & np.isfinite(matrix)).any():
            raise EmbeddingError(f"column {name!r} has numbers too large for {self.dtype}: write dtype='float32'")
        with files.atomic_writer(url, self.source.storage_options) as out:
            np.save(out, stored, allow_pickle=False)

    def _remove(self, number: str) -> None:
        """Remove what an earlier, unfinished call wrote for a shard that has nothing to write now."""
        for kind in (METADATA, *self.kinds):
            url = file_url(self.root, kind, number)
            if files.exists(url, self.source.storage_options):
                fs, path = files.open_fs(url, self.source.storage_options)
                fs.rm_file(path)
