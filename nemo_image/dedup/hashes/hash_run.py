"""Deduplication by a hash of each image: hash, bring equal or near hashes together, and judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.passes import file_identities, run_all
from nemo_image.dedup.clusters.bucket import read_rows
from nemo_image.dedup.exchange.gather import FOUND, GatherRange, WriteFound, gather, range_of_groups
from nemo_image.dedup.exchange.rows import HASH, ORDER, Hashes, Order
from nemo_image.dedup.exchange.runs import MAX_BUCKETS
from nemo_image.dedup.exchange.scatter import GROUPS, RUNS, Keyed, Scattered, ScatterGroup, make_groups, scatter
from nemo_image.dedup.exchange.survey import count_rows, has_error, passed_by, state_columns
from nemo_image.dedup.exchange.usable import BAD_VALUE, JUDGED, NO_VALUE, PASSED_BY
from nemo_image.dedup.exchange.work import Work, begin, remove
from nemo_image.dedup.hashes.hamming import hashes_from_hex, near_hashes
from nemo_image.dedup.result import RESULT, DedupResult, with_columns
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.run_lock import run_lock
from nemo_image.shards import files

ROW_BYTES = 160
"""Bytes that a row of a run file takes, about."""

BUCKET_ROWS = 2**21
HASH_WORDS = ("id", "random")
"""The orders that need no column."""

KEY = "image_key"
"""The column of a run file with the hash of the image."""

DISTANCE = "hash_distance"
"""Bits in which a row's hash differs from that of the row whose copy it is."""

FLAT = np.array([0, 2**63], np.uint64)
"""The hashes of pictures of one colour, whatever colour that is."""


