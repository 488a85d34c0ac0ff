"""A folder of embeddings as clip-retrieval lays it out, and the tasks that read one.

``clip-inference`` of `clip-retrieval <https://github.com/rom1504/clip-retrieval>`_ writes ``img_emb/img_emb_<i>.npy``
(and ``text_emb/text_emb_<i>.npy``) with one embedding a row, and the same rows' ids, captions and JSON fields as
``metadata/metadata_<i>.parquet``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets.npy_file import read_header, read_rows
from nemo_image.errors import DatasetError, EmbeddingError, IdMismatchError, MissingColumnError
from nemo_image.shards import files, parquet
from nemo_image.shards.keys import plain_ids

IMAGE, TEXT, METADATA = "img_emb", "text_emb", "metadata"
SUFFIXES = {IMAGE: ".npy", TEXT: ".npy", METADATA: ".parquet"}
IMAGE_PATH = "image_path"
"""The column of a folder's metadata that says which image a row is of: for tars, the sample's key."""
NAMED_AT_MOST = 3

_STRING = schema.arrow_dtype("string")
_PLACE = [("file", _STRING), ("row", "int64")]
_IDENTITY = [("key", _STRING), ("shard", _STRING)]
ROWS = schema.empty_frame([*_IDENTITY, ("part", "int64")])
PLACES = schema.empty_frame([*_IDENTITY, *_PLACE])
LOCATED = schema.empty_frame([*_IDENTITY, ("part", "int64"), *_PLACE])


@dataclass(frozen=True)
class Kind:
    """One kind of embeddings: its subfolder, the column it becomes, numbers an embedding, type in the files."""

    name: str
    column: str
    size: int
    dtype: str

    @property
    def column_dtype(self) -> str:
        """The numbers' type in the column."""
        return "float16" if self.dtype == "float16" else "float32"


