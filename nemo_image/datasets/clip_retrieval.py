"""Read clip-retrieval's folders of embeddings.

``clip-inference`` of `clip-retrieval <https://github.com/rom1504/clip-retrieval>`_ writes ``img_emb/img_emb_<i>.npy``
(and ``text_emb/text_emb_<i>.npy``) with one embedding a row, and the same rows' ids, captions and JSON fields as
``metadata/metadata_<i>.parquet``. Its files are not the dataset's shards: rows find each other by id.
"""

from __future__ import annotations

import copy
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize
from fsspec.implementations.local import LocalFileSystem

from nemo_image import backend, schema
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, IdMismatchError, MissingColumnError
from nemo_image.shards import files, parquet
from nemo_image.shards.keys import plain_ids

IMAGE, TEXT, METADATA = "img_emb", "text_emb", "metadata"
SUFFIXES = {IMAGE: ".npy", TEXT: ".npy", METADATA: ".parquet"}
IMAGE_PATH = "image_path"

_STRING = schema.arrow_dtype("string")
_ROWS = schema.empty_frame([("key", _STRING), ("shard", _STRING), ("part", "int64")])
_PLACES = schema.empty_frame([("key", _STRING), ("shard", _STRING), ("file", _STRING), ("row", "int64")])
_LOCATED = schema.empty_frame([*_ROWS.dtypes.items(), ("file", _STRING), ("row", "int64")])


def read_clip_retrieval(
    dataset: ImageTextPairDataset,
    path: str | os.PathLike[str],
    id_col: str = IMAGE_PATH,
    image_embedding_column: str = schema.IMAGE_EMBEDDING,
    text_embedding_column: str | None = None,
) -> ImageTextPairDataset:
    """Add the embeddings of a folder that clip-retrieval wrote, lazily, each to the row whose id it has.

    At once, names are listed, and one header and one footer read. On computing, ids meet their places in the folder
    through a shuffle that moves nothing else; rows keep their partitions and order.

    Parameters
    ----------
    dataset : ImageTextPairDataset
    path : str or path
        The folder with ``img_emb``, ``metadata`` and perhaps ``text_emb``, on any file system that fsspec knows.
    id_col : str, default "image_path"
        The column of the folder's metadata that holds the dataset's ids. clip-inference puts the keys of a
        WebDataset's samples into ``image_path``. Integers match texts that are zero-padded numbers.
    image_embedding_column, text_embedding_column : str
        The columns to add, or to replace; without the second, ``text_emb`` is not read. Lists of float16 where the
        files hold float16, else of float32; null in rows whose id the folder lacks.

    Returns
    -------
    ImageTextPairDataset
        The same rows with the columns added.

    Raises
    ------
    ArgumentError
        If a column to add is the id, the shard, or named twice.
    DatasetError
        If there is no such folder, or a file lacks its partner; on computing, if the folder has none of the ids.
    MissingColumnError
        If its metadata has no column `id_col`.
    EmbeddingError
        If a file is cut short, holds no floats (pickled objects are never loaded), has another number of rows than
        its metadata, or another size or type than the first file.
    IdMismatchError
        On computing, if an id stands more than once in the folder or in several shards of the dataset. Only a folder
        that :func:`write_clip_retrieval` wrote says which shard it means.
    """
    columns = {IMAGE: image_embedding_column} | ({TEXT: text_embedding_column} if text_embedding_column else {})
    wrong = {dataset.id_col, schema.SHARD} & set(columns.values())
    if wrong or len(set(columns.values())) < len(columns):
        raise ArgumentError(f"{sorted(columns.values())} cannot be the columns to add: name others, each once")
    folder = _open_folder(dataset, os.fspath(path).rstrip("/"), id_col, columns)
    result = copy.copy(dataset)
    result.metadata = _assign(dataset.metadata, _lazy_embeddings(folder, dataset))
    return result


