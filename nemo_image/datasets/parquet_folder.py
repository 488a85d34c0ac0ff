"""A folder of Parquet files without tars, such as embeddings, as a dataset for the operators that need no image."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import backend, schema
from nemo_image.datasets.footers import each, in_chunks
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.datasets.opening import Opened, plain_schema
from nemo_image.datasets.shard_pass import in_window
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState
from nemo_image.errors import ArgumentError, DatasetError, MetadataFileError, MissingColumnError
from nemo_image.shards import files, parquet

SUFFIX = ".parquet"

Naming = Literal["id", "file", "row"]
"""What names a row: its id alone; its id and its file, which is its shard; its id and the shard that it says."""

_SEPARATOR = "\0"
_DIGITS = 20  # of the largest unsigned 64-bit integer


@dataclass(frozen=True)
class ParquetFolder:
    """Parquet files as a dataset in which each file is a shard, called by its path below the root without ``.parquet``.

    Attributes
    ----------
    dataset : ImageTextPairDataset
        Its ids are unique in a file. Where `naming` is ``"row"``, an id and its shard are one text in it, because ids
        are unique only in the shards that the rows say.
    naming : {"id", "file", "row"}
        Whether the files have a column ``shard``, and whether each file is the shard of that name.
    rows : int
        Of all files.
    """

    dataset: ImageTextPairDataset
    naming: Naming
    rows: int


def list_parquets(root: files.Url, storage_options: files.StorageOptions = None) -> list[str]:
    """Return the sorted paths of the Parquet files in and below a folder, relative to it; none if there is no folder.

    Files and folders whose names begin with a dot or an underscore are left out: our own records and caches among them.
    """
    fs, path = files.open_fs(root, storage_options)
    start = path.rstrip("/") + "/"
    below = [str(name).removeprefix(start) for name in fs.find(path) if str(name).startswith(start)]
    wanted = [name for name in below if name.endswith(SUFFIX)]
    return sorted(name for name in wanted if not any(part.startswith((".", "_")) for part in name.split("/")))


def open_parquet_folder(
    path: str | Sequence[str],
    id_col: str,
    columns: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> ParquetFolder:
    """Open the Parquet files in and below one or several folders. Every file's footer is read.

    Parameters
    ----------
    path : str or sequence of str
    id_col : str
        The column that names a row.
    columns : sequence of str
        Other columns that each file must have.
    storage_options : dict, optional
        For fsspec.

    Raises
    ------
    DatasetError
        If there is no such folder or no file, or some of the files have a column ``shard`` and others not.
    MissingColumnError
        If a file lacks a column.
    MetadataFileError
        If a file cannot be read.
    """
    options = dict(storage_options or {})
    root, shards = _find([path] if isinstance(path, str) else list(path), options)
    survey = _Survey(root, (id_col, *columns), options)
    found: dict[str, _FileSummary] = {}
    for part in in_chunks(survey, shards, root, options):
        found |= part
    first = next((shard for shard in shards if found[shard].rows), shards[0])
    summary = parquet.read_summary(files.join(root, first + SUFFIX), options)
    own = [field for field in plain_schema(summary.schema) if field.name != schema.SHARD]
    source = DatasetSource(root, root, id_col, pa.schema(own), storage_options=options)
    made_by = {} if summary.footer is None else {name: dict(made) for name, made in summary.footer.columns.items()}
    dataset = ImageTextPairDataset._of(DatasetState.of(Opened(source, shards, made_by)))
    naming = _naming(root, found)
    if naming == "row":
        dataset = dataset.with_user_columns({id_col: _named(dataset)})
    return ParquetFolder(dataset, naming, sum(one.rows for one in found.values()))


# Finding files --------------------------------------------------------------------------------------------------------


def _find(folders: Sequence[str], options: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the root of all folders, and the files below it without their suffix."""
    if not folders or not all(folders):
        raise ArgumentError("the path of the Parquet files is empty: give a folder")
    folders = [folder.rstrip("/") or "/" for folder in folders]
    root = folders[0] if len(folders) == 1 else _common(folders)
    shards = []
    for folder in folders:
        if not files.exists(folder, options):
            raise DatasetError(f"{folder}: no such folder")
        if not files.is_folder(folder, options):
            raise DatasetError(f"{folder} is a file: give the folder of the Parquet files")
        names = list_parquets(folder, options)
        if not names:
            raise DatasetError(f"{folder} holds no Parquet file (names that begin with a dot or '_' do not count)")
        inside = folder.removeprefix(root).strip("/")
        shards += [posixpath.join(inside, name.removesuffix(SUFFIX)) for name in names]
    return root, sorted(dict.fromkeys(shards))


def _common(folders: Sequence[str]) -> str:
    """Return the folder that all of them lie in."""
    protocols = {name.partition("://")[0] if "://" in name else "" for name in folders}
    if len(protocols) > 1:
        raise ArgumentError(f"the folders lie on different storage systems: {', '.join(folders)}")
    protocol = protocols.pop()
    if not protocol:
        return os.path.commonpath([os.path.abspath(name) for name in folders])
    return f"{protocol}://{posixpath.commonpath([name.partition('://')[2] for name in folders])}"


# What the files say ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileSummary:
    """A file's rows, and how they are named; None for a file without rows."""

    rows: int
    naming: Naming | None


