"""Earlier results whose kept rows stay kept: new rows are checked against them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets import opening
from nemo_image.datasets.partitions import ShardTasks, shard_tasks
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState
from nemo_image.dedup.exchange.scatter import ROWS
from nemo_image.dedup.exchange.work import Work
from nemo_image.dedup.result import DedupResult
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, MissingColumnError
from nemo_image.shards import files, parquet


@dataclass(frozen=True)
class Generation:
    """One earlier result, and the dataset that it was made of.

    Attributes
    ----------
    folder : str
        Of the result.
    state : DatasetState
        The dataset as it lies on disk.
    id_column : str
    rows : dict of str to int
        Rows judged, by shard.
    prefix : str
        Set before its shards' names, so that they are not taken for shards of the dataset at hand.
    """

    folder: str
    state: DatasetState
    id_column: str
    rows: dict[str, int]
    prefix: str

    @property
    def source(self) -> DatasetSource:
        """Where the dataset's files lie."""
        return self.state.source

    def tasks(self, columns: Sequence[str]) -> ShardTasks:
        """Return one task a shard."""
        names = list(dict.fromkeys([schema.SHARD, self.source.id_col, *columns]))
        tasks = shard_tasks(self.state.frame[names])
        assert tasks is not None
        return tasks


def describe(work: Work) -> dict[str, Any]:
    """Return where a dataset lies, for a later result to find it again."""
    source = work.source
    return {
        "tar_root": files.absolute(source.tar_root),
        "metadata_root": files.absolute(source.metadata_root),
        "id_col": source.id_col,
        "sidecars": [files.absolute(folder) for folder in source.sidecars],
        "shards": work.tasks([]).shards,
    }


def generations(against: Any, work: Work, embedding_column: str, id_column: str) -> list[Generation]:
    """Return an earlier result and those that it was checked against itself, the oldest first.

    Parameters
    ----------
    against : str or path
        The earlier result's folder.

    Raises
    ------
    ArgumentError
        If `against` is no finished semantic result, or its rows are among those to judge.
    EmbeddingError
        If its embeddings are another model's.
    """
    options = work.source.storage_options
    found: list[Generation] = []
    folder = against
    while folder is not None:
        if not isinstance(folder, str | os.PathLike):
            raise ArgumentError(f"against must be the folder of an earlier result, or a DedupResult, not {folder!r}")
        result = _read(files.folder(folder), options)
        made_by = work.dataset.provenance.get(embedding_column)
        if result.settings["embedding"] is not None and made_by is not None and result.settings["embedding"] != made_by:
            raise EmbeddingError(
                f"against: the embeddings of {folder} were made by {result.settings['embedding'].get('model')!r} with "
                f"other settings than those of column {embedding_column!r} ({made_by.get('model')!r}): they cannot be "
                "compared"
            )
        found.append(_generation(result, work, embedding_column, id_column))
        folder = result.settings["against"]
    return found[::-1]


def _read(folder: str, options: Any) -> DedupResult:
    try:
        result = DedupResult.read(folder, options)
    except DatasetError as error:
        raise ArgumentError(f"against: {error}") from error
    if result.tier != "semantic":
        raise ArgumentError(f"against: {folder} is the result of {result.tier} deduplication, which knows no clusters")
    return result


def _generation(result: DedupResult, work: Work, embedding_column: str, id_column: str) -> Generation:
    where = result.settings["dataset"]
    tar_root = where["tar_root"]
    same_root = tar_root == files.absolute(work.source.tar_root)
    doubled = sorted(set(where["shards"]) & set(work.tasks([]).shards)) if same_root else []
    if doubled:
        raise ArgumentError(
            f"against: {len(doubled)} shards of this dataset were judged in {result.folder} already ({doubled[0]}, …): "
            "give the new shards only"
        )
    source = DatasetSource(
        tar_root=tar_root,
        metadata_root=where["metadata_root"],
        id_col=where["id_col"],
        schema=pa.schema([]),
        sidecars=dict.fromkeys(where["sidecars"], ()),
        storage_options=work.source.storage_options,
    )
    options = source.storage_options
    judged = {}
    for shard in where["shards"]:
        url = files.join(result.folder, ROWS, shard + ".parquet")
        if files.exists(url, options):
            judged[shard] = parquet.read_summary(url, options).rows
    state = DatasetState.of(opening.reopen(source, list(judged), None))
    earlier_id = result.settings["id_column"]
    try:
        state.require_columns([embedding_column, earlier_id])
    except MissingColumnError as error:
        raise ArgumentError(
            f"against: {where['metadata_root']}, where the rows of {result.folder} lay, cannot be used: {error}"
        ) from error
    old, new = (frame.dtypes[name] for frame, name in ((state.frame, earlier_id), (work.dataset.metadata, id_column)))
    if old != new:
        raise ArgumentError(
            f"against: ids are {old} in {result.folder} ({earlier_id!r}), and {new} here ({id_column!r})"
        )
    return Generation(result.folder, state, earlier_id, judged, "" if same_root else tar_root.rstrip("/") + "/")