def _lazy_embeddings(folder: ClipFolder, dataset: ImageTextPairDataset) -> Any:
    """Return the embeddings as a Dask frame whose partitions and index are those of the dataset's metadata."""
    import dask.dataframe as dd

    ids = dataset.metadata[[schema.SHARD, dataset.id_col]]
    parts = dd.from_map(_one_number, range(ids.npartitions), meta=schema.empty_frame([("part", "int64")]))
    rows = ids.map_partitions(folder.rows, parts, meta=_ROWS).shuffle("key", npartitions=len(folder.numbers))
    places = dd.from_map(folder.places, folder.numbers, meta=_PLACES).shuffle("key", npartitions=len(folder.numbers))
    located = rows.map_partitions(folder.located, places, meta=_LOCATED)
    returned = located.set_index("part", divisions=list(range(ids.npartitions + 1))).clear_divisions()
    meta = schema.empty_frame((kind.column, schema.list_dtype(kind.column_dtype)) for kind in folder.kinds)
    return ids.map_partitions(folder.embeddings, returned, located["row"].count(), meta=meta)


def _one_number(number: int) -> pd.DataFrame:
    return pd.DataFrame({"part": [number]})


def _assign(frame: Any, made: Any) -> Any:
    """Assign columns whose partitions are those of `frame`: ``assign`` would shuffle both by their index first."""
    from dask._collections import new_collection
    from dask.dataframe.dask_expr._expr import Assign

    pairs = [operand for name in made.columns for operand in (name, made[name].expr)]
    assigned = new_collection(Assign(frame.expr, *pairs))
    # Moves nothing, but gives the rows a single origin in Dask's eyes: else a user's filter would be aligned too.
    return assigned.repartition(npartitions=assigned.npartitions)