@dataclass(frozen=True)
class HashSettings:
    """How rows are deduplicated by a hash.

    Attributes
    ----------
    tier : str
    column : str
        That the hash goes to.
    order : Order
    id_column : str
    random_state : int
    max_distance : int or None
        Bits in which the hashes of copies may differ; None: they are equal.
    """

    tier: str
    column: str
    order: Order
    id_column: str
    random_state: int
    max_distance: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What made a result: values for JSON."""
        order = [self.order.name, self.order.column, self.order.ascending]
        return {
            "hash": self.column,
            "which_to_keep": order,
            "id_column": self.id_column,
            "random_state": self.random_state,
            "max_distance": self.max_distance,
        }


def deduplicate(
    dataset: ImageTextPairDataset,
    hashing: Any,
    fingerprint: Mapping[str, Any],
    settings: HashSettings,
    output_dir: str | None,
) -> tuple[ImageTextPairDataset, DedupResult]:
    """Hash a dataset's images, judge, and return the dataset with the result's columns, and the result.

    Parameters
    ----------
    hashing : callable
        Makes the hash column and ``image_error`` of a frame.
    fingerprint : dict
        What makes the hashes.
    """
    dataset.require_columns([settings.id_column, *settings.order.columns])
    if settings.order.column:
        settings.order.require_sortable(backend.arrow_type_of(dataset.metadata._meta[settings.order.name]))
    options = dataset.source.storage_options
    names = [schema.SHARD, dataset.id_col, settings.id_column, *settings.order.columns]
    names += state_columns(list(dataset.metadata.columns))
    seen = str(tokenize(dataset.metadata[list(dict.fromkeys(names))], file_identities(dataset), fingerprint))
    token = str(tokenize(seen, settings.values))
    folder = output_dir or files.join(dataset.path, FOLDER, f"dedup-{token[:16]}")
    with run_lock(folder, "dedup", options):
        plan = {"operator": settings.tier, "token": token}
        begin(folder, plan, options, named_by_user=output_dir is not None)
        if files.exists(files.join(folder, RESULT), options):
            result = DedupResult.read(folder, options)
        else:
            hashed = _hashed(dataset, hashing, fingerprint, settings, seen)
            result = _judge(Work.of(hashed, [settings.column, *names, schema.IMAGE_ERROR]), folder, settings)
            result.write(options)
        for name in (FOUND, GROUPS, RUNS):
            remove(files.join(folder, name), options)
    return with_columns(dataset, result, token, []), result


def _hashed(
    dataset: ImageTextPairDataset, hashing: Any, fingerprint: Mapping[str, Any], settings: HashSettings, seen: str
) -> ImageTextPairDataset:
    """Hash the images into files of their own, which later runs with other settings find again."""
    outputs = {settings.column: schema.arrow_dtype("string"), schema.IMAGE_ERROR: schema.arrow_dtype("string")}
    lazy = dataset.map_columns(
        hashing, outputs=outputs, fingerprints=dict.fromkeys(outputs, fingerprint), reads_images=True
    )
    beside = [settings.id_column, *settings.order.columns]
    if schema.IS_DUPLICATE in dataset.metadata.columns:
        beside.append(schema.IS_DUPLICATE)
    columns = [settings.column, *(name for name in dict.fromkeys(beside) if name not in (schema.SHARD, dataset.id_col))]
    return lazy.save_metadata(files.join(dataset.path, FOLDER, f"hashes-{seen[:16]}"), columns=columns)


def _judge(work: Work, folder: str, settings: HashSettings) -> DedupResult:
    options = work.source.storage_options
    counts = count_rows(work, settings.id_column)
    buckets = 1
    if settings.max_distance is None:
        buckets = max(1, min(MAX_BUCKETS, sum(one.judged for one in counts) // BUCKET_ROWS))
    keying = KeyByHash(settings.column, buckets, settings.order)
    scattering = ScatterGroup(work.source, folder, keying, buckets, settings.id_column, settings.random_state)
    tasks = work.tasks(work.columns)
    scattered = scatter(scattering, list(make_groups(counts, tasks, ROW_BYTES)), "bring hashes together")
    ranges = range_of_groups(scattered)
    urls = [url for one in scattered for url in one.urls]
    write = WriteFound(folder, ranges, options)
    if urls:
        solving = SolveHashes(urls, settings, write, options)
        run_all(
            "compare hashes", solving, range(buckets), buckets, name_of=lambda number: f"bucket {number}", rows_of=int
        )
    else:  # no row has a hash
        buckets = 1
        write(0, _nothing_found(work, settings))
    gathering = GatherRange(folder, folder, work.source.id_col, buckets, settings.tier, options)
    gathered = gather(gathering, ranges)
    return _result(work, folder, settings, scattered, sum(one.removed for one in gathered))


def _nothing_found(work: Work, settings: HashSettings) -> pa.Table:
    """Return what :class:`SolveHashes` writes, without rows."""
    id_type = schema.plain_type(backend.arrow_type_of(work.dataset.metadata._meta[settings.id_column]))
    kinds = {
        "row": pa.int64(),
        schema.IS_DUPLICATE: pa.bool_(),
        schema.DUPLICATE_OF: id_type,
        schema.DUPLICATE_OF_SHARD: pa.string(),
        settings.column: pa.string(),
    }
    if settings.max_distance is not None:
        kinds[DISTANCE] = pa.int32()
    return pa.schema(kinds.items()).empty_table()


def _result(work: Work, folder: str, settings: HashSettings, groups: list[Scattered], removed: int) -> DedupResult:
    id_type = schema.plain_type(backend.arrow_type_of(work.dataset.metadata._meta[settings.id_column]))
    columns = {
        schema.IS_DUPLICATE: "bool",
        schema.DUPLICATE_OF: str(id_type),
        schema.DUPLICATE_OF_SHARD: "string",
        schema.DUPLICATE_TIER: "string",
        settings.column: "string",
    }
    if settings.max_distance is not None:
        columns[DISTANCE] = "int32"
    result = DedupResult(
        folder=folder,
        tier=settings.tier,
        rows=sum(one.rows for one in groups),
        kept=sum(one.judged for one in groups) - removed,
        removed=removed,
        passed_by=sum(one.passed_by for one in groups),
        without_value=sum(one.no_value for one in groups),
        bad_value=sum(one.bad_value for one in groups),
        columns=columns,
        settings={"operator": f"{settings.tier.capitalize()}Dedup", **settings.values},
    )
    result.check()
    return result


class KeyByHash:
    """Brings rows of equal hashes to one bucket."""

    def __init__(self, column: str, buckets: int, order: Order) -> None:
        self.column = column
        self.buckets = buckets
        self.order = order

    def __call__(self, frame: pd.DataFrame, hashes: Hashes) -> Keyed:
        """Return the rows that have a hash of their image."""
        keys = backend.arrow_values(frame[self.column])
        has_key = np.asarray(keys.is_valid())
        failed, entered = has_error(frame), passed_by(frame)
        states = np.where(has_key, JUDGED, np.where(failed, BAD_VALUE, NO_VALUE)).astype(np.int8)
        states[entered] = PASSED_BY
        wrong = np.flatnonzero(states == BAD_VALUE)
        reasons = (
            dict(zip(wrong.tolist(), frame[schema.IMAGE_ERROR].iloc[wrong].tolist(), strict=True)) if len(wrong) else {}
        )
        rows = np.flatnonzero(states == JUDGED)
        taken = keys.take(pa.array(rows))
        columns = {KEY: taken, HASH: pa.array(hashes[rows])}
        if self.order.column:
            columns[ORDER] = backend.arrow_values(frame[self.order.name]).take(pa.array(rows))
        heads = [int(text[:8], 16) for text in taken.to_pylist()]
        buckets = (np.array(heads, np.int64) * self.buckets) >> 32
        return Keyed(pa.table(columns), rows, buckets, states, reasons)


class SolveHashes:
    """Judges the rows of a bucket by their hashes.

    Parameters
    ----------
    sink : callable
        Takes the bucket's number and what was found.
    """

    def __init__(self, urls: list[str], settings: HashSettings, sink: Any, storage_options: Any) -> None:
        self.urls = urls
        self.settings = settings
        self.sink = sink
        self.storage_options = storage_options

    def __call__(self, number: int) -> int:
        """Judge one bucket; return how many rows it has."""
        table = read_rows(self.urls, number, None, self.storage_options)
        table = table.take(pc.sort_indices(table, sort_keys=self.settings.order.sort_keys()))
        if self.settings.max_distance is None:
            twin, distance = _first_equal(table), None
        else:
            distance, twin = _nearest(hashes_from_hex(table[KEY]), self.settings.max_distance)
        take = pa.array(twin, mask=twin < 0)
        found = {
            "row": table["row"],
            schema.IS_DUPLICATE: pa.array(twin >= 0),
            schema.DUPLICATE_OF: table["id"].take(take),
            schema.DUPLICATE_OF_SHARD: table[schema.SHARD].take(take),
            self.settings.column: table[KEY],
        }
        if distance is not None:
            found[DISTANCE] = pa.array(distance.astype(np.int32), mask=twin < 0)
        self.sink(number, pa.table(found))
        return len(table)


def _nearest(hashes: Hashes, max_distance: int) -> tuple[Any, Any]:
    """Return distance and twin of each row; hashes that tell nothing of a picture have no twin, and are none."""
    told = np.flatnonzero(~np.isin(hashes, FLAT))
    distance = np.full(len(hashes), -1, np.int16)
    twin = np.full(len(hashes), -1, np.int64)
    near, which = near_hashes(hashes[told], max_distance)
    distance[told] = near
    twin[told] = np.where(which < 0, -1, told[which])
    return distance, twin


def _first_equal(table: pa.Table) -> Any:
    """Return, for each row, the first row of the same hash; -1 for that row itself."""
    codes = table[KEY].combine_chunks().dictionary_encode().indices.to_numpy()
    _, firsts = np.unique(codes, return_index=True)
    twin = firsts[codes]
    return np.where(twin == np.arange(len(codes)), -1, twin)
