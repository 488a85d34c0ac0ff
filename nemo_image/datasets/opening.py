"""Open a dataset: which shards, where, with which columns."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets import discover as discover_
from nemo_image.datasets.load import metadata_of_tar
from nemo_image.datasets.source import DatasetSource, Frames, OnMismatch
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import ArgumentError, DatasetError, MissingColumnError, ShardError
from nemo_image.shards import files, parquet
from nemo_image.shards.read import ShardReader

MANIFEST = "dataset.json"
"""Below ``_nemo_image/``: what the files of a folder do not say themselves, such as where the tars lie."""

SCHEMAS_AT_MOST = 32
"""How many footers are read to learn the type of a column that is all null in the first shard."""


@dataclass(frozen=True)
class Opened:
    """A dataset's source, shards, and what made its added columns (as the first shard says)."""

    source: DatasetSource
    shards: list[str]
    provenance: Mapping[str, dict[str, Any]]

    def held_in(self, frames: Frames) -> Opened:
        """Return the same, for frames of this kind."""
        return replace(self, source=replace(self.source, frames=frames))


def open_webdataset(
    path: str | os.PathLike[str] | Sequence[str],
    id_col: str,
    sidecars: Sequence[str],
    on_mismatch: OnMismatch,
    storage_options: Mapping[str, Any] | None,
) -> Opened:
    """Open what :meth:`ImageTextPairDataset.from_webdataset` is given."""
    if on_mismatch not in ("null", "drop", "raise"):
        raise ArgumentError(f"on_mismatch must be 'null', 'drop' or 'raise', not {on_mismatch!r}")
    if isinstance(sidecars, str):
        raise ArgumentError(f"sidecars must be a list of folders, not a string: [{sidecars!r}]")
    options = dict(storage_options or {})
    if isinstance(path, str | os.PathLike) and discover_.is_literal(os.fspath(path), options):
        manifest = read_manifest(os.fspath(path), options)
        if "tar_root" in manifest:
            return _open_metadata_folder(os.fspath(path).rstrip("/"), manifest, id_col, sidecars, on_mismatch, options)
    found = discover_.discover(path, options)
    from_tars = not found.without_tar and (
        len(found.without_parquet) == len(found.shards) or read_manifest(found.root, options).get("from_tars", False)
    )
    if not from_tars:
        discover_.require_partners(found)
    source = DatasetSource(
        tar_root=found.root,
        metadata_root=found.root,
        id_col=id_col,
        schema=pa.schema([]),
        built_from_tars=from_tars,
        on_mismatch=on_mismatch,
        storage_options=options,
    )
    return _with_schema(source, found.shards, sidecars)


def reopen(source: DatasetSource, shards: Sequence[str], target: str | None, sidecars: Sequence[str] = ()) -> Opened:
    """Open these shards of a dataset again, after it was saved in place, or to `target`.

    `target` may hold shards of other runs, which are not opened. `sidecars` come to those that there are, in place.
    """
    if target is None:
        fresh = replace(source, schema=pa.schema([]), sidecars={})
        return _with_schema(fresh, list(shards), [*source.sidecars, *sidecars])
    manifest = read_manifest(target, source.storage_options)
    options = dict(source.storage_options)
    opened = _open_metadata_folder(target, manifest, source.id_col, sidecars, source.on_mismatch, options, set(shards))
    return opened.held_in(source.frames)


def _open_metadata_folder(
    root: str,
    manifest: Mapping[str, Any],
    id_col: str,
    sidecars: Sequence[str],
    on_mismatch: OnMismatch,
    options: dict[str, Any],
    only: Collection[str] | None = None,
) -> Opened:
    """Open a folder of saved metadata whose tars lie elsewhere; all of its shards, or those of `only`."""
    shards = _parquets_below(root, manifest.get("folders", [""]), options)
    shards = [shard for shard in shards if only is None or shard in only]
    if not shards:
        raise DatasetError(f"{root} holds saved metadata of {manifest['tar_root']}, but no Parquet file: save it again")
    source = DatasetSource(
        tar_root=manifest["tar_root"],
        metadata_root=root,
        id_col=id_col,
        schema=pa.schema([]),
        on_mismatch=on_mismatch,
        storage_options=options,
    )
    return _with_schema(source, shards, sidecars)