@dataclass(frozen=True)
class ClipFolder:
    """A folder that clip-retrieval wrote; its methods are the tasks of reading it.

    Attributes
    ----------
    first : str
        The ``<i>`` of its first file, as it is written.
    dataset_id, id_col : str
        The columns of ids in the dataset and in the folder's metadata.
    numeric : bool
        Whether a text that is a number is the same id with and without leading zeros.
    says_shards : bool
        Whether its metadata tells the dataset's shards.
    token : str
        Changes when a file does, so that saving again does not take old results for new ones.
    """

    root: str
    first: str
    kinds: Sequence[Kind]
    dataset_id: str
    id_col: str
    numeric: bool
    says_shards: bool
    token: str
    storage_options: Mapping[str, Any]

    def rows(self, ids: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
        """Return the ids of a partition of the dataset, with its number."""
        frame = self._keyed(ids, self.dataset_id).assign(part=int(part["part"].iloc[0]))
        return frame.dropna(subset=["key"]).drop_duplicates()

    def places(self, number: str) -> pd.DataFrame:
        """Return the ids of a metadata file with their file and row, after checking the embeddings against it."""
        url = file_url(self.root, METADATA, number)
        names = [self.id_col, *([schema.SHARD] if self.says_shards else [])]
        table = parquet.read_table(url, names, self.storage_options)
        for kind in self.kinds:
            embeddings = file_url(self.root, kind.name, number)
            found = read_header(embeddings, self.storage_options)
            if found.rows != len(table):
                raise EmbeddingError(f"{embeddings} has {found.rows} rows, {url} has {len(table)}: they must be equal")
            if (found.size, found.dtype) != (kind.size, kind.dtype):
                raise EmbeddingError(
                    f"{embeddings} holds {found.size} numbers a row as {found.dtype}, "
                    f"{kind.name}_{self.first}.npy {kind.size} as {kind.dtype}: they must be of one model"
                )
        index = pd.RangeIndex(len(table))
        ids = pd.DataFrame({name: backend.series_of(table[name].combine_chunks(), index) for name in names})
        return self._keyed(ids, self.id_col).assign(file=number, row=index).astype(PLACES.dtypes).dropna(subset=["key"])

    def located(self, rows: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
        """Return the places of the dataset's ids; both frames hold every occurrence of the same ids."""
        rows = rows[rows["key"].isin(places["key"])]
        shards = rows[["key", "shard"]].drop_duplicates()
        several = pd.concat([one["key"][one["key"].duplicated()] for one in (places, shards)])
        rows, places = (one.assign(shard_of=one["shard"].where(one["key"].isin(several), "")) for one in (rows, places))
        unclear = places["key"][places.duplicated(["key", "shard_of"])] if self.says_shards else several
        if len(unclear):
            self._refuse(unclear, rows, places)
        return rows.merge(places.drop(columns="shard"), on=["key", "shard_of"])[list(LOCATED)]

    def embeddings(self, ids: pd.DataFrame, located: pd.DataFrame, matched: int) -> pd.DataFrame:
        """Return the embeddings of a partition's rows, on its index."""
        if len(ids) and not matched:
            raise DatasetError(
                f"{self.root}: no {self.id_col!r} of its metadata is a {self.dataset_id!r} of the dataset: name the "
                "column with the ids (id_col)"
            )
        wanted = self._keyed(ids, self.dataset_id).assign(at=np.arange(len(ids)))
        found = wanted.merge(located, on=["key", "shard"])  # keeps the order of `wanted`
        rows, at = found["row"].to_numpy(np.int64), found["at"].to_numpy(np.int64)
        columns = {}
        for kind in self.kinds:
            matrix = np.empty((len(found), kind.size), kind.column_dtype)
            for number, positions in found.groupby("file").indices.items():
                url = file_url(self.root, kind.name, str(number))
                matrix[positions] = read_rows(url, rows[positions], self.storage_options)
            columns[kind.column] = backend.to_column(matrix, ids.index, at, matrix.dtype)
        return pd.DataFrame(columns, index=ids.index)

    def _keyed(self, frame: pd.DataFrame, id_col: str) -> pd.DataFrame:
        """Return ids as texts that are equal where they mean the same, and shards (null where none is said)."""
        ids = backend.arrow_values(frame[id_col])
        if pa.types.is_string(schema.plain_type(ids.type)):
            ids = ids.cast(pa.string())
        else:
            ids = pa.array([None if one is None else str(one) for one in plain_ids(frame[id_col])], pa.string())
        if self.numeric:
            ids = pc.replace_substring_regex(ids, r"^(-?)0*([0-9]{1,20})$", r"\1\2")
        shards = frame[schema.SHARD].astype(_STRING) if schema.SHARD in frame else None
        key = pd.Series(pd.arrays.ArrowExtensionArray(ids), index=frame.index)
        return pd.DataFrame({"key": key, "shard": pd.Series(shards, index=frame.index, dtype=_STRING)})

    def _refuse(self, unclear: pd.Series, rows: pd.DataFrame, places: pd.DataFrame) -> None:
        first = unclear.min()
        found = places[places["key"] == first].sort_values(["file", "row"]).head(NAMED_AT_MOST)
        there = [f"metadata_{file}.parquet row {row}" for file, row in zip(found["file"], found["row"], strict=True)]
        shards = sorted(rows["shard"][rows["key"] == first].unique())[:NAMED_AT_MOST]
        raise IdMismatchError(
            f"{self.root}: ids may mean several rows, for example {first!r}, which is in {' and '.join(there)}, and in "
            f"the dataset in {' and '.join(shards) or 'no shard'}: choose ids (id_col) of which each stands once, or "
            "load fewer shards"
        )


def open_folder(
    root: str, columns: Mapping[str, str], id_col: str, dataset_id: str, dataset_meta: Any, options: Mapping[str, Any]
) -> tuple[ClipFolder, list[str]]:
    """List a folder, and read its first header and footer.

    Parameters
    ----------
    root : str
    columns : dict of str to str
        The column that each kind of embeddings becomes.
    id_col, dataset_id : str
        The columns of ids in the folder and in the dataset.
    dataset_meta : DataFrame
        Tells the type of the dataset's ids.
    options : dict
        Of fsspec.

    Returns
    -------
    folder : ClipFolder
    numbers : list of str
        The ``<i>`` of its files, as they are written, sorted.
    """
    found = {kind: _list_numbers(root, kind, options) for kind in (*columns, METADATA)}
    for kind in columns:
        _require_partners(root, kind, set(found[kind]), set(found[METADATA]))
    numbers = sorted(found[METADATA])
    url = file_url(root, METADATA, numbers[0])
    summary = parquet.read_summary(url, options)
    if id_col not in summary.schema.names:
        raise MissingColumnError(f"{url} has no column {id_col!r} (id_col); it has {', '.join(summary.schema.names)}")
    headers = {kind: read_header(file_url(root, kind, numbers[0]), options) for kind in columns}
    types = [backend.arrow_type_of(dataset_meta[dataset_id]), schema.plain_type(summary.schema.field(id_col).type)]
    folder = ClipFolder(
        root=root,
        first=numbers[0],
        kinds=[Kind(kind, name, headers[kind].size, headers[kind].dtype) for kind, name in columns.items()],
        dataset_id=dataset_id,
        id_col=id_col,
        numeric=not all(pa.types.is_string(one) for one in types),
        says_shards=summary.footer is not None and schema.SHARD in summary.schema.names,
        token=tokenize(found),
        storage_options=dict(options),
    )
    return folder, numbers


def _require_partners(root: str, kind: str, embeddings: set[str], metadata: set[str]) -> None:
    alone = sorted(embeddings ^ metadata)
    if alone:
        there, missing = (kind, METADATA) if alone[0] in embeddings else (METADATA, kind)
        raise DatasetError(
            f"{root} has {there}_{alone[0]}{SUFFIXES[there]} but no {missing}_{alone[0]}{SUFFIXES[missing]} "
            f"({len(alone)} files lack their partner): bring the missing files, or move these away"
        )


def file_url(root: str, kind: str, number: str) -> str:
    """Return the URL of a folder's file."""
    return files.join(root, kind, f"{kind}_{number}{SUFFIXES[kind]}")


def _list_numbers(root: str, kind: str, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the ``<i>`` of a subfolder's files, each with what tells its versions apart."""
    folder = files.join(root, kind)
    try:
        names = files.list_files(folder, SUFFIXES[kind], options)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(f"{folder}: no such folder: give a folder that clip-inference wrote") from error
    fs, path = files.open_fs(folder, options)
    found = {}
    for name in names:
        match = re.fullmatch(rf"{kind}_([0-9]+)\{SUFFIXES[kind]}", name)
        if match is None:
            raise DatasetError(f"{folder}/{name} is not named {kind}_<number>{SUFFIXES[kind]}: move it away")
        info = fs.info(f"{path}/{name}")
        found[match[1]] = [str(info.get(what)) for what in ("size", "mtime", "created", "LastModified", "ETag")]
    if not found:
        raise DatasetError(
            f"{folder} holds no {kind}_<number>{SUFFIXES[kind]}: give a folder that clip-inference wrote"
        )
    return found
