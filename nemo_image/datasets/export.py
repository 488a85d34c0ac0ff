"""Export a dataset: count each shard's selected samples, plan the output, write one task an output shard."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets.export_folder import require_free, take_over
from nemo_image.datasets.load import read_rows
from nemo_image.datasets.partitions import PartitionTask, ShardTasks, shard_tasks
from nemo_image.datasets.recent import Recent
from nemo_image.datasets.save import finish, materialize, run_shards
from nemo_image.datasets.schemas import unify_schemas
from nemo_image.datasets.selection import Counted, CountItem, CountSelected, find_again
from nemo_image.datasets.selection_file import Selection, folder_of, remove_selections
from nemo_image.datasets.shard_pass import ShardPass
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState
from nemo_image.engine import ledger
from nemo_image.engine.ledger import ShardRecord, accounted
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.export import plan, write
from nemo_image.shards import files

COUNT = "to_webdataset-count"

_frames: Recent[pd.DataFrame] = Recent(
    lambda frame: int(frame.memory_usage(deep=True).sum()), at_most=64 * 2**20, last_anyway=False
)
"""Rows of small source shards: in a shuffle each goes into many output shards."""


@dataclass
class SourceShard:
    """A source shard: the task of its rows, and the one that counted them, with the digest of what it counted."""

    shard: str
    rows: PartitionTask
    counted_rows: PartitionTask
    digest: str


@dataclass
class OutputItem:
    """An output shard to write: what it consists of, and the source shards by their numbers there."""

    shard: str
    number: int
    stretches: Sequence[plan.Stretch]
    sources: Mapping[int, SourceShard]


class WriteOutput:
    """Writes an output shard; returns its record, whatever happens."""

    task_name = "nemo-image-export"

    def __init__(
        self, source: DatasetSource, settings: write.ExportSettings, naming: plan.Naming, filter_column: str
    ) -> None:
        self.source = source
        self.settings = settings
        self.naming = naming
        self.filter_column = filter_column
        self.run = uuid.uuid4().hex
        """Tells what is remembered of the sources from what another export found there."""

    def __call__(self, item: OutputItem) -> ShardRecord:
        """Write one output shard."""
        record = ShardRecord(shard=item.shard)
        with accounted(record):
            done = write.is_written(self.settings, item.shard)
            if done is not None and done.footer is not None:
                return ShardRecord.from_dict({**done.footer.record, "status": "skipped", "rows_out": done.rows})
            taken = [self._take(take, item.sources[take.source]) for take in plan.takes_of(item.stretches)]
            write.write_output(self.settings, record, lambda place: self.naming.sample(item.number, place), taken)
        return record

    def _take(self, take: plan.Take, source: SourceShard) -> write.Taken:
        with ShardPass(self.source, source.shard) as under_way:
            folder = folder_of(self.settings.root)
            found = find_again(under_way, source.counted_rows, self.filter_column, source.digest, folder)
            if found.digest != source.digest:
                raise self._changed(source.shard)
            table = self._rows_at(under_way, source.rows, found, found.rows[take.positions])
        if table[self.source.id_col].to_pylist() != found.ids.take(pa.array(take.positions)).to_pylist():
            raise self._changed(source.shard)
        return write.Taken(self.source.tar_url(source.shard), found.samples(take.positions), table, take.places)

    def _changed(self, shard: str) -> DatasetError:
        return DatasetError(
            f"shard {shard}: other rows pass {self.filter_column!r} now than when they were counted, or "
            "its files have changed: a filter that draws at random must be saved first (save_metadata), then "
            "exported"
        )

    def _rows_at(self, under_way: ShardPass, rows: PartitionTask, found: Selection, wanted: Any) -> pa.Table:
        """Return rows of the user's frame by their positions in it, with all columns, window by window."""
        ascending = np.sort(wanted)
        parts = []
        first = 0
        in_windows = len(found.lengths) > 1
        ids = read_rows(self.source, under_way.shard, [self.source.id_col]) if in_windows else None
        own_ids = None if ids is None else ids[self.source.id_col].combine_chunks()
        for length in under_way.windows_of(own_ids, in_windows, found.lengths):
            inside = ascending[(ascending >= first) & (ascending < first + length)] - first
            if len(inside):
                frame = rows() if in_windows else _frames.get((self.run, under_way.shard), rows)
                chosen = frame[self.filter_column].iloc[inside] if len(frame) == length else pd.Series([False])
                if not chosen.fillna(False).all():
                    raise self._changed(under_way.shard)
                parts.append(self._to_table(frame.iloc[inside]))
            first += length
        table = pa.concat_tables(parts)
        return table.take(pa.array(np.searchsorted(ascending, wanted)))

    def _to_table(self, frame: pd.DataFrame) -> pa.Table:
        wanted = [one for one in self.settings.arrow_schema if one.name in frame.columns and one.name != schema.SHARD]
        fields = [
            pa.field(one.name, backend.arrow_type_of(frame[one.name])) if self._is_id(one.name) else one
            for one in wanted
        ]
        return backend.frame_to_table(frame, pa.schema(fields))

    def _is_id(self, name: str) -> bool:
        """Ids are read in their own type, and written as the new ids' text."""
        return name in (self.source.id_col, schema.KEY)


