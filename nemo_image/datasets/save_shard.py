"""The task that writes one shard's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.columns import rows_by_shard, same_file, tar_identity
from nemo_image.datasets.load import id_positions, read_rows, require_unique
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import Named, ShardRecord, accounted
from nemo_image.errors import DatasetError, IdMismatchError, ShardError
from nemo_image.shards import files, parquet
from nemo_image.shards.read import ShardReader, match_samples

RECORDED_LIBRARIES = ("nemo-image", "torch", "torchvision", "timm", "Pillow", "pyarrow", "numpy")


@dataclass(frozen=True)
class SaveItem:
    """One shard to save: `rows` makes its frame, or is None where the user's frame has no partition for it."""

    shard: str
    rows: Any


@dataclass(frozen=True)
class SavedColumns:
    """What a save writes.

    Attributes
    ----------
    fields : list of pyarrow.Field
        The frame's columns to write, without ``shard`` and the id.
    fingerprints : dict of str to dict
        What made those that nemo_image added.
    computed : list of str
        Those that this save computes.
    in_place : bool
        Whether the shard's own file is enriched.
    plan : str or None
        Token of the user's frame; None where it is as loaded.
    reads_images : bool
        Whether the tars are read.
    """

    fields: Sequence[pa.Field]
    id_field: pa.Field
    fingerprints: Mapping[str, Mapping[str, Any]]
    computed: Sequence[str]
    in_place: bool
    plan: str | None
    reads_images: bool


@dataclass
class _Source:
    """What is there before a shard is saved."""

    table: pa.Table | None
    rows: int
    identity: Mapping[str, Any] | None
    footer: parquet.Footer = field(default_factory=parquet.Footer)


