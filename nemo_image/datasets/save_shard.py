"""The task that writes one shard's metadata."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.columns import metadata_identity, rows_by_shard, same_file, tar_identity
from nemo_image.datasets.load import id_positions, read_rows, require_unique
from nemo_image.datasets.quarantine import Quarantine, count_bad
from nemo_image.datasets.saved_columns import SavedColumns
from nemo_image.datasets.shard_account import ShardAccount
from nemo_image.datasets.shard_pass import ShardPass
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.attempts import MAX_DEATHS, Attempts
from nemo_image.engine.isolation import isolate
from nemo_image.engine.ledger import ShardRecord, accounted
from nemo_image.errors import DatasetError, IdMismatchError, ShardError
from nemo_image.shards import files, parquet

RECORDED_LIBRARIES = ("nemo-image", "torch", "torchvision", "timm", "open_clip_torch", "Pillow", "pyarrow", "numpy")


@dataclass(frozen=True)
class SaveItem:
    """One shard to save: `rows` makes its frame, or is None where the user's frame has no partition for it."""

    shard: str
    rows: Any


@dataclass
class _Source:
    """What is there before a shard is saved.

    Attributes
    ----------
    ids : pyarrow array or None
        Of all rows; None where the shard has no metadata but the user's frame.
    schema : pyarrow.Schema
        Of the file that is enriched in place.
    table : pyarrow.Table or None
        All rows, where they were built from the tar; else they are read from the file, piece by piece.
    """

    ids: Any = None
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    table: pa.Table | None = None
    identity: Mapping[str, Any] | None = None
    footer: parquet.Footer = field(default_factory=parquet.Footer)

    @property
    def rows(self) -> int:
        return 0 if self.ids is None else len(self.ids)


@dataclass
class _Piece:
    """Rows to write.

    Attributes
    ----------
    table : pyarrow.Table
    positions : ndarray of int64
        The source row of each; -1 for one that the user joined.
    kept : ndarray of bool
        Whether each came from the user's frame.
    """

    table: pa.Table
    positions: Any
    kept: Any