def _parquets_below(root: str, folders: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    shards = []
    for folder in folders:
        inside = files.join(root, folder) if folder else root
        names = files.list_files(inside, ".parquet", options)
        shards += [posixpath.join(folder, name.removesuffix(".parquet")) for name in names]
    return sorted(shards)


def _with_schema(source: DatasetSource, shards: list[str], sidecars: Sequence[str]) -> Opened:
    own, provenance = _read_schema(source, shards)
    if source.id_col not in own.names:
        where = source.tar_url(shards[0]) if source.built_from_tars else source.parquet_url(shards[0])
        raise MissingColumnError(f"{where} has no column {source.id_col!r} (id_col); it has {', '.join(own.names)}")
    taken: dict[str, tuple[str, ...]] = {}
    columns = list(own)
    for folder in sidecars:
        beside, made_by = _read_sidecar_schema(folder, shards, source)
        # Every sidecar of results has reasons; the first one's are shown.
        known = [schema.IMAGE_ERROR] if any(field.name == schema.IMAGE_ERROR for field in columns) else []
        fields = [field for field in beside if field.name not in (schema.SHARD, source.id_col, *known)]
        doubled = sorted({field.name for field in fields} & {field.name for field in columns})
        if doubled:
            raise ArgumentError(f"sidecar {folder} has column {doubled[0]!r}, which the dataset has too: rename one")
        columns += fields
        taken[folder] = tuple(field.name for field in fields)
        provenance |= made_by
    return Opened(replace(source, schema=pa.schema(columns), sidecars=taken), shards, provenance)


def _read_schema(source: DatasetSource, shards: list[str]) -> tuple[pa.Schema, dict[str, dict[str, Any]]]:
    options = source.storage_options
    number, merged, summary = _first_schema(source, shards)
    first = source.parquet_url(shards[number])
    for shard in shards[number + 1 : SCHEMAS_AT_MOST]:
        if summary is None or not any(_says_nothing(field.type) for field in merged):
            break
        other = parquet.summary_or_none(source.parquet_url(shard), options)
        merged = merged if other is None else _merge(merged, other.schema)
    footer = None if summary is None else summary.footer
    if schema.SHARD in merged.names:
        # Ours if we wrote it; a foreign column of that name would be overwritten by each row's real shard.
        if footer is None:
            raise DatasetError(
                f"{first} has a column {schema.SHARD!r} of its own; nemo_image keeps each row's tar under that "
                "name: rename it"
            )
        merged = merged.remove(merged.get_field_index(schema.SHARD))
    made_by = {} if footer is None else {name: dict(made) for name, made in footer.columns.items()}
    return merged, made_by


def _first_schema(source: DatasetSource, shards: list[str]) -> tuple[int, pa.Schema, parquet.FileSummary | None]:
    """Return the number of the first shard that can be read, and its schema; the others fail when they are worked on.

    Raises
    ------
    ShardError
        That of the first shard, if none of the first few can be read.
    """
    failures: list[ShardError] = []
    for number, shard in enumerate(shards[:SCHEMAS_AT_MOST]):
        url = source.parquet_url(shard)
        try:
            if source.built_from_tars and parquet.summary_or_none(url, source.storage_options) is None:
                with ShardReader(source.tar_url(shard), source.storage_options) as reader:
                    return number, plain_schema(metadata_of_tar(reader).schema), None
            summary = parquet.read_summary(url, source.storage_options)
            return number, plain_schema(summary.schema), summary
        except ShardError as error:
            failures.append(error)
    raise failures[0]


def _read_sidecar_schema(
    folder: str, shards: Sequence[str], source: DatasetSource
) -> tuple[pa.Schema, dict[str, dict[str, Any]]]:
    for shard in shards:
        summary = parquet.summary_or_none(files.join(folder, shard + ".parquet"), source.storage_options)
        if summary is None:
            continue
        if source.id_col not in summary.schema.names:
            raise MissingColumnError(f"sidecar {folder}/{shard}.parquet has no column {source.id_col!r} to join it by")
        footer = summary.footer or parquet.Footer()
        return plain_schema(summary.schema), {name: dict(made) for name, made in footer.columns.items()}
    raise DatasetError(
        f"sidecar {folder} has no Parquet file for any of the {len(shards)} shards ({shards[0]}.parquet, …)"
    )


def plain_schema(wanted: pa.Schema) -> pa.Schema:
    """Return the names and types in which a file's columns are held."""
    return pa.schema([(field.name, schema.plain_type(field.type)) for field in wanted])


def _merge(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    kinds = {field.name: field.type for field in one}
    for field in plain_schema(two):
        current = kinds.get(field.name, pa.null())
        kinds[field.name] = join_types(current, field.type) or current
    return pa.schema(list(kinds.items()))


def _says_nothing(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds no value that tells its type: all null, or all lists empty."""
    return bool(pa.types.is_null(kind) or (pa.types.is_list(kind) and _says_nothing(kind.value_type)))


def join_types(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """Return the narrowest type that holds the values of two types of column, or None where there is none.

    As :func:`nemo_image.schema.unify_types`, which knows nulls, numbers, lists and structs; besides, times join in the
    finer unit and decimals with the digits of both. Integers of which only floats would be the common type (uint64 and
    signed ones) have none, because floats do not hold them.
    """
    if pa.types.is_decimal(one) and pa.types.is_decimal(two):
        return _join_decimals(one, two)
    for is_one, make in _TEMPORAL.items():
        if is_one(one) and is_one(two):
            return make(one, two)
    joined = schema.unify_types([one, two])
    if joined is not None and pa.types.is_floating(joined) and pa.types.is_integer(one) and pa.types.is_integer(two):
        return None
    return joined


def _join_decimals(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    scale = max(one.scale, two.scale)
    precision = scale + max(one.precision - one.scale, two.precision - two.scale)
    if precision > 76:
        return None
    wide = precision > 38 or pa.types.is_decimal256(one) or pa.types.is_decimal256(two)
    return pa.decimal256(precision, scale) if wide else pa.decimal128(precision, scale)


def _join_timestamps(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    if (one.tz is None) != (two.tz is None):
        return None  # a time of a place, and a time of no place
    return pa.timestamp(_finer(one, two), one.tz)


def _finer(one: pa.DataType, two: pa.DataType) -> str:
    units = ("s", "ms", "us", "ns")
    return units[max(units.index(one.unit), units.index(two.unit))]


def _join_times(one: pa.DataType, two: pa.DataType) -> pa.DataType:
    unit = _finer(one, two)
    return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)


_TEMPORAL: dict[Callable[[pa.DataType], bool], Callable[[pa.DataType, pa.DataType], pa.DataType | None]] = {
    pa.types.is_timestamp: _join_timestamps,
    pa.types.is_duration: lambda one, two: pa.duration(_finer(one, two)),
    pa.types.is_time: _join_times,
    pa.types.is_date: lambda one, two: one if one.equals(two) else pa.date64(),
}


def read_manifest(root: str, storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Read what ``_nemo_image/dataset.json`` says of a folder; empty where there is none."""
    try:
        return dict(json.loads(files.read_bytes(files.join(root, FOLDER, MANIFEST), storage_options)))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except ValueError as error:
        raise DatasetError(f"{root}/{FOLDER}/{MANIFEST} is garbled ({error}): delete it, then save again") from error


def write_manifest(root: str, values: Mapping[str, Any], storage_options: Mapping[str, Any]) -> None:
    """Write ``_nemo_image/dataset.json``, atomically."""
    with files.atomic_writer(files.join(root, FOLDER, MANIFEST), storage_options) as out:
        out.write(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")


def schema_of_frame(frame: Any) -> pa.Schema:
    """Return the Arrow types of a Dask frame's columns, without ``shard``."""
    names = [name for name in frame.columns if name != schema.SHARD]
    return pa.schema([(name, backend.arrow_type_of(frame._meta[name])) for name in names])


def name_shards(metadata: Any, tar_files: Sequence[str], root: str) -> Any:
    """Add ``shard`` to a frame of one partition a tar file."""
    import dask.dataframe as dd

    if metadata.npartitions != len(tar_files):
        raise ArgumentError(
            f"metadata has no column {schema.SHARD!r} and {metadata.npartitions} partitions for {len(tar_files)} "
            "tar files: give one partition a tar file, or a column that says each row's shard"
        )
    names = [posixpath.relpath(tar, root).removesuffix(".tar") for tar in tar_files]
    named = dd.from_map(_one_name, names, meta=schema.empty_frame([("name", schema.arrow_dtype("string"))]))
    plain = backend.in_pandas(metadata)
    meta = plain._meta.assign(**{schema.SHARD: schema.shard_meta()})
    made = plain.map_partitions(_add_shard, named, meta=meta, align_dataframes=False)
    made = backend.in_kind_of(made, metadata)
    # Moves nothing, but makes it one frame for Dask, which would else align filters of it by the index, in a shuffle.
    return made.repartition(npartitions=made.npartitions)


def _one_name(name: str) -> pd.DataFrame:
    return pd.DataFrame({"name": pd.Series([name], dtype=schema.arrow_dtype("string"))})


def _add_shard(frame: pd.DataFrame, names: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{schema.SHARD: schema.shard_column(str(names["name"].iloc[0]), len(frame))})
