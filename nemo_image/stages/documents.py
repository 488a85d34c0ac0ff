"""Tables of images: made of batches, and written as Parquet."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.parquet_folder import list_parquets
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, MissingColumnError
from nemo_image.shards import files, parquet
from nemo_image.stages.base import Fields, ProcessingStage, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import DocumentBatch, FileGroup, ImageBatch
from nemo_image.stages.writing.arrow_columns import arrow_column, encodable
from nemo_image.stages.writing.table_file import write_tables

logger = logging.getLogger("nemo_image")

EMBEDDING = "embedding"
ATTRIBUTES: dict[str, pa.DataType] = {
    "image_id": pa.string(),
    schema.KEY: pa.string(),
    "image_path": pa.string(),
    schema.SHARD: pa.string(),
    schema.CAPTION: pa.string(),
    schema.WIDTH: pa.int32(),
    schema.HEIGHT: pa.int32(),
    schema.AESTHETIC_SCORE: pa.float32(),
    schema.NSFW_SCORE: pa.float32(),
    schema.IMAGE_ERROR: pa.string(),
    EMBEDDING: pa.list_(pa.float32()),
}
"""What a table can say of an image besides its metadata, and the columns' types."""

GIVEN_BY_STAGES = (EMBEDDING, schema.AESTHETIC_SCORE, schema.NSFW_SCORE)

MADE_AS = {EMBEDDING: schema.IMAGE_EMBEDDING}
"""The names by which stages know the columns that are called otherwise here."""

PLAN = "parquet_writer.json"
WRITER = "ParquetWriter"


@dataclass
class ConvertImageBatchToDocumentBatchStage(ProcessingStage[ImageBatch, DocumentBatch]):
    """Makes a table of each batch: one row an image, and a column for each field.

    Parameters
    ----------
    fields : list of str
        Attributes of :class:`~nemo_image.stages.tasks.ImageObject` (``image_id``, ``embedding``, ``aesthetic_score``;
        ``key`` is the ``image_id``), or fields of the images' metadata; ``["image_id"]`` by default. The column
        ``shard`` is always there, because an id is unique only within its shard. What an image does not have is null.
    """

    fields: list[str] = field(default_factory=list)
    name: str = "convert_image_batch_to_document_batch"

    thread_safe = True

    def __post_init__(self) -> None:
        given: Any = self.fields
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            raise ArgumentError(f"fields must be a list of names, not {self.fields!r}")

    def inputs(self) -> Fields:
        """Return what the stage needs: those fields that only a stage gives."""
        return ["data"], [name for name in self.fields if name in GIVEN_BY_STAGES]

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], self._names()

    def process(self, task: ImageBatch) -> DocumentBatch:
        """Return a batch as a table.

        Raises
        ------
        MissingColumnError
            If a field is no attribute, and none of the batch's images has it in its metadata.
        """
        return self._table(task, set())

    def stream(self, tasks: Iterator[ImageBatch], group: FileGroup) -> Iterator[DocumentBatch]:
        """Yield each batch as a table; a field that a batch before had may be absent from a later one."""
        seen: set[str] = set()
        for task in tasks:
            yield self._table(task, seen)

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*(self.fields or ["image_id"]), schema.SHARD]))

    def _table(self, task: ImageBatch, seen: set[str]) -> DocumentBatch:
        index = pd.RangeIndex(len(task.data))
        columns = {name: _column(name, task, seen, index) for name in self._names()}
        frame = pd.DataFrame(columns, index=index)
        return DocumentBatch(frame, task.task_id, task.dataset_name, task.metadata)