@dataclass(frozen=True)
class ExportOptions:
    """How rows are packed and named; see :meth:`ImageTextPairDataset.to_webdataset`."""

    filter_column: str
    samples_per_shard: int = 10000
    max_shards: int = 5
    old_id_col: str | None = None
    keep_ids: bool = False
    shuffle_seed: int | None = None
    replace: bool = False


def export(state: DatasetState, target: str, options: ExportOptions) -> dict[str, Any]:
    """Write the rows that pass as a new dataset; return the totals of the source shards.

    See :meth:`ImageTextPairDataset.to_webdataset`, which calls this.
    """
    _check_arguments(state, target, options)
    storage_options = state.source.storage_options
    require_free(target, storage_options)
    with run_lock(target, "to_webdataset", storage_options):
        return _export(state, target, options)


def _export(state: DatasetState, target: str, options: ExportOptions) -> dict[str, Any]:
    state, notes = unify_schemas(state)
    state, tasks = _one_partition_a_shard(state)
    source, storage_options = state.source, state.source.storage_options
    counting = _counting_tasks(state, options.filter_column)
    # What was counted window by window is found again in the same windows.
    tasks.row_by_row = counting.row_by_row = tasks.row_by_row and counting.row_by_row
    counted = _count(source, options.filter_column, counting, target)
    total = sum(record.selected for record in counted)
    if not total:
        raise DatasetError(f"no row has {options.filter_column!r} true and a sample in its tar: nothing to export")
    try:
        naming = plan.make_naming(total, options.samples_per_shard, options.max_shards)
        settings = _settings(state, target, options, counted)
        take_over(settings, source.tar_root, options.replace)
    except (ArgumentError, DatasetError):  # the folder may be another export's: leave nothing large in it
        remove_selections(target, storage_options)
        raise
    packed = plan.Plan([record.selected for record in counted], options.samples_per_shard, options.shuffle_seed)
    items = _outputs(tasks, counting, counted, naming, packed)
    work = WriteOutput(source, settings, naming, options.filter_column)
    written = run_shards("to_webdataset", work, items, len(packed), 1.0, target, source)
    totals = finish(target, "to_webdataset-output", written, storage_options, settings.footer_columns, notes)
    if totals["rows_out"] != total:
        raise DatasetError(f"{total} samples were selected, but {totals['rows_out']} were written: please report this")
    remove_selections(target, storage_options)
    return finish(target, "to_webdataset", counted, storage_options)


def _settings(
    state: DatasetState, target: str, options: ExportOptions, counted: Sequence[Counted]
) -> write.ExportSettings:
    arrow_schema = _output_schema(state, options.old_id_col, options.keep_ids)
    made_by = {name: made for name, made in state.lineage.provenance.items() if name in arrow_schema.names}
    how = [options.samples_per_shard, options.max_shards, options.old_id_col, options.keep_ids, options.shuffle_seed]
    digests = [record.digest for record in counted]
    return write.ExportSettings(
        root=target,
        id_col=state.source.id_col,
        old_id_col=options.old_id_col,
        keep_ids=options.keep_ids,
        token=tokenize(digests, how, state.source.id_col, arrow_schema.to_string(show_schema_metadata=False)),
        arrow_schema=arrow_schema,
        footer_columns=made_by,
        storage_options=state.source.storage_options,
    )


