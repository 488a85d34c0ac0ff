"""Write one output shard: its tar, its index, then its Parquet file, each atomically."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from nemo_image import schema
from nemo_image.engine.ledger import ShardRecord
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.export.copy import LargeWrites, SampleSource
from nemo_image.export.rewrite import renamed, rewritten_json
from nemo_image.shards import files, parquet
from nemo_image.shards.idx_file import write_idx
from nemo_image.shards.index import Member, Sample, TarIndex
from nemo_image.shards.write import TarWriter

logger = logging.getLogger("nemo_image")


@dataclass(frozen=True)
class ExportSettings:
    """What every output shard shares.

    Attributes
    ----------
    root : str
        The output folder.
    id_col : str
    old_id_col : str or None
    keep_ids : bool
    token : str
        Names the export; a finished file of the same token is left as it is.
    arrow_schema : pyarrow.Schema
        The output's columns.
    storage_options : dict
    """

    root: str
    id_col: str
    old_id_col: str | None
    keep_ids: bool
    token: str
    arrow_schema: pa.Schema
    footer_columns: Mapping[str, Mapping[str, Any]]
    storage_options: Mapping[str, Any]


@dataclass
class Taken:
    """Samples taken from one source shard, with their rows, in the same order.

    Attributes
    ----------
    tar_url : str
    samples : list of Sample
    rows : pyarrow.Table
    places : ndarray of int64
        Their places in the output shard.
    """

    tar_url: str
    samples: Sequence[Sample]
    rows: pa.Table
    places: Any


def is_written(settings: ExportSettings, shard: str) -> parquet.FileSummary | None:
    """Return what the output shard's Parquet file says if the shard was finished by this same export."""
    summary = parquet.summary_or_none(files.join(settings.root, shard + ".parquet"), settings.storage_options)
    if summary is None or summary.footer is None or summary.footer.plan != settings.token:
        return None
    sizes = {".tar": (summary.footer.source or {}).get("size"), ".idx": summary.footer.idx_size}
    for suffix, size in sizes.items():
        if size is not None and _size_of(settings, shard + suffix) != size:
            return None
    return summary


def _size_of(settings: ExportSettings, name: str) -> int | None:
    try:
        return files.identify(files.join(settings.root, name), settings.storage_options).size
    except FileNotFoundError:
        return None


def write_output(
    settings: ExportSettings, record: ShardRecord, new_ids: Callable[[int], str], taken: Sequence[Taken]
) -> None:
    """Write the output shard that `record` names from what was taken for it, and account for it there.

    Raises
    ------
    DatasetError
        If two samples would have the same key (with `keep_ids`).
    """
    shard = record.shard
    order = _in_order(taken)
    keys = [sample.key if settings.keep_ids else new_ids(place) for place, (_, sample, _) in enumerate(order)]
    _require_unique(keys, shard)
    if settings.keep_ids:
        _require_harmless(member.name for _, sample, _ in order for member in sample.members)
    tar_url = files.join(settings.root, shard + ".tar")
    ids = [one.rows[settings.id_col].to_pylist() for one in taken]
    old_ids = [ids[part][row] for part, _, row in order]
    odd_json = 0
    samples = []
    pieces = [(taken[part].tar_url, sample) for part, sample, _ in order]
    with files.atomic_writer(tar_url, settings.storage_options) as out, SampleSource(settings.storage_options) as tars:
        gathered = LargeWrites(out)
        writer = TarWriter(cast(BinaryIO, gathered))
        for piece, contents, key, old_id in zip(pieces, tars.read(pieces), keys, old_ids, strict=True):
            members, odd = _copy(settings, writer, tars, piece, contents, key, old_id)
            samples.append(Sample(key, members))
            odd_json += odd
        writer.close()
        gathered.flush()
    # As index_tar would read it: the keys differ, and so do the extensions of a sample's members.
    index = TarIndex(tuple(samples), (), (), writer.size)
    idx_size = None
    try:
        write_idx(index, files.join(settings.root, shard + ".idx"), settings.storage_options)
        idx_size = _size_of(settings, shard + ".idx")
    except ArgumentError as error:
        record.notes.append(f"no .idx: {error}")
    if odd_json:
        record.notes.append(f"{odd_json} JSON members are no JSON objects: copied as they are, without the new id")
    table = _rows_of(settings, shard, taken, keys, old_ids)
    record.rows_in = record.samples = len(order)
    record.rows_out = len(table)
    record.note_results(table, settings.footer_columns)
    footer = parquet.Footer(
        columns=settings.footer_columns,
        pending=parquet.count_pending(table, settings.footer_columns),
        source=files.FileIdentity(index.size).to_dict(),
        idx_size=idx_size,
        plan=settings.token,
        record={name: value for name, value in record.to_dict().items() if name not in ("seconds", "error", "status")},
    )
    url = files.join(settings.root, shard + ".parquet")
    record.rows_out = parquet.write_table(url, table, footer, settings.storage_options)


