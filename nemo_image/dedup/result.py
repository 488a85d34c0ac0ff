"""The result of a deduplication: a folder of files, and columns of the dataset that read them."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.load import rows_by_id
from nemo_image.datasets.source import DatasetSource
from nemo_image.dedup.exchange.gather import DUPLICATES
from nemo_image.dedup.exchange.scatter import ROWS
from nemo_image.dedup.exchange.survey import passed_by
from nemo_image.dedup.exchange.work import read_json, write_json
from nemo_image.errors import DatasetError
from nemo_image.shards import files

RESULT, SUMMARY = "result.json", "dedup_summary.csv"


@dataclass(frozen=True)
class SweepPoint:
    """How many of the judged rows a threshold keeps and removes."""

    eps: float
    kept: int
    removed: int

    @property
    def total(self) -> int:
        """Rows judged."""
        return self.kept + self.removed

    @property
    def share(self) -> float:
        """Share of the rows kept; 1 where there are none."""
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class Missed:
    """What a sample of rows tells of pairs that were never compared, because they lie in different clusters.

    Attributes
    ----------
    sampled : int
        Rows of the sample.
    pairs, pairs_compared : int
        Pairs of a sampled row and any other at or above the threshold: in the whole dataset, and among those compared.
    rows, rows_compared : int
        Sampled rows with such a pair: in the whole dataset, and among those compared.
    """

    sampled: int
    pairs: int
    pairs_compared: int
    rows: int
    rows_compared: int

    @property
    def pair_recall(self) -> float | None:
        """Share of the pairs that were compared; None where the sample has no pair."""
        return self.pairs_compared / self.pairs if self.pairs else None

    @property
    def row_recall(self) -> float | None:
        """Share of the sampled rows with a pair of which at least one was compared; None where there are none."""
        return self.rows_compared / self.rows if self.rows else None

    def __str__(self) -> str:
        if not self.pairs:
            return f"{self.sampled:,} sampled rows have no neighbour at the threshold, in any cluster"
        return (
            f"of {self.sampled:,} sampled rows, {self.rows:,} have neighbours at the threshold in the whole dataset; "
            f"{self.rows_compared:,} ({self.row_recall:.1%}) have one that they were compared with. Pairs: "
            f"{self.pairs:,}, compared: {self.pairs_compared:,} ({self.pair_recall:.1%})"
        )


@dataclass(frozen=True)
class DedupResult:
    """What a deduplication found. Read one again with :meth:`read`.

    Attributes
    ----------
    folder : str
        Where its files lie; ``duplicate_ids.parquet`` and ``dedup_summary.csv`` among them.
    tier : str
        ``"exact"``, ``"perceptual"`` or ``"semantic"``.
    rows : int
        Of the dataset: ``kept + removed + passed_by + without_value + bad_value``.
    kept, removed : int
        Rows judged.
    passed_by : int
        Rows that entered as duplicates.
    without_value : int
        Rows with nothing to judge by: no embedding, no image.
    bad_value : int
        Rows whose embedding is zero or not finite; ``image_error`` says so.
    columns : dict of str to str
        The columns that it adds, and their Arrow types.
    settings : dict
        What made it.
    n_clusters : int or None
    sweep : list of SweepPoint
        The share kept at the threshold used, which comes first, and at others.
    missed : Missed or None
    """

    folder: str
    tier: str
    rows: int
    kept: int
    removed: int
    passed_by: int
    without_value: int
    bad_value: int
    columns: dict[str, str]
    settings: dict[str, Any]
    n_clusters: int | None = None
    sweep: list[SweepPoint] = field(default_factory=list)
    missed: Missed | None = None

    @property
    def duplicate_ids(self) -> str:
        """The folder of Parquet files that name the rows to remove: shard, id, and whose copies they are."""
        return files.join(self.folder, DUPLICATES)

    @classmethod
    def read(cls, folder: str, storage_options: Mapping[str, Any] | None = None) -> DedupResult:
        """Read a finished result.

        Raises
        ------
        DatasetError
            If there is none in the folder.
        """
        values = read_json(files.join(folder, RESULT), storage_options)
        if values is None:
            raise DatasetError(f"{folder} holds no finished deduplication (no {RESULT}): run it to its end first")
        values["sweep"] = [SweepPoint(**one) for one in values["sweep"]]
        values["missed"] = None if values["missed"] is None else Missed(**values["missed"])
        return cls(**{**values, "folder": folder})

    def check(self) -> None:
        """Raise if a row is not accounted for.

        Raises
        ------
        DatasetError
            With the account.
        """
        parts = (self.kept, self.removed, self.passed_by, self.without_value, self.bad_value)
        if sum(parts) != self.rows or (self.sweep and self.sweep[0].kept != self.kept):
            raise DatasetError(f"{self.rows} rows, but {self}: please report this")

    def write(self, storage_options: Any) -> None:
        """Write the summary, and last the result itself."""
        rows = [(one.eps, one.kept, one.removed) for one in self.sweep]
        write_summary(self.folder, rows or [("", self.kept, self.removed)], storage_options)
        write_json(files.join(self.folder, RESULT), asdict(self), storage_options)

    def __str__(self) -> str:
        lines = [
            f"{self.tier}: {self.removed:,} of {self.kept + self.removed:,} rows removed "
            f"({self.rows:,} in all: {self.passed_by:,} entered as duplicates, {self.without_value:,} without a value, "
            f"{self.bad_value:,} unusable)"
        ]
        if self.missed is not None:
            lines.append(f"estimate of what was missed: {self.missed}")
        return "\n".join(lines)


def write_summary(folder: str, rows: Sequence[tuple[float | str, int, int]], storage_options: Any) -> None:
    """Write ``dedup_summary.csv``: eps (empty for hashes, which have none), rows kept, removed, and both."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["eps", "kept", "removed", "total"])
    lines.writerows([eps, kept, removed, kept + removed] for eps, kept, removed in rows)
    with files.atomic_writer(files.join(folder, SUMMARY), storage_options) as out:
        out.write(text.getvalue().encode())