def _column(name: str, task: ImageBatch, seen: set[str], index: pd.Index) -> pd.Series:
    """Return one column; `seen` are the fields of the metadata that batches before had."""
    if name == EMBEDDING:
        return _embeddings(task.data, index)
    if name in ATTRIBUTES:
        values = [encodable(_attribute(image, name)) for image in task.data]
        return backend.series_of(pa.array(values, ATTRIBUTES[name]), index)
    if name in task.fields.names or any(name in image.metadata for image in task.data):
        seen.add(name)
    if name not in seen and task.data:
        there = sorted({*task.fields.names}.union(*(image.metadata for image in task.data)) - {*ATTRIBUTES})
        raise MissingColumnError(
            f"field {name!r}: no image of {task.task_id or 'the batch'} has it; there are {', '.join(ATTRIBUTES)}"
            + (f", and of the metadata {', '.join(there)}" if there else ", and no metadata")
            + " (a stage of yours that gives it to some images must set it to None for the others)"
        )
    declared = [task.fields.field(name).type] if name in task.fields.names else []
    values = [image.metadata.get(name) for image in task.data]
    return backend.series_of(arrow_column(values, declared), index)


def _attribute(image: ImageObject, name: str) -> Any:
    if name in (schema.WIDTH, schema.HEIGHT):
        size = image.stored_size()
        return None if size is None else size[name == schema.HEIGHT]
    return image.image_id if name == schema.KEY else getattr(image, name)