class SaveShard:
    """Computes a shard's frame and writes its Parquet file; returns the shard's ledger record, whatever happens."""

    task_name = "nemo-image-save"

    def __init__(
        self,
        source: DatasetSource,
        root: str,
        saved: SavedColumns,
        resume: bool,
        retried: frozenset[str] | None = None,
        quarantine_bytes: bool = False,
    ) -> None:
        self.source = source
        self.root = root
        self.saved = saved
        self.resume = resume
        self.retried = retried
        self.quarantine = Quarantine(source, root, quarantine_bytes)
        self.run = uuid.uuid4().hex

    def __call__(self, item: SaveItem) -> ShardRecord:
        """Save one shard."""
        record = ShardRecord(shard=item.shard)
        with accounted(record):
            done = self.finished_before(item.shard) if self.resume else None
            if done is None and self.retried is not None and item.shard not in self.retried:
                record.status = "skipped"
                record.notes.append("not computed yet, and no failure: left to a run without retry_failed")
                return record
            if done is not None and not (self.retried is not None and count_bad(done.failures)):
                if not self.quarantine.is_current(item.shard, done.failures):
                    self.quarantine.update(item.shard, done.failures)
                return done
            with ShardPass(self.source, item.shard) as under_way, self._attempt(item.shard):
                self._save(item, record, under_way)
                self.quarantine.update(item.shard, record.failures)
        return record

    @contextmanager
    def _attempt(self, shard: str) -> Iterator[None]:
        """Keep decoders in a child process where one may have ended the process of an earlier attempt."""
        if not self.saved.reads_images:
            yield
            return
        with Attempts(self.root, self.source.storage_options, self.run).attempt(shard) as deaths:
            if deaths.in_this_run >= MAX_DEATHS:
                raise ShardError(
                    f"{deaths.in_this_run} processes that worked on this shard died, the later ones with their "
                    "decoders in a child process: look at the workers' logs and memory"
                )
            with isolate() if deaths or self.retried is not None else nullcontext():
                yield

    # Was it done before? ---------------------------------------------------------------------------------------------

    def finished_before(self, shard: str) -> ShardRecord | None:
        """Return a shard's record if its file holds all that this save would write."""
        summary = parquet.summary_or_none(self._url(shard), self.source.storage_options)
        if summary is None or summary.footer is None or not summary.footer.record:
            return None
        footer, saved = summary.footer, self.saved
        there = {one.name: schema.plain_type(one.type) for one in summary.schema}
        same = (
            there.get(saved.id_field.name) == saved.id_field.type
            and schema.SHARD in summary.schema.names
            and summary.schema.field(schema.SHARD).type == schema.SHARD_TYPE
            and all(there.get(one.name) == one.type for one in saved.fields)
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
        own = metadata_identity(self.source.parquet_url(shard), self.source.storage_options)
        return footer.metadata_source == own and rows == footer.record.get("rows_out")

    # Doing it --------------------------------------------------------------------------------------------------------

    def _url(self, shard: str) -> str:
        return files.join(self.root, shard + ".parquet")

    def _save(self, item: SaveItem, record: ShardRecord, under_way: ShardPass) -> None:
        before = self._source_rows(item.shard)
        record.rows_in = before.rows
        if item.rows is None:
            self._left_out(record, before)
            return
        made_by = self._made_by(before)
        account = ShardAccount(self.source, self.saved, item.shard, before.ids, made_by, record)
        pieces = self._pieces(item, before, under_way)
        first = next(pieces)
        with parquet.table_writer(self._url(item.shard), first.table.schema, self.source.storage_options) as out:
            for piece in chain([first], pieces):
                out.write(piece.table)
                account.add(piece.table, piece.kept, piece.positions)
            account.close()
            out.footer = self._footer(item.shard, made_by, before, account)
        record.rows_out = parquet.read_summary(self._url(item.shard), self.source.storage_options).rows

    def _pieces(self, item: SaveItem, before: _Source, under_way: ShardPass) -> Iterator[_Piece]:
        """Compute the user's frame, in windows where that gives the same rows."""
        for _ in under_way.windows(before.ids, item.rows.row_by_row):
            frame = item.rows()
            self._check_frame(item.shard, frame)
            yield self._assemble(item.shard, frame, before, under_way)

    def _left_out(self, record: ShardRecord, before: _Source) -> None:
        """Account for a shard that the user's frame has no partition for."""
        if self.saved.in_place:
            record.status, record.rows_out = "skipped", before.rows
            record.notes.append("not in the frame: left as it was")
        else:
            record.rows_filtered, record.rows_out = before.rows, 0

    def _source_rows(self, shard: str) -> _Source:
        """Look at the shard's own metadata: the ids, and what in-place saving keeps."""
        source = self.source
        url = source.parquet_url(shard)
        summary = parquet.summary_or_none(url, source.storage_options)
        if summary is None:
            if not source.built_from_tars:
                # A missing or garbled file is an error with its cause; a frame built by the user may have none.
                if files.exists(url, source.storage_options):
                    parquet.read_summary(url, source.storage_options)
                return _Source()
            table = read_rows(source, shard, source.schema.names)
            ids = table[source.id_col].combine_chunks()
            require_unique(ids, source.tar_url(shard))
            return _Source(ids, table.schema, table)
        ids = parquet.read_table(url, [source.id_col], source.storage_options)[source.id_col].combine_chunks()
        require_unique(ids, url)
        identity = metadata_identity(url, source.storage_options)
        return _Source(ids, summary.schema, None, identity, summary.footer or parquet.Footer())

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

    def _assemble(self, shard: str, frame: pd.DataFrame, before: _Source, under_way: ShardPass) -> _Piece:
        saved = self.saved
        made = backend.frame_to_table(frame, pa.schema([saved.id_field, *saved.fields]))
        ids = made[self.source.id_col].combine_chunks()
        if before.ids is None:
            return _Piece(self._with_shard(made, shard), np.full(len(made), -1), np.ones(len(made), bool))
        start, stop = under_way.window or (0, before.rows)
        where = self.source.parquet_url(shard)
        places = id_positions(ids, before.ids.slice(start, stop - start), where)
        positions = np.where(places < 0, -1, places + start)
        if not saved.in_place:
            return self._ordered(made, shard, positions)
        require_unique(ids, f"the frame's rows of shard {shard}")
        if (positions < 0).any():
            strange = ids[int(np.flatnonzero(positions < 0)[0])].as_py()
            raise IdMismatchError(
                f"the frame has {(positions < 0).sum()} rows that {where} lacks, for example id {strange!r}: rows "
                "can only be added in another folder (save_metadata(path))"
            )
        base = self._base_rows(shard, before, under_way, start, stop)
        kept = np.zeros(len(base), bool)
        kept[places] = True
        return _Piece(self._enriched(base, made, places, kept, before, shard), np.arange(start, stop), kept)

    def _base_rows(self, shard: str, before: _Source, under_way: ShardPass, start: int, stop: int) -> pa.Table:
        """Return the rows that are enriched in place, as they are."""
        if before.table is not None:
            return before.table.slice(start, stop - start)
        table = under_way.rows(self.source.parquet_url(shard), before.schema.names).read(start, stop)
        return table.replace_schema_metadata(before.schema.metadata)

    def _ordered(self, made: pa.Table, shard: str, positions: Any) -> _Piece:
        """Put the frame's rows in the order of the source's; rows joined by the user come last."""
        order = np.argsort(np.where(positions < 0, np.iinfo(np.int64).max, positions), kind="stable")
        if (order != np.arange(len(order))).any():
            made = made.take(pa.array(order))
        return _Piece(self._with_shard(made, shard), positions[order], np.ones(len(made), bool))

    def _enriched(
        self, base: pa.Table, made: pa.Table, places: Any, kept: Any, before: _Source, shard: str
    ) -> pa.Table:
        """Return the source's rows with the frame's columns put over them, row by row."""
        origin = np.full(len(base), -1, np.int64)
        origin[places] = np.arange(len(places))
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

    def _made_by(self, before: _Source) -> dict[str, Mapping[str, Any]]:
        """Return what made each added column of the file to write."""
        stays = before.footer.columns if self.saved.in_place else {}
        return {**stays, **self.saved.fingerprints}

    def _footer(
        self, shard: str, made_by: Mapping[str, Mapping[str, Any]], before: _Source, account: ShardAccount
    ) -> parquet.Footer:
        saved = self.saved
        values = account.record.to_dict()
        return parquet.Footer(
            columns=made_by,
            pending={name: account.pending.get(name, 0) for name in made_by},
            source=tar_identity(self.source, shard),
            metadata_source=None if saved.in_place else before.identity,
            plan=None if saved.in_place else saved.plan,
            record={name: value for name, value in values.items() if name not in ("seconds", "error", "status")},
            versions=library_versions(),
        )


class IsFinished:
    """Tells whether a save would have nothing to do for a shard."""

    task_name = "nemo-image-look"

    def __init__(self, work: SaveShard) -> None:
        self.work = work

    def __call__(self, shard: str) -> tuple[str, bool]:
        """Return the shard and the answer."""
        return shard, self.work.finished_before(shard) is not None


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of the libraries that make results: recorded, never compared."""
    found = {}  # reading them takes longer than reading a shard's ids
    for name in RECORDED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