@dataclass(frozen=True)
class _Survey:
    """Reads the footers of some files."""

    root: str
    columns: tuple[str, ...]
    storage_options: Mapping[str, Any]
    task_name = "nemo-image-parquet-folder"

    def __call__(self, shards: Sequence[str]) -> dict[str, _FileSummary]:
        return dict(zip(shards, each(self._file, shards, self.root, self.storage_options), strict=True))

    def _file(self, shard: str) -> _FileSummary:
        url = files.join(self.root, shard + SUFFIX)
        file = parquet.open_parquet(url, self.storage_options)
        try:
            with parquet.reading(url):
                names, rows = file.schema_arrow.names, file.metadata.num_rows
                said = _shards_by_statistics(file) if schema.SHARD in names else None
        finally:
            file.close(force=True)
        missing = [name for name in self.columns if name not in names]
        if missing:
            raise MissingColumnError(f"{url} has no column {missing[0]!r}; it has {', '.join(names)}")
        if schema.SHARD not in names or not rows:
            return _FileSummary(rows, None if not rows else "id")
        if said is None:
            column = parquet.read_table(url, [schema.SHARD], self.storage_options)[schema.SHARD]
            said = set(pc.unique(column.cast(schema.plain_type(column.type))).to_pylist())
        return _FileSummary(rows, "file" if said == {shard} else "row")


def _shards_by_statistics(file: Any) -> set[str] | None:
    """Return the smallest and the largest shard of a file's row groups; None where they do not say."""
    said: set[str] = set()
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        one = next(chunk for chunk in chunks if chunk.path_in_schema == schema.SHARD).statistics
        if one is None or not one.has_min_max or one.null_count is None or one.null_count:
            return None
        said |= {one.min, one.max}
    return said


def _naming(root: str, found: Mapping[str, _FileSummary]) -> Naming:
    kinds: dict[Naming, str] = {}
    for shard, one in found.items():
        if one.naming is not None:
            kinds.setdefault(one.naming, shard)
    if "id" in kinds and len(kinds) > 1:
        other = next(shard for naming, shard in kinds.items() if naming != "id")
        raise DatasetError(
            f"{root}: {other}{SUFFIX} has a column {schema.SHARD!r} and {kinds['id']}{SUFFIX} has none: the files must "
            "be of one kind, because ids are unique only within their shard"
        )
    return "row" if "row" in kinds else next(iter(kinds), "id")


# Rows that are named by their shard and id ----------------------------------------------------------------------------


class RowNames:
    """Makes one text of each row's id and the shard that it says: the id first, so that ties go by it.

    Parameters
    ----------
    source : DatasetSource
        The files, each of which has a column ``shard``.
    """

    row_by_row = True

    def __init__(self, source: DatasetSource) -> None:
        self.source = source

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the names of a partition's rows, which are as they lie in the file."""
        name = self.source.id_col
        if not len(frame):
            return schema.empty_frame([(name, schema.arrow_dtype("string"))]).set_index(frame.index)
        names = self.names(str(frame[schema.SHARD].iloc[0]), backend.arrow_values(frame[name]), int(frame.index[0]))
        return pd.DataFrame({name: backend.series_of(names, frame.index)})

    def names(self, file: str, ids: pa.Array, first: int = 0) -> pa.Array:
        """Return the names of a file's rows from `first` on, of which `ids` are the ids.

        Raises
        ------
        MetadataFileError
            If a row has no id or says no shard.
        """
        url = self.source.parquet_url(file)
        under_way = in_window(self.source, file)
        if under_way is None:
            table = parquet.read_table(url, [schema.SHARD], self.source.storage_options).slice(first, len(ids))
        else:
            table = under_way.rows(url, [schema.SHARD]).read(first, first + len(ids))
        column = table[schema.SHARD]
        shards = column.cast(schema.plain_type(column.type)).cast(pa.string())
        for what, values in (("id", ids), ("shard", shards)):
            if values.null_count:
                raise MetadataFileError(
                    f"{url}: {values.null_count} rows have no {what}, so that nobody could name them"
                )
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.combine_chunks()
        return pc.binary_join_element_wise(_as_text(ids), shards.combine_chunks(), _SEPARATOR)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("RowNames", self.source.__dask_tokenize__())


def split_names(names: Any, id_type: pa.DataType) -> tuple[Any, Any]:
    """Return the ids and the shards of names that :class:`RowNames` made.

    Parameters
    ----------
    names : pyarrow array of string
        Null stays null.
    id_type : pyarrow.DataType
        The ids' own type.
    """
    parts = pc.split_pattern(names, _SEPARATOR, max_splits=1, reverse=True)
    texts, shards = pc.list_element(parts, 0), pc.list_element(parts, 1)
    if not pa.types.is_integer(id_type):
        return texts.cast(id_type), shards
    # Back over the sign's offset; wrapping is meant.
    numbers = pc.add(texts.cast(pa.uint64()), pa.scalar(2**63, pa.uint64()))
    if isinstance(numbers, pa.ChunkedArray):
        numbers = numbers.combine_chunks()
    return numbers.view(pa.int64()).cast(id_type), shards


def _named(dataset: ImageTextPairDataset) -> Any:
    """Return the column of names, lazily."""
    id_col = dataset.id_col
    meta = schema.empty_frame([(id_col, schema.arrow_dtype("string"))])
    rows = backend.in_pandas(dataset.metadata[[schema.SHARD, id_col]])
    made = rows.map_partitions(RowNames(dataset.source), meta=meta)
    return backend.in_kind_of(made, dataset.metadata)[id_col]


def _as_text(ids: pa.Array) -> pa.Array:
    """Return ids as texts in the same order: integers as 20 digits."""
    if not pa.types.is_integer(ids.type):
        return ids.cast(pa.string())
    raised = pc.add(ids.cast(pa.int64()).view(pa.uint64()), pa.scalar(2**63, pa.uint64()))
    return pc.utf8_lpad(raised.cast(pa.string()), _DIGITS, "0")