class Header(NamedTuple):
    """What the header of a ``.npy`` file says, and where (in bytes) its numbers begin."""

    rows: int
    size: int
    dtype: str
    fortran_order: bool
    offset: int


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
    numbers : list of str
        The ``<i>`` of its files, as they are written.
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
    numbers: Sequence[str]
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
                    f"{kind.name}_{self.numbers[0]}.npy {kind.size} as {kind.dtype}: they must be of one model"
                )
        index = pd.RangeIndex(len(table))
        ids = pd.DataFrame({name: backend.series_of(table[name].combine_chunks(), index) for name in names})
        return self._keyed(ids, self.id_col).assign(file=number, row=index).astype(_PLACES.dtypes).dropna(subset=["key"])

    def located(self, rows: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
        """Return the places of the dataset's ids; both frames hold every occurrence of the same ids."""
        rows = rows[rows["key"].isin(places["key"])]
        shards = rows[["key", "shard"]].drop_duplicates()
        several = pd.concat([one["key"][one["key"].duplicated()] for one in (places, shards)])
        rows, places = (
            one.assign(shard_of=one["shard"].where(one["key"].isin(several), "")) for one in (rows, places)
        )
        unclear = places["key"][places.duplicated(["key", "shard_of"])] if self.says_shards else several
        if len(unclear):
            self._refuse(unclear.drop_duplicates(), rows, places)
        return rows.merge(places.drop(columns="shard"), on=["key", "shard_of"])[list(_LOCATED)]

    def embeddings(self, ids: pd.DataFrame, located: pd.DataFrame, matched: int) -> pd.DataFrame:
        """Return the embeddings of a partition's rows, on its index."""
        if len(ids) and not matched:
            raise DatasetError(
                f"{self.root}: no {self.id_col!r} of its metadata is a {self.dataset_id!r} of the dataset: name the "
                "column with the ids (id_col)"
            )
        wanted = self._keyed(ids, self.dataset_id).assign(at=np.arange(len(ids)))
        found = wanted.merge(located, on=["key", "shard"]).sort_values("at", ignore_index=True)
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
        first = unclear.iloc[0]
        shards = sorted(rows["shard"][rows["key"] == first].unique())
        where = places[places["key"] == first]
        rows_of = [f"row {row} of metadata_{file}.parquet" for file, row in zip(where["file"], where["row"], strict=True)]
        raise IdMismatchError(
            f"{self.root}: {len(unclear)} ids may mean several rows, for example {first!r}: it is {', '.join(rows_of)}, "
            f"and in the dataset it is in {', '.join(shards) or 'no shard'}. Give a folder and a dataset (or an id_col) "
            "in which each id is there once"
        )


def _open_folder(dataset: ImageTextPairDataset, root: str, id_col: str, columns: Mapping[str, str]) -> ClipFolder:
    options = dict(dataset.source.storage_options)
    found = {kind: _list_numbers(root, kind, options) for kind in (*columns, METADATA)}
    for kind in columns:
        alone = sorted(set(found[kind]) ^ set(found[METADATA]))
        if alone:
            there, missing = (kind, METADATA) if alone[0] in found[kind] else (METADATA, kind)
            raise DatasetError(
                f"{root} has {there}_{alone[0]}{SUFFIXES[there]} but no {missing}_{alone[0]}{SUFFIXES[missing]} "
                f"({len(alone)} files lack their partner): bring the missing files, or move these away"
            )
    numbers = sorted(found[METADATA])
    first = file_url(root, METADATA, numbers[0])
    summary = parquet.read_summary(first, options)
    if id_col not in summary.schema.names:
        raise MissingColumnError(f"{first} has no column {id_col!r} (id_col); it has {', '.join(summary.schema.names)}")
    headers = {kind: read_header(file_url(root, kind, numbers[0]), options) for kind in columns}
    types = [backend.arrow_type_of(dataset.metadata._meta[dataset.id_col]), summary.schema.field(id_col).type]
    return ClipFolder(
        root=root,
        numbers=numbers,
        kinds=[Kind(kind, name, headers[kind].size, headers[kind].dtype) for kind, name in columns.items()],
        dataset_id=dataset.id_col,
        id_col=id_col,
        numeric=not all(pa.types.is_string(schema.plain_type(one)) for one in types),
        says_shards=summary.footer is not None and schema.SHARD in summary.schema.names,
        token=tokenize(found),
        storage_options=options,
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
        raise DatasetError(f"{folder} holds no {kind}_<number>{SUFFIXES[kind]}: give a folder that clip-inference wrote")
    return found


def read_header(url: str, storage_options: Mapping[str, Any]) -> Header:
    """Read the header of a ``.npy`` file of embeddings.

    Raises
    ------
    EmbeddingError
        If it is not one, or is cut short.
    """
    fs, path = files.open_fs(url, storage_options)
    parsers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with fs.open(path, "rb") as file:
        try:
            shape, fortran_order, dtype = parsers[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError, EOFError) as error:
            raise EmbeddingError(f"{url} is no .npy file ({' '.join(str(error).split())}): write it anew") from error
        offset = file.tell()
        there = file.seek(0, os.SEEK_END) - offset
    if dtype.kind != "f" or len(shape) != 2 or not shape[1]:
        raise EmbeddingError(f"{url} holds {dtype} of shape {shape}, not a row of floats for each image")
    if there < shape[0] * shape[1] * dtype.itemsize:
        raise EmbeddingError(f"{url} is cut short: {there} bytes of numbers, {shape} of {dtype} are more: write it anew")
    return Header(shape[0], shape[1], dtype.str if dtype.byteorder == ">" else dtype.name, fortran_order, offset)


def read_rows(url: str, rows: npt.NDArray[np.int64], storage_options: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Read rows of a ``.npy`` file of embeddings, and as little else as its place allows.

    Returns
    -------
    ndarray of float, shape (len(rows), size)
    """
    fs, path = files.open_fs(url, storage_options)
    if isinstance(fs, LocalFileSystem):
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)[rows])
    header = read_header(url, storage_options)
    if header.fortran_order:
        return np.asarray(np.load(io.BytesIO(fs.cat_file(path)), allow_pickle=False)[rows])
    unique, place = np.unique(rows, return_inverse=True)
    runs = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
    width = header.size * np.dtype(header.dtype).itemsize
    starts, ends = ([header.offset + int(run[edge] + edge % 2) * width for run in runs] for edge in (0, -1))
    parts = fs.cat_ranges([path] * len(runs), starts, ends, on_error="raise")
    return np.frombuffer(b"".join(parts), header.dtype).reshape(-1, header.size)[place]