def _embeddings(images: Sequence[ImageObject], index: pd.Index) -> pd.Series:
    vectors = [None if one.embedding is None else np.asarray(one.embedding, np.float32).ravel() for one in images]
    rows = np.flatnonzero([one is not None for one in vectors]).astype(np.int64)
    there = [one for one in vectors if one is not None]
    sizes = {len(one) for one in there}
    if len(sizes) > 1:
        raise EmbeddingError(f"embeddings of {min(sizes)} and of {max(sizes)} numbers in one batch: use one model")
    matrix: npt.NDArray[np.float32] = np.stack(there) if there else np.zeros((0, 0), np.float32)
    return backend.to_column(matrix, index, rows)


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass
class ParquetWriter(ProcessingStage[DocumentBatch, FileGroup]):
    """Writes tables as Parquet: ``<path>/<shard>.parquet`` for each source shard.

    A file appears under its name when it is whole, so that a run that is interrupted and repeated ends with the same
    files. Tables without a column ``shard`` go to one file a file group. The files' footers say what made the columns.
    At the end, files of groups that are no longer part of the input are removed.

    Parameters
    ----------
    path : str
        A folder that holds no other Parquet files.
    storage_options : dict, optional
        For fsspec.
    replace : bool, default False
        Replace what another pipeline wrote there with this stage.
    """

    path: str
    storage_options: dict[str, Any] | None = None
    replace: bool = False
    name: str = "parquet_writer"
    _token: str = field(default="", init=False, repr=False)
    _made_by: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, init=False, repr=False)
    _is_last: bool = field(default=True, init=False, repr=False)

    thread_safe = True

    def __post_init__(self) -> None:
        if not os.fspath(self.path):
            raise ArgumentError("path is empty: give the folder to write to")
        self.path = files.folder(self.path)

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], []

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], []

    def output_folder(self) -> str:
        """Return the folder that the stage writes to."""
        return self.path

    def prepare(self, context: RunContext) -> ParquetWriter:
        """Make the folder the pipeline's.

        Raises
        ------
        DatasetError
            If it holds other Parquet files, or another pipeline's without `replace`.
        """
        prepared = copy.copy(self)
        prepared._token = context.token
        plan = {"writer": WRITER, "token": context.token}
        url = files.join(self.path, FOLDER, PLAN)
        before = _read_json(url, self.storage_options)
        if before == plan:
            return prepared
        if before is None:
            if files.exists(self.path, self.storage_options) and not files.is_folder(self.path, self.storage_options):
                raise DatasetError(f"{self.path} is a file: give a folder")
            there = list_parquets(self.path, self.storage_options)
            if there:
                raise DatasetError(f"{self.path} holds other Parquet files ({there[0]}, …): give an empty folder")
        elif not self.replace:
            raise DatasetError(
                f"{self.path} holds what another pipeline wrote (other stages, arguments or weights): replace=True "
                "replaces it, or give an empty folder"
            )
        with files.atomic_writer(url, self.storage_options) as out:
            out.write(json.dumps(plan, indent=1).encode() + b"\n")
        return prepared

    def connect(self, earlier: Sequence[ProcessingStage[Any, Any]], later: Sequence[ProcessingStage[Any, Any]]) -> None:
        """Find out what makes the columns."""
        self._made_by = {name: made for stage in earlier for name, made in stage.column_fingerprints().items()}
        self._is_last = not later

    def process(self, task: DocumentBatch) -> FileGroup:
        """Write one table alone: its rows are all of their shards."""
        group = FileGroup(name=task.task_id.replace("/", "-") or "table", dataset_name=task.dataset_name)
        return next(self.stream(iter([task]), group))

    def stream(self, tasks: Iterator[DocumentBatch], group: FileGroup) -> Iterator[FileGroup]:
        """Write the tables of a file group; yield the group of the files written.

        Raises
        ------
        DatasetError
            If a shard's rows do not come one after the other, or a column's values have no common type.
        """
        pieces = (piece for task in tasks for piece in _by_shard(task, group))
        written: list[str] = []
        rows = 0
        for shard, some in groupby(pieces, key=lambda piece: piece[0]):
            url = files.join(self.path, shard + ".parquet")
            if url in written:
                raise DatasetError(
                    f"rows of shard {shard!r} come after those of another: the stages before must keep images in "
                    "the order in which they come"
                )
            rows += write_tables(url, (table for _, table in some), self._footer(group), self.storage_options)
            written.append(url)
        self.log_metric("rows", rows)
        yield FileGroup(
            data=written,
            task_id=group.task_id or group.name,
            dataset_name=group.dataset_name,
            metadata={"rows": rows},
            name=group.name,
            index=group.index,
            root=self.path,
            storage_options=dict(self.storage_options or {}),
        )

    def _footer(self, group: FileGroup) -> Any:
        """Return what makes the footer of a file of some columns and rows."""

        def footer(columns: Sequence[str], rows: int) -> parquet.Footer:
            made_by = {name: self._made_by.get(MADE_AS.get(name, name)) for name in columns}
            return parquet.Footer(
                columns={name: made for name, made in made_by.items() if made is not None},
                plan=self._token,
                record={"writer": WRITER, "group": group.name, "rows": rows},
            )

        return footer

    def outputs_intact(self, outputs: Sequence[Any]) -> bool:
        """Tell whether the files of an earlier run are still there, and whole."""
        urls = [url for output in outputs for url in output.data]
        return all(parquet.summary_or_none(url, self.storage_options) is not None for url in urls)

    def finish(self, context: RunContext, finished: Sequence[GroupRecord]) -> dict[str, Any]:
        """Remove files of this stage that are no part of what the pipeline gives now."""
        written = {url for record in finished for output in record.outputs for url in output.data}
        done = {record.name for record in finished}
        there = {group.name for group in context.groups}
        removed = 0
        for name in list_parquets(self.path, self.storage_options):
            url = files.join(self.path, name)
            if self._is_last and url in written:
                continue
            summary = parquet.summary_or_none(url, self.storage_options)
            footer = None if summary is None else summary.footer
            if footer is None or footer.record.get("writer") != WRITER:
                continue
            group = footer.record.get("group")
            is_current = footer.plan == self._token and group in there
            if not is_current or (self._is_last and group in done):
                fs, path = files.open_fs(url, self.storage_options)
                fs.rm_file(path)
                removed += 1
        return {"leftovers removed": removed} if removed else {}


def _by_shard(task: DocumentBatch, group: FileGroup) -> Iterator[tuple[str, pa.Table]]:
    """Yield the rows of each shard, in their order; those of a table without shards under the group's name."""
    frame = task.data
    if not len(frame):
        return
    kinds = pa.schema([(name, backend.arrow_type_of(frame[name])) for name in frame.columns])
    table = backend.frame_to_table(frame, kinds)
    if schema.SHARD not in table.column_names:
        yield group.name, table
        return
    shards = table[schema.SHARD].to_pylist()
    if None in shards:
        raise DatasetError(f"{task.task_id or group.name}: a row says no shard: column 'shard' must not be null")
    start = 0
    for shard, rows in groupby(shards):
        count = len(list(rows))
        yield str(shard), table.slice(start, count)
        start += count


def _read_json(url: str, storage_options: Mapping[str, Any] | None) -> Any:
    try:
        return json.loads(files.read_bytes(url, storage_options))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