class ResultColumns:
    """Looks up what was found of each row: the function behind the columns that a deduplication adds."""

    row_by_row = True
    only_reads = True

    def __init__(self, source: DatasetSource, folder: str, columns: Mapping[str, str], token: str) -> None:
        self.source = source
        self.folder = folder
        self.columns = {name: pa.type_for_alias(kind) for name, kind in columns.items()}
        self.token = token

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the columns for `frame`."""
        parts = {name: [pa.array([], kind)] for name, kind in {**self.columns, "reason": pa.string()}.items()}
        places = [np.zeros(0, np.int64)]
        for shard, rows in rows_by_shard(frame).items():
            url = files.join(self.folder, ROWS, shard + ".parquet")
            if not files.exists(url, self.source.storage_options):
                continue  # none of its rows was judged
            ids = backend.arrow_values(frame[self.source.id_col].iloc[rows])
            found, table = rows_by_id(self.source, shard, url, ids, list(parts))
            places.append(rows[found])
            for name, values in parts.items():
                values.extend(table[name].cast(values[0].type).chunks)
        origin = np.full(len(frame), -1, np.int64)
        known = np.concatenate(places)
        origin[known] = np.arange(len(known))
        take = pa.array(origin, mask=origin < 0)
        made = {name: pa.chunked_array(values).combine_chunks().take(take) for name, values in parts.items()}
        result = pd.DataFrame({name: backend.series_of(values, frame.index) for name, values in made.items()})
        return self._with_before(frame, result)

    def _with_before(self, frame: pd.DataFrame, result: pd.DataFrame) -> pd.DataFrame:
        """Keep what rows that entered as duplicates said, and the reasons that were there."""
        entered = passed_by(frame)
        for name in self.columns:
            if name in frame and entered.any():
                result[name] = frame[name].astype(result[name].dtype).where(entered, result[name])
        reasons = result.pop("reason")
        if schema.IMAGE_ERROR in frame:
            before = frame[schema.IMAGE_ERROR].astype(reasons.dtype)
            reasons = before.where(before.notna(), reasons)
        result[schema.IMAGE_ERROR] = reasons
        return result

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        names = [(name, str(kind)) for name, kind in self.columns.items()]
        return ("ResultColumns", self.source.__dask_tokenize__(), self.folder, names, self.token)


def with_columns(
    dataset: ImageTextPairDataset, result: DedupResult, token: str, parents: Sequence[str]
) -> ImageTextPairDataset:
    """Return the dataset with a result's columns, lazily.

    Parameters
    ----------
    token : str
        Tells the result from others.
    parents : sequence of str
        The columns that it was made from.
    """
    provenance = dataset.provenance
    made_by = {
        "operator": result.settings["operator"],
        "settings": {name: value for name, value in result.settings.items() if name not in ("operator", "dataset")},
        "parents": {name: provenance.get(name) for name in parents},
        "rows": token,
    }
    return add_columns(dataset, ResultColumns(dataset.source, result.folder, result.columns, token), made_by)


def without_own_result(dataset: ImageTextPairDataset, operator: str, asked: str) -> ImageTextPairDataset:
    """Return the dataset without the columns that the very same operator has added and a save has written.

    Run again on what it made itself, an operator finds the same again, instead of passing by what it removed then.
    """
    made_by = dataset.provenance.get(schema.IS_DUPLICATE, {})
    is_own = made_by.get("operator") == operator and made_by.get("settings", {}).get("asked") == asked
    if not is_own or schema.IS_DUPLICATE in dataset.lineage.pending:
        return dataset
    own = [name for name, made in dataset.provenance.items() if made == made_by and name != schema.IMAGE_ERROR]
    fresh = copy.copy(dataset)
    fresh.metadata = dataset.metadata.drop(columns=own)
    return fresh


def add_columns(
    dataset: ImageTextPairDataset, columns: ResultColumns, made_by: Mapping[str, Any]
) -> ImageTextPairDataset:
    """Return the dataset with the columns that a result's files hold, and ``image_error``, lazily."""
    outputs = {name: schema.arrow_dtype(kind) for name, kind in columns.columns.items()}
    fingerprints: dict[str, Mapping[str, Any]] = dict.fromkeys(outputs, made_by)
    # Reasons that were there stay: what made them goes on to be what made the column.
    fingerprints[schema.IMAGE_ERROR] = dataset.provenance.get(schema.IMAGE_ERROR, made_by)
    outputs[schema.IMAGE_ERROR] = schema.arrow_dtype("string")
    there = [name for name in outputs if name in dataset.metadata.columns]
    return dataset.map_columns(columns, inputs=there, outputs=outputs, fingerprints=fingerprints)