def _check_arguments(state: DatasetState, target: str, options: ExportOptions) -> None:
    state.require_columns([options.filter_column])
    dtype = state.frame._meta[options.filter_column].dtype
    if not pd.api.types.is_bool_dtype(dtype):
        raise ArgumentError(
            f"filter_column {options.filter_column!r} holds {dtype}, not booleans: compare it with something first"
        )
    for name in ("samples_per_shard", "max_shards"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a whole number, at least 1, not {value!r}")
    seed = options.shuffle_seed
    if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
        raise ArgumentError(f"shuffle_seed must be a whole number, at least 0, or None, not {seed!r}")
    if options.keep_ids and options.old_id_col is not None:
        raise ArgumentError("keep_ids keeps the ids as they are, so there is no old id to keep: leave out old_id_col")
    if options.old_id_col in (state.source.id_col, schema.SHARD, schema.KEY):
        raise ArgumentError(
            f"old_id_col {options.old_id_col!r} is a column that holds the new ids or shards: give another name"
        )
    if not target or target in (state.source.tar_root, state.source.metadata_root):
        raise ArgumentError(f"path {target!r} is the dataset's own folder: give another one")


def _one_partition_a_shard(state: DatasetState) -> tuple[DatasetState, ShardTasks]:
    """Return the state with nothing left to compute but reading and cheap columns, one partition a shard."""
    state, _ = materialize(state)
    tasks = shard_tasks(state.frame)
    if tasks is None:
        # Joined or repartitioned: gather the rows by shard in files first.
        state, _ = materialize(state, always=True)
        tasks = shard_tasks(state.frame)
    assert tasks is not None
    return state, tasks


def _counting_tasks(state: DatasetState, filter_column: str) -> ShardTasks:
    """Return the tasks of the columns by which rows are counted and told apart.

    Embeddings are not among them: what the user has not touched is told by its file.
    """
    frame = state.frame
    names = [schema.SHARD, state.source.id_col, filter_column]
    if state.lineage.touched:
        names += [name for name in frame.columns if not pa.types.is_list(backend.arrow_type_of(frame._meta[name]))]
    tasks = shard_tasks(frame[list(dict.fromkeys(names))])
    assert tasks is not None
    return tasks


def _count(source: DatasetSource, filter_column: str, tasks: ShardTasks, target: str) -> list[Counted]:
    """Count the shards, and say so in a ledger at once: a rerun then need not look into the tars again."""
    earlier = _counted_before(target, source.storage_options)
    items = (CountItem(shard, task, earlier.get(shard)) for shard, task in tasks)
    work = CountSelected(source, filter_column, folder_of(target))
    records = run_shards(COUNT, work, items, len(tasks.shards), 0.0, target, source)
    finish(target, COUNT, records, source.storage_options)
    return sorted((record for record in records if isinstance(record, Counted)), key=lambda record: record.shard)


def _counted_before(target: str, storage_options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what the last export into a folder counted, by shard."""
    ledgers = [one for one in ledger.read_ledgers(target, storage_options) if one.kind == COUNT]
    found = {}
    for line in files.read_bytes(ledgers[-1].url, storage_options).splitlines() if ledgers else ():
        with suppress(ValueError):  # cut off: what is missing is counted again
            record = json.loads(line)
            if record.get("digest") and record.get("status") != "failed":
                found[str(record["shard"])] = record
    return found


def _outputs(
    tasks: ShardTasks, counting: ShardTasks, counted: Sequence[Counted], naming: plan.Naming, packed: plan.Plan
) -> Iterator[OutputItem]:
    by_name, counting_by_name = dict(tasks), dict(counting)
    sources = [
        SourceShard(record.shard, by_name[record.shard], counting_by_name[record.shard], record.digest)
        for record in counted
    ]
    for number in range(len(packed)):
        stretches = packed.stretches(number)
        needed = {source: sources[source] for stretch in stretches for source in stretch.sources}
        yield OutputItem(naming.shard(number), number, stretches, needed)


def _output_schema(state: DatasetState, old_id_col: str | None, keep_ids: bool) -> pa.Schema:
    """Return the output's columns: the frame's, with text ids and the shard's name as it is there."""
    meta = state.frame._meta
    id_type = backend.arrow_type_of(meta[state.source.id_col])
    own = state.source.schema
    kinds: dict[str, pa.DataType] = {}
    for name in meta.columns:
        if name == schema.KEPT:
            continue
        kind = backend.arrow_type_of(meta[name])
        kinds[name] = own.field(name).type if pa.types.is_null(kind) and name in own.names else kind
    if not keep_ids:
        kinds[state.source.id_col] = pa.string()
        if schema.KEY in kinds:
            kinds[schema.KEY] = pa.string()
        if old_id_col is not None:
            kinds[old_id_col] = id_type
    kinds[schema.SHARD] = schema.SHARD_TYPE
    return pa.schema(list(kinds.items()))