class SaveShard:
    """Computes a shard's frame and writes its Parquet file; returns the shard's ledger record, whatever happens."""

    task_name = "nemo-image-save"

    def __init__(self, source: DatasetSource, root: str, saved: SavedColumns, resume: bool) -> None:
        self.source = source
        self.root = root
        self.saved = saved
        self.resume = resume

    def __call__(self, item: SaveItem) -> ShardRecord:
        """Save one shard."""
        record = ShardRecord(shard=item.shard)
        with accounted(record):
            done = self._finished_before(item.shard) if self.resume else None
            if done is not None:
                return done
            self._save(item, record)
        return record

    # Was it done before? ---------------------------------------------------------------------------------------------

    def _finished_before(self, shard: str) -> ShardRecord | None:
        summary = parquet.summary_or_none(self._url(shard), self.source.storage_options)
        if summary is None or summary.footer is None or not summary.footer.record:
            return None
        footer, saved = summary.footer, self.saved
        wanted = {saved.id_field.name, *(one.name for one in saved.fields)}
        same = (
            wanted <= set(summary.schema.names)
            and all(footer.columns.get(name) == made for name, made in saved.fingerprints.items())
            and not any(footer.pending.get(name, 1) for name in saved.computed)
            and same_file(footer.source, tar_identity(self.source, shard))
        )
        if not same or not self._same_rows(shard, footer, summary.rows):
            return None
        return ShardRecord.from_dict({**footer.record, "status": "skipped"})

    def _same_rows(self, shard: str, footer: parquet.Footer, rows: int) -> bool:
        if self.saved.in_place:
            # A frame that the user changed may give other values for columns that carry no fingerprint.
            return self.saved.plan is None
        if footer.plan != self.saved.plan:
            return False
        own = _identity_or_none(self.source.parquet_url(shard), self.source.storage_options)
        return footer.metadata_source == own and rows == footer.record.get("rows_out")

    # Doing it --------------------------------------------------------------------------------------------------------

    def _url(self, shard: str) -> str:
        return files.join(self.root, shard + ".parquet")

    def _save(self, item: SaveItem, record: ShardRecord) -> None:
        before = self._source_rows(item.shard)
        record.rows_in = before.rows
        if item.rows is None:
            self._left_out(record, before)
            return
        frame = item.rows()
        self._check_frame(item.shard, frame)
        table, kept, positions = self._assemble(item.shard, frame, before, record)
        self._account(item.shard, table, kept, positions, before, record)
        footer = self._footer(item.shard, table, before, record)
        record.rows_out = parquet.write_table(self._url(item.shard), table, footer, self.source.storage_options)

    def _left_out(self, record: ShardRecord, before: _Source) -> None:
        """Account for a shard that the user's frame has no partition for."""
        if self.saved.in_place:
            record.status, record.rows_out = "skipped", before.rows
            record.notes.append("not in the frame: left as it was")
        else:
            record.rows_filtered, record.rows_out = before.rows, 0

    def _source_rows(self, shard: str) -> _Source:
        """Read what in-place saving keeps, or only the ids where rows go elsewhere."""
        source = self.source
        url = source.parquet_url(shard)
        summary = parquet.summary_or_none(url, source.storage_options)
        if summary is None:
            if not source.built_from_tars:
                # A missing or garbled file is an error with its cause; a frame built by the user may have none.
                if _identity_or_none(url, source.storage_options) is not None:
                    parquet.read_summary(url, source.storage_options)
                return _Source(None, 0, None)
            table = read_rows(source, shard, source.schema.names)
            return _Source(table, len(table), None)
        columns = None if self.saved.in_place else [source.id_col]
        table = parquet.read_table(url, columns, source.storage_options)
        identity = files.identify(url, source.storage_options).to_dict()
        return _Source(table, summary.rows, identity, summary.footer or parquet.Footer())

    def _check_frame(self, shard: str, frame: pd.DataFrame) -> None:
        others = [name for name in rows_by_shard(frame) if name != shard] if len(frame) else []
        if others:
            raise DatasetError(
                f"the partition of shard {shard} holds rows that say shard {others[0]!r}: do not assign 'shard'"
            )
        if schema.IMAGE_ERROR not in frame:
            return
        errors = frame[schema.IMAGE_ERROR].dropna()
        broken = errors[errors.str.startswith(schema.SHARD_FAILED + ":").to_numpy(dtype=bool)]
        if len(broken):
            raise ShardError(str(broken.iloc[0]).split(": ", 1)[1])

    def _assemble(
        self, shard: str, frame: pd.DataFrame, before: _Source, record: ShardRecord
    ) -> tuple[pa.Table, Any, Any]:
        """Return the table to write, and for each of its rows whether it came from the frame, and from which "
        "source row."""
        saved = self.saved
        wanted = pa.schema([saved.id_field, *saved.fields])
        made = backend.frame_to_table(frame, wanted)
        ids = made[self.source.id_col].combine_chunks()
        if before.table is None:
            record.rows_in = len(made)
            return self._with_shard(made, shard), np.ones(len(made), bool), np.arange(len(made))
        where = self.source.parquet_url(shard)
        positions = id_positions(ids, before.table[self.source.id_col], where)
        if not saved.in_place:
            return self._ordered(made, shard, positions)
        require_unique(ids, f"the frame's rows of shard {shard}")
        if (positions < 0).any():
            strange = ids[int(np.flatnonzero(positions < 0)[0])].as_py()
            raise IdMismatchError(
                f"the frame has {(positions < 0).sum()} rows that {where} lacks, for example id {strange!r}: rows "
                "can only be "
                "added in another folder (save_metadata(path))"
            )
        kept = np.zeros(before.rows, bool)
        kept[positions] = True
        return self._enriched(before, made, positions, kept, shard), kept, np.arange(before.rows)

    def _ordered(self, made: pa.Table, shard: str, positions: Any) -> tuple[pa.Table, Any, Any]:
        """Put the frame's rows in the order of the source's; rows joined by the user come last."""
        order = np.argsort(np.where(positions < 0, np.iinfo(np.int64).max, positions), kind="stable")
        if (order != np.arange(len(order))).any():
            made = made.take(pa.array(order))
        return self._with_shard(made, shard), np.ones(len(made), bool), positions[order]

    def _enriched(self, before: _Source, made: pa.Table, positions: Any, kept: Any, shard: str) -> pa.Table:
        """Return the source's table with the frame's columns put over it, row by row."""
        base = before.table
        assert base is not None
        origin = np.full(before.rows, -1, np.int64)
        origin[positions] = np.arange(len(positions))
        take = pa.array(origin, mask=origin < 0)
        all_rows = bool(kept.all())
        for one in self.saved.fields:
            column = made[one.name].take(take)
            number = base.schema.get_field_index(one.name)
            if number >= 0 and not all_rows and self._outlives(one.name, before.footer):
                old = base[one.name].cast(one.type)
                column = pa.compute.if_else(pa.array(kept), column, old)
            base = base.append_column(one, column) if number < 0 else base.set_column(number, one, column)
        return self._with_shard(base, shard)

    def _outlives(self, name: str, footer: parquet.Footer) -> bool:
        """Tell whether a column's old value stays in rows that the frame no longer has."""
        made_by = self.saved.fingerprints.get(name)
        return made_by is None or footer.columns.get(name) == made_by

    def _with_shard(self, table: pa.Table, shard: str) -> pa.Table:
        codes = pa.array(np.zeros(len(table), np.int32))
        column = pa.DictionaryArray.from_arrays(codes, pa.array([shard], pa.string()))
        one = pa.field(schema.SHARD, schema.SHARD_TYPE)
        number = table.schema.get_field_index(schema.SHARD)
        return table.append_column(one, column) if number < 0 else table.set_column(number, one, column)

    # The account -----------------------------------------------------------------------------------------------------

    def _account(
        self, shard: str, table: pa.Table, kept: Any, positions: Any, before: _Source, record: ShardRecord
    ) -> None:
        saved = self.saved
        hit = np.unique(positions[positions >= 0])
        record.rows_joined = len(table) - len(hit)
        missing = np.setdiff1d(np.arange(record.rows_in or 0), hit)
        if saved.in_place and not kept.all():
            record.notes.append(f"{int((~kept).sum())} rows are not in the frame: kept, not computed")
        record.rows_filtered = len(missing)
        if self.source.on_mismatch == "drop" and len(missing) and before.table is not None:
            dropped = self._without_sample(shard, before.table[self.source.id_col].take(pa.array(missing)))
            if dropped:
                record.losses["without_sample"] = dropped
            record.rows_filtered -= dropped
        record.note_results(table, saved.computed)
        if saved.reads_images:
            self._account_samples(shard, table, record)
        record.rows_out = len(table)

    def _without_sample(self, shard: str, ids: Any) -> int:
        with ShardReader(self.source.tar_url(shard), self.source.storage_options) as reader:
            return int((match_samples(reader, ids.to_pylist(), self.source.id_col) < 0).sum())

    def _account_samples(self, shard: str, table: pa.Table, record: ShardRecord) -> None:
        with ShardReader(self.source.tar_url(shard), self.source.storage_options) as reader:
            index = reader.index
            ids = table[self.source.id_col].to_pylist()
            found = match_samples(reader, ids, self.source.id_col)
        record.samples = len(index)
        record.rows_without_sample = Named.of(ids[number] for number in np.flatnonzero(found < 0))
        unclaimed = np.setdiff1d(np.arange(len(index)), found)
        record.samples_without_row = Named.of(index.samples[number].key for number in unclaimed)
        record.repeated_members = Named.of(index.repeated)

    def _footer(self, shard: str, table: pa.Table, before: _Source, record: ShardRecord) -> parquet.Footer:
        saved = self.saved
        stays = before.footer.columns if saved.in_place else {}
        made_by = {name: made for name, made in {**stays, **saved.fingerprints}.items() if name in table.column_names}
        account = {
            name: value for name, value in record.to_dict().items() if name not in ("seconds", "error", "status")
        }
        return parquet.Footer(
            columns=made_by,
            pending=parquet.count_pending(table, made_by),
            source=tar_identity(self.source, shard),
            metadata_source=None if saved.in_place else before.identity,
            plan=None if saved.in_place else saved.plan,
            record=account,
            versions=library_versions(),
        )


def _identity_or_none(url: str, storage_options: Any) -> dict[str, Any] | None:
    try:
        return files.identify(url, storage_options).to_dict()
    except FileNotFoundError:
        return None


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make results: recorded, never compared."""
    found = {}
    for name in RECORDED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
