"""Save a dataset's metadata: plan on the client, one task a shard, then the ledger."""

from __future__ import annotations

import logging
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets import opening, scattered
from nemo_image.datasets.columns import with_earlier
from nemo_image.datasets.partitions import shard_tasks
from nemo_image.datasets.quarantine import QUARANTINE
from nemo_image.datasets.save_shard import IsFinished, SaveItem, SaveShard
from nemo_image.datasets.saved_columns import SavedColumns
from nemo_image.datasets.schemas import unify_schemas
from nemo_image.datasets.settled import settled_as_before
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState
from nemo_image.engine import ledger
from nemo_image.engine.attempts import Attempts
from nemo_image.engine.ledger import failed_shards
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, RunError, TooManyFailuresError, one_line
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

FAILURES_NAMED = 10
DEFAULT_FAILURE_RATIO = 0.05
OTHER_PARTS_S = 24 * 3600
"""Seconds after which another part's temporary file is taken for left over."""


@dataclass(frozen=True)
class SaveOptions:
    """How a save goes about it; see :meth:`ImageTextPairDataset.save_metadata`."""

    resume: bool = True
    max_failure_ratio: float = DEFAULT_FAILURE_RATIO
    part: tuple[int, int] | None = None
    retry_failed: bool = False
    quarantine_bytes: bool = False

    def check(self) -> None:
        """Raise if an option is out of range.

        Raises
        ------
        ArgumentError
            Naming it.
        """
        if not 0 <= self.max_failure_ratio <= 1:
            raise ArgumentError(f"max_failure_ratio must lie in [0, 1], not {self.max_failure_ratio}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ArgumentError(f"part must be (i, n) with i from 1 to n, not {self.part}: parts count from 1")
        if self.retry_failed and not self.resume:
            raise ArgumentError("retry_failed keeps what is good, resume=False computes all anew: give one of them")

    def shards_of(self, shards: Sequence[str]) -> list[str]:
        """Return the shards that this run works on."""
        return list(shards) if self.part is None else list(shards)[self.part[0] - 1 :: self.part[1]]


def save(
    state: DatasetState, target: str | None, columns: Sequence[str] | None, options: SaveOptions
) -> tuple[DatasetState, dict[str, Any]]:
    """Compute and write a dataset's metadata; return the saved dataset, re-read, and the run's totals.

    See :meth:`ImageTextPairDataset.save_metadata`, which calls this.
    """
    options.check()
    target = _elsewhere(state, target, columns)
    source = state.source
    root = target or source.metadata_root
    with run_lock(root, "save_metadata", source.storage_options, options.part):
        _sweep(root, state.shards, source.storage_options, options.part)
        if options.resume:
            state = settled_as_before(state, root)
        state, notes = unify_schemas(state)
        for note in notes:
            logger.warning("%s: %s", source.metadata_root, note)
        _write_manifest(state, target)
        records, saved = _run(state, root, target, columns, options)
        totals = finish(root, "save_metadata", records, source.storage_options, saved.fingerprints, notes)
        # What workers that died in this run left.
        _sweep(root, state.shards, source.storage_options, options.part)
        Attempts(root, source.storage_options).clear()
    return _saved(state, target, options, bool(notes)), totals


def _saved(state: DatasetState, target: str | None, options: SaveOptions, differ: bool) -> DatasetState:
    """Open what was saved: all shards, or those of a part."""
    mine = options.shards_of(state.shards)
    if not mine:
        return state  # more parts than shards: this one had nothing to do
    opened = opening.reopen(state.source, state.shards, target)
    if options.part is not None:
        there = set(opened.shards)
        opened = replace(opened, shards=[shard for shard in mine if shard in there])
    saved = DatasetState.of(opened)
    # Enriched in place, each shard keeps the types of the columns that it had.
    return unify_schemas(saved)[0] if target is None and differ else saved


def _run(
    state: DatasetState, root: str, target: str | None, columns: Sequence[str] | None, options: SaveOptions
) -> tuple[list[ledger.ShardRecord], SavedColumns]:
    source = state.source
    saved = _columns_to_save(state, target, columns)
    frame = state.frame[[schema.SHARD, source.id_col, *(field.name for field in saved.fields)]]
    frame = with_earlier(frame, (root, source.metadata_root) if options.resume else (), options.retry_failed)
    mine = options.shards_of(state.shards)
    failed = failed_shards(root, source.storage_options) if options.retry_failed else None
    work = SaveShard(source, root, saved, options.resume, failed, options.quarantine_bytes)
    with scattered.saved_items(frame, shard_tasks(frame), state.shards, root, source) as items:
        takes_strangers = options.part is None or options.part[0] == 1
        chosen = _of_part(items, set(mine), set(state.shards) if takes_strangers else None)
        records = run_shards("save_metadata", work, chosen, len(mine), options.max_failure_ratio, root, source)
    return records, saved


def _of_part(items: Iterable[SaveItem], mine: set[str], known: set[str] | None) -> Iterator[SaveItem]:
    """Leave out other parts' shards. Rows that say a shard that the dataset lacks fail in the first part alone."""
    for item in items:
        if item.shard in mine or (known is not None and item.shard not in known):
            yield item


def pending_shards(state: DatasetState, target: str | None, columns: Sequence[str] | None) -> list[str]:
    """Return the shards that a save would compute.

    See :meth:`ImageTextPairDataset.pending_shards`, which calls this.
    """
    target = _elsewhere(state, target, columns)
    state, _ = unify_schemas(settled_as_before(state, target or state.source.metadata_root))
    source = state.source
    saved = _columns_to_save(state, target, columns)
    finished = IsFinished(SaveShard(source, target or source.metadata_root, saved, resume=True))
    shards = list(state.shards)
    found = run_tasks(finished, shards, on_error=lambda shard, error: (shard, False), count=len(shards))
    return sorted(shard for shard, is_finished in found if not is_finished)


def _sweep(root: str, shards: Sequence[str], storage_options: Any, part: tuple[int, int] | None) -> None:
    """Remove what killed writers left. Other parts' writers may be alive, on machines that share no locks."""
    folders = {posixpath.dirname(shard) for shard in shards}
    quarantined = {posixpath.join(ledger.FOLDER, QUARANTINE, folder).rstrip("/") for folder in folders}
    files.sweep_temporaries(
        root,
        older_than_s=0 if part is None else OTHER_PARTS_S,
        storage_options=storage_options,
        folders=sorted({"", ledger.FOLDER, *folders, *quarantined}),
    )


def _elsewhere(state: DatasetState, target: str | None, columns: Sequence[str] | None) -> str | None:
    """Return the folder to save to; None for that which the metadata lie in, named or not."""
    if target == state.source.metadata_root:
        target = None
    if target is not None and target == state.source.tar_root:
        raise ArgumentError(f"path {target!r} is where the tars lie: give another folder, or none to enrich in place")
    if columns is not None:
        if target is None:
            raise ArgumentError(
                "columns chooses what goes to another folder: give its path too (in place, every column stays)"
            )
        if isinstance(columns, str):
            raise ArgumentError(f"columns must be a list of names, not a string: [{columns!r}]")
        state.require_columns(columns)
    return target


def _columns_to_save(state: DatasetState, target: str | None, columns: Sequence[str] | None) -> SavedColumns:
    """Tell which columns the frame must give, and in which types every shard writes them."""
    source = state.source
    lineage = state.lineage
    in_place = target is None
    names = list(state.frame.columns) if columns is None else list(columns)
    if in_place and not lineage.touched:
        # What the user did not touch is already in the file.
        names = list(lineage.pending)
    if schema.IMAGE_ERROR in lineage.pending:
        # Without the reasons, a row that failed could not be told from one that is not computed yet.
        names.append(schema.IMAGE_ERROR)
    names = [name for name in dict.fromkeys(names) if name not in (schema.SHARD, source.id_col)]
    meta = state.frame._meta
    fields = [pa.field(name, _saved_type(state, name, meta)) for name in names]
    id_type = source.schema.field(source.id_col).type if source.id_col in source.schema.names else pa.string()
    fingerprints = {name: lineage.provenance[name] for name in names if name in lineage.provenance}
    return SavedColumns(
        fields=fields,
        id_field=pa.field(source.id_col, id_type),
        fingerprints=fingerprints,
        computed=[name for name in names if name in lineage.pending],
        in_place=in_place,
        plan=tokenize(state.frame) if lineage.touched else None,
        reads_images=lineage.reads_images,
    )


def _saved_type(state: DatasetState, name: str, meta: Any) -> pa.DataType:
    pending = state.lineage.pending
    if name in pending:
        return backend.arrow_type_of(schema.empty_frame([(name, pending[name])])[name])
    kind = backend.arrow_type_of(meta[name])
    own = state.source.schema
    return own.field(name).type if pa.types.is_null(kind) and name in own.names else kind


def _write_manifest(state: DatasetState, target: str | None) -> None:
    source = state.source
    folders = sorted({posixpath.dirname(shard) for shard in state.shards})
    if target is not None:
        values: dict[str, Any] = {
            "tar_root": files.absolute(source.tar_root),
            "folders": folders,
            "id_col": source.id_col,
        }
        opening.write_manifest(target, values, source.storage_options)
    elif source.built_from_tars:
        # Without this, a run that was stopped would leave a folder of which only some tars have a Parquet file.
        opening.write_manifest(source.metadata_root, {"from_tars": True}, source.storage_options)


def run_shards(
    label: str,
    work: Callable[[Any], ledger.ShardRecord],
    items: Iterable[Any],
    count: int,
    max_failure_ratio: float,
    root: str,
    source: DatasetSource,
) -> list[Any]:
    """Run `work` over shards with progress, stopping early where too many fail (with a ledger below `root`)."""
    records: list[ledger.ShardRecord] = []
    allowed = max(1.0, max_failure_ratio * count) if max_failure_ratio > 0 else 0.0
    failed = 0

    def too_many() -> bool:
        return failed > allowed

    started = time.monotonic()
    with Progress(label, count) as progress:
        for record in run_tasks(work, items, on_error=_dead_task, count=count, should_stop=too_many):
            records.append(record)
            failed += record.status == "failed"
            progress.advance(record.rows_out or 0)
    logger.info("%s: %d shards in %.1f s", label, len(records), time.monotonic() - started)
    if too_many() and len(records) < count:
        failures = {record.shard: record.error or "" for record in records if record.status == "failed"}
        url, _ = ledger.write_ledger(root, label, records, source.storage_options)
        raise TooManyFailuresError(
            f"stopped early: {failed} of the first {len(records)} shards failed, more than max_failure_ratio="
            f"{max_failure_ratio} of {count} allows (ledger: {url}). {_causes(failures)}",
            failures,
        )
    return records


def _dead_task(item: Any, error: BaseException) -> ledger.ShardRecord:
    return ledger.ShardRecord(shard=item.shard, status="failed", error=one_line(error))


def finish(
    root: str,
    kind: str,
    records: Sequence[ledger.ShardRecord],
    storage_options: Any,
    made_by: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the ledger of a run; raise if shards failed."""
    try:
        url, totals = ledger.write_ledger(root, kind, records, storage_options, made_by, notes)
    except OSError as error:
        failures = {record.shard: record.error or "" for record in records if record.status == "failed"}
        if not failures:
            raise
        # A full disk, perhaps: the shards say more of it than the ledger.
        raise RunError(
            f"{len(failures)} of {len(records)} shards failed, and the ledger could not be written "
            f"({one_line(error)}). {_causes(failures)}",
            failures,
        ) from error
    totals["ledger"] = url
    failures = totals["failed_shards"]
    if failures:
        raise RunError(
            f"{len(failures)} of {len(records)} shards failed, the others are finished (ledger: {url}). "
            f"{_causes(failures)}",
            failures,
        )
    return totals


def _causes(failures: dict[str, str]) -> str:
    named = [f"{shard}: {cause}" for shard, cause in sorted(failures.items())[:FAILURES_NAMED]]
    more = len(failures) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")


def materialize(state: DatasetState, always: bool = False) -> tuple[DatasetState, dict[str, Any] | None]:
    """Compute what is pending into the dataset's ``_nemo_image/`` folder, one folder for each plan.

    See :meth:`ImageTextPairDataset.materialize`, which calls this.
    """
    if not state.lineage.pending and not always:
        return state, None
    token = tokenize(state.frame, sorted(state.lineage.pending))
    target = files.join(state.source.metadata_root, ledger.FOLDER, f"materialized-{token[:16]}")
    return save(state, target, None, SaveOptions())
