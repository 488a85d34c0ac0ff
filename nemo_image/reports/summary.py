"""Count what a dataset holds: samples, bytes, formats, failures, and histograms of its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.load import read_rows
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import count_failures
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import NemoImageError, one_line
from nemo_image.shards.keys import IMAGE_EXTENSIONS
from nemo_image.shards.read import ShardReader, match_samples

BINS = 10
NOT_SCORES = frozenset({"key", "original_width", "original_height"})


@dataclass
class ShardSummary:
    """What one shard holds. Sizes are in bytes."""

    shard: str
    rows: int = 0
    samples: int = 0
    tar_bytes: int = 0
    image_bytes: int = 0
    members: dict[str, int] = field(default_factory=dict)
    samples_without_image: int = 0
    samples_without_row: int = 0
    rows_without_sample: int = 0
    repeated_members: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    captioned: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)
    nulls: dict[str, int] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Histogram:
    """Counts of a column's values between `edges`, and of its nulls."""

    edges: list[float]
    counts: list[int]
    nulls: int


class Summarize:
    """Summarises one shard; returns its error instead of raising it."""

    task_name = "nemo-image-inspect"

    def __init__(self, source: DatasetSource, columns: Sequence[str]) -> None:
        self.source = source
        self.columns = list(columns)

    def __call__(self, shard: str) -> ShardSummary:
        """Summarise `shard`."""
        found = ShardSummary(shard)
        try:
            self._tar(shard, found)
        except NemoImageError as error:
            found.error = one_line(error)
        return found

    def _tar(self, shard: str, found: ShardSummary) -> None:
        source = self.source
        present = [source.id_col, *(name for name in self.columns if name != source.id_col)]
        table = read_rows(source, shard, present)
        found.rows = len(table)
        for name in self.columns:
            self._column(name, table[name], found)
        with ShardReader(source.tar_url(shard), source.storage_options) as reader:
            index = reader.index
            matched = match_samples(reader, table[source.id_col].to_pylist(), source.id_col)
        found.samples, found.tar_bytes, found.repeated_members = len(index), index.size, len(index.repeated)
        members: Counter[str] = Counter()
        for sample in index.samples:
            members.update(member.extension for member in sample.members)
            found.image_bytes += sum(one.size for one in sample.members if one.extension in IMAGE_EXTENSIONS)
            found.samples_without_image += sample.image is None
            found.captioned += sample.caption is not None
        found.members = dict(members)
        found.rows_without_sample = int((matched < 0).sum())
        found.samples_without_row = len(index) - len(np.unique(matched[matched >= 0]))

    def _column(self, name: str, column: pa.ChunkedArray, found: ShardSummary) -> None:
        found.nulls[name] = column.null_count
        if name == schema.IMAGE_ERROR:
            found.failures = count_failures(column.drop_null().to_pylist())
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            values = column.drop_null().to_numpy().astype(np.float64)
            found.values[name] = _sketch(values[np.isfinite(values)])


SKETCH_POINTS = 512


def _sketch(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Return a shard's values, or evenly spaced quantiles of them where there are many."""
    if len(values) <= SKETCH_POINTS:
        return [float(value) for value in values]
    return [float(value) for value in np.quantile(values, np.linspace(0, 1, SKETCH_POINTS))]


def summarize(dataset: ImageTextPairDataset) -> dict[str, Any]:
    """Return what a dataset holds, as plain values for JSON.

    Histograms are made from at most 512 quantiles a shard, weighted by its rows, so that memory stays small; they are
    exact for shards of up to 512 rows.
    """
    source = dataset.source
    numeric = [one.name for one in source.schema if _is_number(one.type) and one.name not in NOT_SCORES]
    columns = [*numeric, *([schema.IMAGE_ERROR] if schema.IMAGE_ERROR in source.schema.names else [])]
    work = Summarize(source, [name for name in columns if name != source.id_col])
    shards = dataset.shards
    found: list[ShardSummary] = []
    with Progress("inspect", len(shards)) as progress:
        for one in run_tasks(work, shards, on_error=_failed, count=len(shards)):
            found.append(one)
            progress.advance(one.rows)
    found.sort(key=lambda one: one.shard)
    return _merged(dataset, found, [name for name in numeric if name != source.id_col])


def _failed(shard: str, error: BaseException) -> ShardSummary:
    return ShardSummary(shard, error=one_line(error))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _merged(dataset: ImageTextPairDataset, found: Sequence[ShardSummary], numeric: Sequence[str]) -> dict[str, Any]:
    sums = {
        name: sum(getattr(one, name) for one in found)
        for name in (
            "rows",
            "samples",
            "tar_bytes",
            "image_bytes",
            "captioned",
            "samples_without_image",
            "samples_without_row",
            "rows_without_sample",
            "repeated_members",
        )
    }
    return {
        "path": dataset.path,
        "id_col": dataset.id_col,
        "shards": len(found),
        **sums,
        "members": _added(one.members for one in found),
        "image_errors": _added(one.failures for one in found),
        "columns": {field.name: str(field.type) for field in dataset.source.schema},
        "made_by": {name: made.get("model", "") for name, made in dataset.provenance.items()},
        "histograms": {
            name: _histogram(name, found).__dict__ for name in numeric if any(one.values.get(name) for one in found)
        },
        "unreadable": {one.shard: one.error for one in found if one.error is not None},
    }


def _added(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total.most_common())


def _histogram(name: str, found: Sequence[ShardSummary]) -> Histogram:
    values = np.concatenate([np.asarray(one.values.get(name, []), np.float64) for one in found])
    weights = np.concatenate([_weights(one, name) for one in found])
    counts, edges = np.histogram(values, bins=BINS, weights=weights)
    return Histogram(
        [float(edge) for edge in edges],
        [round(count) for count in counts.tolist()],
        sum(one.nulls.get(name, 0) for one in found),
    )


def _weights(one: ShardSummary, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    points = len(one.values.get(name, []))
    rows = one.rows - one.nulls.get(name, 0)
    return np.full(points, rows / points if points else 0.0)
