"""The account of one shard's rows, piece by piece, while they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from nemo_image.datasets.saved_columns import SavedColumns
from nemo_image.datasets.shard_pass import match_rows, open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import NAMED_AT_MOST, Named, ShardRecord
from nemo_image.shards import parquet


class ShardAccount:
    """Counts what becomes of a shard's rows, into its ledger record.

    Parameters
    ----------
    source : DatasetSource
    saved : SavedColumns
    shard : str
    ids : pyarrow array or None
        Of the rows that the shard's metadata has; None if it has no metadata but the user's frame.
    added : dict of str to dict
        What made the columns of the written file that nemo_image added, in this run or before.
    record : ShardRecord

    Attributes
    ----------
    pending : dict of str to int
        Rows, by column, that are still to compute.
    """

    def __init__(
        self,
        source: DatasetSource,
        saved: SavedColumns,
        shard: str,
        ids: Any,
        added: Mapping[str, Mapping[str, Any]],
        record: ShardRecord,
    ) -> None:
        self.record = record
        self.pending: Counter[str] = Counter()
        self._source = source
        self._saved = saved
        self._shard = shard
        self._ids = ids
        self._added = added
        self._hit = np.zeros(0 if ids is None else len(ids), bool)
        self._results: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._rows = self._left = 0
        self._claimed: Any = None
        self._without_sample: list[Any] = []
        self._missing = 0

    def add(self, table: pa.Table, kept: Any, positions: Any) -> None:
        """Count some rows.

        Parameters
        ----------
        table : pyarrow.Table
            As they are written.
        kept : ndarray of bool
            Which of them came from the user's frame.
        positions : ndarray of int64
            Their rows in the shard's metadata; -1 for rows that the user joined.
        """
        self._rows += len(table)
        self._left += int((~kept).sum())
        self._hit[positions[positions >= 0]] = True
        piece = ShardRecord(self._shard)
        piece.note_results(table, self._saved.computed)
        self._results.update(piece.results)
        self._failures.update(piece.failures)
        present = {name: made for name, made in self._added.items() if name in table.column_names}
        self.pending.update(parquet.count_pending(table, present, self._saved.computed if kept.all() else ()))
        if self._saved.reads_images:
            self._match(table)

    def close(self) -> None:
        """Write the sums into the record."""
        record = self.record
        if self._ids is None:
            record.rows_in = self._rows
        else:
            record.rows_joined = self._rows - int(self._hit.sum())
            self._account_filtered()
        if self._left:
            record.notes.append(f"{self._left} rows are not in the frame: kept, not computed")
        record.results = {name: self._results[name] for name in sorted(self._results)}
        record.failures = {name: self._failures[name] for name in sorted(self._failures)}
        record.rows_out = self._rows
        if self._saved.reads_images:
            self._account_samples()

    def _account_filtered(self) -> None:
        missing = np.flatnonzero(~self._hit)
        self.record.rows_filtered = len(missing)
        if self._source.on_mismatch == "drop" and len(missing):
            ids = self._ids.take(pa.array(missing)).to_pylist()
            with open_tar(self._source, self._shard) as reader:
                dropped = int((match_rows(reader, self._source, self._shard, ids) < 0).sum())
            if dropped:
                self.record.losses["without_sample"] = dropped
            self.record.rows_filtered -= dropped

    def _match(self, table: pa.Table) -> None:
        ids = table[self._source.id_col].to_pylist()
        with open_tar(self._source, self._shard) as reader:
            found = match_rows(reader, self._source, self._shard, ids)
            if self._claimed is None:
                self._claimed = np.zeros(len(reader.index), bool)
        self._claimed[found[found >= 0]] = True
        absent = [ids[row] for row in np.flatnonzero(found < 0)]
        self._missing += len(absent)
        self._without_sample += absent[: NAMED_AT_MOST - len(self._without_sample)]

    def _account_samples(self) -> None:
        record = self.record
        with open_tar(self._source, self._shard) as reader:
            index = reader.index
        claimed = np.zeros(len(index), bool) if self._claimed is None else self._claimed
        record.samples = len(index)
        if not index.has_end:
            record.notes.append("the tar has no end mark: it may have been cut off between two members")
        record.rows_without_sample = Named(self._missing, [str(one) for one in self._without_sample])
        record.samples_without_row = Named.of(index.samples[number].key for number in np.flatnonzero(~claimed))
        record.repeated_members = Named.of(index.repeated)
