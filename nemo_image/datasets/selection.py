"""Which rows of a shard are exported, and from which samples: counted first, found again when they are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from nemo_image import backend
from nemo_image.datasets.columns import tar_identity
from nemo_image.datasets.load import require_unique
from nemo_image.datasets.partitions import PartitionTask
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import Named, ShardRecord, accounted
from nemo_image.shards import parquet
from nemo_image.shards.read import ShardReader, match_samples


@dataclass
class CountItem:
    """A source shard to count: `rows` makes its frame of ids and the filter column."""

    shard: str
    rows: PartitionTask


@dataclass
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
    """Counts a shard's rows that pass and have a sample."""

    task_name = "nemo-image-count"

    def __init__(self, source: DatasetSource, filter_column: str) -> None:
        self.source = source
        self.filter_column = filter_column

    def __call__(self, item: CountItem) -> Counted:
        """Count one shard."""
        record = Counted(shard=item.shard)
        with accounted(record):
            self._count(item, record)
        return record

    def _count(self, item: CountItem, record: Counted) -> None:
        frame = item.rows()
        summary = parquet.summary_or_none(self.source.parquet_url(item.shard), self.source.storage_options)
        found = select(self.source, item.shard, frame, self.filter_column)
        record.rows_in = len(frame) if summary is None else summary.rows
        passed = int(found.passed.sum())
        # Rows that the user's own frame left out or joined before the export's filter.
        record.rows_joined = max(0, len(frame) - record.rows_in)
        record.rows_filtered = max(0, record.rows_in - len(frame)) + len(frame) - passed
        record.losses = {"without_sample": passed - len(found.rows)} if passed > len(found.rows) else {}
        record.rows_out = record.selected = len(found.rows)
        record.samples = found.samples
        record.rows_without_sample = Named.of(found.without_sample)
        record.repeated_members = Named.of(found.repeated)
        record.digest = digest_of(self.source, item.shard, frame, found)


@dataclass
class Selected:
    """The rows of a shard that pass and have a sample, in the order of their offset in the tar."""

    rows: Any
    places: Any
    passed: Any
    samples: int
    without_sample: list[Any]
    repeated: list[str]
    index: Any


def select(source: DatasetSource, shard: str, frame: pd.DataFrame, filter_column: str) -> Selected:
    """Find the rows of `frame` that pass, and their samples."""
    passed = frame[filter_column].fillna(False).to_numpy(dtype=bool)
    candidates = np.flatnonzero(passed)
    ids = frame[source.id_col].iloc[candidates]
    require_unique(backend.arrow_values(ids), f"the rows to export of shard {shard}")
    with ShardReader(source.tar_url(shard), source.storage_options) as reader:
        index = reader.index
        found = match_samples(reader, ids.tolist(), source.id_col)
    has = found >= 0
    offsets = np.array([index.samples[place].offset for place in found[has]], np.int64)
    order = np.argsort(offsets, kind="stable")
    missing = ids.iloc[np.flatnonzero(~has)].tolist()
    return Selected(candidates[has][order], found[has][order], passed, len(index), missing, list(index.repeated), index)


def digest_of(source: DatasetSource, shard: str, frame: pd.DataFrame, found: Selected) -> str:
    """Return a hash of a shard's selected ids and of its tar's identity."""
    ids = [repr(one) for one in frame[source.id_col].iloc[found.rows].tolist()]
    identity = json.dumps(tar_identity(source, shard), sort_keys=True)
    return xxhash.xxh3_128_hexdigest("\n".join([shard, identity, *ids]).encode("utf-8", "surrogatepass"))