def _in_order(taken: Sequence[Taken]) -> list[tuple[int, Sample, int]]:
    """Return (part, sample, row of the part) for each place of the output shard."""
    size = sum(len(one.samples) for one in taken)
    order: list[tuple[int, Sample, int] | None] = [None] * size
    for part, one in enumerate(taken):
        for row, (sample, place) in enumerate(zip(one.samples, one.places, strict=True)):
            order[int(place)] = (part, sample, row)
    return [one for one in order if one is not None]


def _require_unique(keys: Sequence[str], shard: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise DatasetError(
                f"output shard {shard} would hold two samples with the key {key!r}: ids repeat across input shards, "
                "so export "
                "them without keep_ids (old_id_col keeps the old ids)"
            )
        seen.add(key)


def _require_harmless(names: Iterable[str]) -> None:
    """Refuse names that lead out of the folder into which somebody unpacks the tar."""
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if not parts[0] or ".." in parts or parts[0].endswith(":"):
            raise DatasetError(
                f"the member {name[:200]!r} would be unpacked outside of the folder it is unpacked in: export without "
                "keep_ids, which gives new names (old_id_col keeps the old ids)"
            )


def _copy(
    settings: ExportSettings,
    writer: TarWriter,
    tars: SampleSource,
    piece: tuple[str, Sample],
    contents: Sequence[memoryview | None],
    key: str,
    old_id: Any,
) -> tuple[tuple[Member, ...], int]:
    """Copy a sample's members under its new key; return them, and how many JSON members could not carry it."""
    odd = 0
    written = []
    tar_url, sample = piece
    for member, data in zip(sample.members, contents, strict=True):
        name = member.name if settings.keep_ids else renamed(member.name, key)
        if member.extension == "json" and not settings.keep_ids:
            whole = b"".join([data] if data is not None else tars.chunks(tar_url, member))
            fields: dict[str, Any] = {settings.id_col: key}
            if settings.old_id_col is not None:
                fields[settings.old_id_col] = old_id
            changed = rewritten_json(whole, fields, sample.key, key)
            odd += changed is None
            written.append(writer.add(name, whole if changed is None else changed))
        elif data is not None:
            written.append(writer.add(name, data))
        else:
            written.append(writer.add_from(name, member.size, tars.chunks(tar_url, member)))
    return tuple(written), odd


def _rows_of(
    settings: ExportSettings, shard: str, taken: Sequence[Taken], keys: Sequence[str], old_ids: Sequence[Any]
) -> pa.Table:
    rows = pa.concat_tables([one.rows for one in taken])
    places = np.concatenate([np.asarray(one.places) for one in taken])
    rows = rows.take(pa.array(np.argsort(places, kind="stable")))
    id_type = settings.arrow_schema.field(settings.id_col).type
    if not settings.keep_ids:
        old_keys = rows[schema.KEY].to_pylist() if schema.KEY in rows.column_names else []
        rows = _put(rows, settings.id_col, pa.array(list(keys), id_type))
        if settings.old_id_col is not None:
            kind = settings.arrow_schema.field(settings.old_id_col).type
            rows = _put(rows, settings.old_id_col, pa.array(list(old_ids)).cast(kind))
        if old_keys and settings.id_col != schema.KEY:
            rows = _put(rows, schema.KEY, pa.array(list(keys), pa.string()))
    rows = _put(rows, schema.SHARD, pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows), np.int32)), [shard]))
    return rows.select(settings.arrow_schema.names).cast(settings.arrow_schema)


def _put(rows: pa.Table, name: str, column: pa.Array) -> pa.Table:
    number = rows.schema.get_field_index(name)
    return rows.append_column(name, column) if number < 0 else rows.set_column(number, name, column)
