"""Which rows of a shard are exported, and from which samples: counted first, found again when they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash

from nemo_image import backend
from nemo_image.datasets import shard_pass
from nemo_image.datasets.columns import metadata_identity, tar_identity
from nemo_image.datasets.load import read_rows, require_unique
from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.recent import Recent
from nemo_image.datasets.selection_file import Selection, members_of, read_selection, write_selection
from nemo_image.datasets.shard_pass import ShardPass, open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import Named, ShardRecord, accounted
from nemo_image.shards import parquet
from nemo_image.shards.index import TarIndex
from nemo_image.shards.read import match_samples


@dataclass
class CountItem:
    """A source shard to count.

    Attributes
    ----------
    shard : str
    rows : PartitionTask
        Makes the frame of the ids, the filter column, and whatever else tells the rows apart.
    earlier : dict or None
        What an earlier run of the export counted.
    """

    shard: str
    rows: PartitionTask
    earlier: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Counted(ShardRecord):
    """A source shard's record with what the plan needs.

    Attributes
    ----------
    selected : int
        Samples that pass.
    digest : str
        Hash of the selected ids and of the tar's identity: the export's inputs, for resuming.
    """

    selected: int = 0
    digest: str = ""


class CountSelected:
    """Counts a shard's rows that pass and have a sample; leaves in `folder` which these are."""

    task_name = "nemo-image-count"

    def __init__(self, source: DatasetSource, filter_column: str, folder: str) -> None:
        self.source = source
        self.filter_column = filter_column
        self.folder = folder

    def __call__(self, item: CountItem) -> Counted:
        """Count one shard."""
        record = Counted(shard=item.shard)
        with accounted(record):
            self._count(item, record)
        return record

    def _count(self, item: CountItem, record: Counted) -> None:
        with ShardPass(self.source, item.shard) as under_way:
            passing = _find_passing(under_way, item.rows, self.filter_column)
            if item.earlier is not None and item.earlier.get("digest") == passing.digest:
                before = Counted.from_dict({**item.earlier, "status": "skipped"})
                for one in fields(before):
                    setattr(record, one.name, getattr(before, one.name))
                return
            found = _match(under_way, passing)
        if len(found.selection):
            write_selection(self.folder, item.shard, found.selection, self.source.storage_options)
        record.rows_in = found.rows_in
        # Rows that the user's own frame left out or joined before the export's filter.
        record.rows_joined = max(0, found.rows_seen - found.rows_in)
        record.rows_filtered = max(0, found.rows_in - found.rows_seen) + found.rows_seen - found.passed
        lost = found.passed - len(found.selection)
        record.losses = {"without_sample": lost} if lost else {}
        record.rows_out = record.selected = len(found.selection)
        record.samples = len(found.index)
        record.rows_without_sample = Named.of(found.without_sample)
        record.repeated_members = Named.of(found.index.repeated)
        record.digest = found.selection.digest


@dataclass
class _Passing:
    """The rows of a shard that pass, by the metadata alone: their positions and ids; the rest is as in `Selected`."""

    rows: Any
    row_ids: list[Any]
    lengths: list[int]
    ids: Any
    files_token: bytes
    digest: str


@dataclass
class _Found:
    """What the count of a shard found: the selection, and the account of the other rows and samples.

    Attributes
    ----------
    passed, rows_seen, rows_in : int
        Rows that pass, of those of the user's frame, of those of the shard's metadata.
    """

    selection: Selection
    passed: int
    rows_seen: int
    rows_in: int
    without_sample: list[Any]
    index: TarIndex


_recent: Recent[Selection] = Recent(len, 250_000)


def find_again(under_way: ShardPass, rows: PartitionTask, filter_column: str, digest: str, folder: str) -> Selection:
    """Find the rows of a shard that pass, and their samples: as the count left them, if nothing has changed since.

    Parameters
    ----------
    rows : PartitionTask
        Makes the frame of the id, the filter column, and whatever else the digest depends on.
    digest : str
        What the count said of the shard.
    folder : str
        Where the count left what it found.
    """
    source, shard = under_way.source, under_way.shard
    files_token = _files_token(source, shard)

    def find() -> Selection:
        left = read_selection(folder, shard, digest, source.storage_options)
        if left is not None and left.files_token == files_token:
            return left
        return _match(under_way, _find_passing(under_way, rows, filter_column)).selection

    key = (source.tar_root, source.metadata_root, filter_column, digest, files_token, shard_pass.WINDOW_ROWS)
    return _recent.get(key, find)


def _find_passing(under_way: ShardPass, rows: PartitionTask, filter_column: str) -> _Passing:
    source, shard = under_way.source, under_way.shard
    summary = parquet.summary_or_none(source.parquet_url(shard), source.storage_options)
    own_ids = None if summary is None else read_rows(source, shard, [source.id_col])[source.id_col].combine_chunks()
    values = _Values()
    passed, ids, lengths = [], [], []
    for _ in under_way.windows(own_ids, rows.row_by_row):
        frame = rows()
        lengths.append(len(frame))
        chosen = frame[filter_column].fillna(False).to_numpy(dtype=bool)
        passed.append(chosen)
        ids += frame[source.id_col].iloc[np.flatnonzero(chosen)].tolist()
        values.add(frame.iloc[np.flatnonzero(chosen)])
    require_unique(pa.array(ids, from_pandas=True), f"the rows to export of shard {shard}")
    files_token = _files_token(source, shard)
    digest = xxhash.xxh3_128_hexdigest(files_token + repr(values).encode("utf-8", "surrogatepass"))
    return _Passing(np.flatnonzero(np.concatenate(passed)), ids, lengths, own_ids, files_token, digest)


def _match(under_way: ShardPass, passing: _Passing) -> _Found:
    """Find the samples of rows that pass."""
    source, ids = under_way.source, passing.row_ids
    with open_tar(source, under_way.shard) as reader:
        index = reader.index
        found = match_samples(reader, ids, source.id_col)
    has = found >= 0
    order = np.argsort([index.samples[place].offset for place in found[has]], kind="stable")
    seen = sum(passing.lengths)
    samples = [index.samples[place] for place in found[has][order]]
    selection = Selection(
        rows=passing.rows[has][order],
        ids=pa.array(ids, from_pandas=True).filter(pa.array(has)).take(pa.array(order)),
        keys=pa.array([sample.key for sample in samples], pa.string()),
        members=members_of(samples),
        lengths=tuple(passing.lengths),
        files_token=passing.files_token,
        digest=passing.digest,
    )
    return _Found(
        selection=selection,
        passed=len(ids),
        rows_seen=seen,
        rows_in=seen if passing.ids is None else len(passing.ids),
        without_sample=[ids[row] for row in np.flatnonzero(~has)],
        index=index,
    )


def _files_token(source: DatasetSource, shard: str) -> bytes:
    """Return what tells a shard's tar and metadata from other versions of them."""
    written = metadata_identity(source.parquet_url(shard), source.storage_options)
    return json.dumps([shard, tar_identity(source, shard), written], sort_keys=True).encode("utf-8", "surrogatepass")


class _Values:
    """A digest of the values of some columns, the same in whatever pieces they come."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {}

    def add(self, frame: pd.DataFrame) -> None:
        for name in frame.columns:
            values = backend.arrow_values(frame[name])
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            text = "".join(f"{value!r}\n" for value in values.to_pylist())
            self._columns.setdefault(name, xxhash.xxh3_128()).update(text.encode("utf-8", "surrogatepass"))

    def __repr__(self) -> str:
        return repr(sorted((name, digest.hexdigest()) for name, digest in self._columns.items()))
