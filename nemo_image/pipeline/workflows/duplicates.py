"""The list of duplicates that a workflow leaves: Parquet files with the ids of the images to remove.

.. code-block:: text

    <output_path>/duplicates/part-00000.parquet   id, shard, duplicate_of, duplicate_of_shard, …; sorted by shard
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import schema
from nemo_image.datasets.footers import each, in_chunks
from nemo_image.datasets.load import id_positions, read_rows
from nemo_image.datasets.parquet_folder import split_names
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.exchange.scatter import ROWS
from nemo_image.dedup.exchange.work import remove
from nemo_image.errors import DatasetError
from nemo_image.pipeline.workflows.listing import ID, Listing, plain
from nemo_image.pipeline.workflows.names import require_clear_names
from nemo_image.shards import files, parquet

FOLDER = "duplicates"
WRITER = "duplicates"
PART_ROWS = 1_000_000
"""Judged rows of which one task lists the duplicates, about."""


def check_folder(folder: str, token: str | None, replace: bool, storage_options: files.StorageOptions) -> list[str]:
    """Look at what lies where a list is to be written; return our own files of other lists.

    Parameters
    ----------
    token : str or None
        The list's; None while it is not known.
    replace : bool
        Whether other lists of ours may be replaced.

    Raises
    ------
    DatasetError
        If there is anything else, or another list that may not be replaced.
    """
    if not files.exists(folder, storage_options):
        return []
    if not files.is_folder(folder, storage_options):
        raise DatasetError(f"{folder} is a file: give another output_path")
    files.sweep_temporaries(folder, storage_options=storage_options)
    names = files.list_files(folder, "", storage_options)
    others = []
    for name, plan in zip(names, each(_PlanOf(folder, storage_options), names, folder, storage_options), strict=True):
        if plan is None:
            raise DatasetError(f"{folder} holds something else ({name}): give another output_path, or move it away")
        if plan != token:
            others.append(name)
    if others and token is not None and not replace:
        raise DatasetError(
            f"{folder} holds the duplicates of another run (other rows or settings): clear_output=True replaces them, "
            "or give another output_path"
        )
    return others


@dataclass(frozen=True)
class _PlanOf:
    """Reads whose list a file is part of; None for a file that is not ours."""

    folder: str
    storage_options: files.StorageOptions

    def __call__(self, name: str) -> str | None:
        summary = parquet.summary_or_none(files.join(self.folder, name), self.storage_options)
        footer = None if summary is None else summary.footer
        return footer.plan if footer is not None and footer.record.get("writer") == WRITER else None


def clear(folder: str, token: str | None, replace: bool, storage_options: files.StorageOptions) -> None:
    """Remove the files of our other lists.

    Raises
    ------
    DatasetError
        As :func:`check_folder`.
    """
    for name in check_folder(folder, token, replace, storage_options):
        remove(files.join(folder, name), storage_options)


def write_duplicates(listing: Listing, folder: str, replace: bool) -> int:
    """Write a list of duplicates; what an earlier run of the same wrote is taken over. Return their number.

    Raises
    ------
    DatasetError
        If the folder holds something else, or ids do not say which rows are meant.
    RunError
        If files could not be read or written.
    """
    clear(folder, listing.token, replace, listing.options)
    parts = list(_parts(listing))
    if listing.naming != "file" and len(listing.shards) > 1:
        require_clear_names(listing, parts, files.join(listing.found, "names"))
    writing = WritePart(listing, folder)
    counts = run_all(
        "list duplicates",
        writing,
        enumerate(parts),
        len(parts),
        name_of=lambda item: f"part {item[0]}",
        rows_of=int,
    )
    return sum(counts)


def _parts(listing: Listing) -> Iterator[list[str]]:
    """Cut the shards into parts, but for those without rows, which have no results; at least one part."""
    counting = _CountRows(listing.found, listing.options)
    rows: dict[str, int] = {}
    for part in in_chunks(counting, listing.shards, listing.found, listing.options):
        rows |= part
    some: list[str] = []
    held = 0
    for shard in (shard for shard in listing.shards if shard in rows):
        if some and held + rows[shard] > PART_ROWS:
            yield some
            some, held = [], 0
        some.append(shard)
        held += rows[shard]
    yield some


@dataclass(frozen=True)
class _CountRows:
    """Counts the rows judged in each shard, from the footers of the result's files."""

    found: str
    storage_options: Mapping[str, Any]
    task_name = "nemo-image-count-results"

    def __call__(self, shards: Sequence[str]) -> dict[str, int]:
        counts = each(self._rows, shards, self.found, self.storage_options)
        return {shard: count for shard, count in zip(shards, counts, strict=True) if count is not None}

    def _rows(self, shard: str) -> int | None:
        url = files.join(self.found, ROWS, shard + ".parquet")
        return parquet.read_summary(url, self.storage_options).rows if files.exists(url, self.storage_options) else None


@dataclass(frozen=True)
class WritePart:
    """Writes the duplicates of some shards as one file.

    Attributes
    ----------
    listing : Listing
    folder : str
    """

    listing: Listing
    folder: str

    def __call__(self, item: tuple[int, list[str]]) -> int:
        """Write one part, unless it is there; return its number of rows."""
        number, shards = item
        listing = self.listing
        url = files.join(self.folder, f"part-{number:05d}.parquet")
        before = parquet.summary_or_none(url, listing.options)
        if before is not None and before.footer is not None and before.footer.plan == listing.token:
            return before.rows
        kinds = listing.schema()
        table = pa.concat_tables([kinds.empty_table(), *(self._table(shard, kinds) for shard in shards)])
        keys = [name for name in (schema.SHARD, ID) if name in kinds.names]
        # Arrow does not sort by dictionaries that differ from chunk to chunk.
        order = pc.sort_indices(plain(table.select(keys)), sort_keys=[(name, "ascending") for name in keys])
        table = table.unify_dictionaries().take(order)
        covered = {"first": shards[0], "last": shards[-1]} if listing.naming == "file" and shards else {}
        record = {"writer": WRITER, "rows": len(table), **covered}
        return parquet.write_table(url, table, parquet.Footer(plan=listing.token, record=record), listing.options)

    def _table(self, shard: str, kinds: pa.Schema) -> pa.Table:
        listing = self.listing
        found = listing.removed(shard)
        names = found[listing.source.id_col]
        columns = {name: found[name] for name in (schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD, *listing.extras)}
        columns[ID] = names
        columns[schema.SHARD] = pa.array([shard] * len(found), pa.string())
        if listing.naming == "row":
            columns[ID], columns[schema.SHARD] = split_names(names, listing.id_type)
            twins = split_names(found[schema.DUPLICATE_OF], listing.id_type)
            columns[schema.DUPLICATE_OF], columns[schema.DUPLICATE_OF_SHARD] = twins
        if listing.fields and len(found):
            rows = id_positions(names.combine_chunks(), listing.names(shard), shard)
            beside = read_rows(listing.source, shard, listing.fields).take(pa.array(rows))
            columns |= {name: beside[name] for name in listing.fields}
        else:
            columns |= {name: pa.array([], kinds.field(name).type) for name in listing.fields}
        return pa.table([_cast(columns[one.name], one.type) for one in kinds], schema=kinds)


def _cast(column: Any, kind: pa.DataType) -> Any:
    if not pa.types.is_dictionary(kind):
        return column.cast(kind)
    return column.cast(kind.value_type).dictionary_encode().cast(kind)
