"""clip-retrieval's folders of embeddings, in and out.

``clip-inference`` of `clip-retrieval <https://github.com/rom1504/clip-retrieval>`_ writes ``img_emb/img_emb_<i>.npy``
(and ``text_emb/text_emb_<i>.npy``) with one embedding a row, and the same rows' ids, captions and JSON fields as
``metadata/metadata_<i>.parquet``. Its files are not the dataset's shards: rows find each other by id.
"""

from __future__ import annotations

import copy
import io
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize
from fsspec.implementations.local import LocalFileSystem

from nemo_image import backend, schema
from nemo_image.datasets import opening, save, scattered
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.datasets.load import id_positions, require_unique
from nemo_image.datasets.partitions import shard_tasks
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import ShardRecord
from nemo_image.errors import (
    ArgumentError,
    DatasetError,
    EmbeddingError,
    IdMismatchError,
    MissingColumnError,
    one_line,
)
from nemo_image.shards import files, parquet
from nemo_image.shards.keys import plain_ids

IMAGE, TEXT, METADATA = "img_emb", "text_emb", "metadata"
SUFFIXES = {IMAGE: ".npy", TEXT: ".npy", METADATA: ".parquet"}
IMAGE_PATH = "image_path"
MANIFEST_KEY = "clip_retrieval"

_TEXT = schema.arrow_dtype("string")
_ROWS = schema.empty_frame([("key", _TEXT), ("shard", _TEXT), ("part", "int64")])
_PLACES = schema.empty_frame([("key", _TEXT), ("shard", _TEXT), ("file", _TEXT), ("row", "int64")])
_LOCATED = schema.empty_frame([*_ROWS.dtypes.items(), ("file", _TEXT), ("row", "int64")])


def read_clip_retrieval(
    dataset: ImageTextPairDataset,
    path: str | os.PathLike[str],
    id_col: str = IMAGE_PATH,
    image_embedding_column: str = schema.IMAGE_EMBEDDING,
    text_embedding_column: str | None = None,
) -> ImageTextPairDataset:
    """Add the embeddings of a folder that clip-retrieval wrote, lazily, each to the row whose id it has.

    Names are listed, and one header and footer read, at once; all else when the columns are computed. Only ids are
    moved between partitions, and the rows keep theirs.

    Parameters
    ----------
    dataset : ImageTextPairDataset
    path : str or path
        The folder that holds ``img_emb``, ``metadata`` and perhaps ``text_emb``, on any fsspec file system.
    id_col : str, default "image_path"
        The column of its metadata that holds the dataset's ids: for tars, clip-inference puts the sample's key into
        ``image_path``. Integers match texts that are zero-padded numbers.
    image_embedding_column, text_embedding_column : str
        The columns to add (or replace); without the second one, ``text_emb`` is not read. Lists of float16 where the
        files are float16, of float32 otherwise; null in rows whose id the folder lacks.

    Returns
    -------
    ImageTextPairDataset
        The same rows in the same partitions.

    Raises
    ------
    ArgumentError
        If a column's name is taken.
    DatasetError
        If there is no such folder, or a ``.npy`` lacks its metadata or the other way round; on computing, if no id of
        the dataset is in the folder.
    MissingColumnError
        If its metadata has no column `id_col`.
    EmbeddingError
        If a file holds no floats (pickled objects are never loaded), is cut short, or differs from its metadata in
        rows or from the first file in size or type.
    IdMismatchError
        On computing, if an id of the folder, or of two shards of the dataset, may mean several rows. Folders that
        :func:`write_clip_retrieval` wrote say the shard too, which settles it.
    """
    folder = _open_folder(dataset, os.fspath(path).rstrip("/"), id_col, image_embedding_column, text_embedding_column)
    metadata = dataset.metadata
    ids = metadata[[schema.SHARD, dataset.id_col]]
    result = copy.copy(dataset)
    result.metadata = _assign(metadata, _lazy_columns(folder, ids))
    return result


def _lazy_columns(folder: ClipFolder, ids: Any) -> Any:
    """Return the embeddings as a Dask frame aligned with `ids`: ids meet by hash and go back to their partitions."""
    import dask.dataframe as dd

    parts = dd.from_map(_one_number, range(ids.npartitions), meta=schema.empty_frame([("part", "int64")]))
    rows = ids.map_partitions(folder.rows, parts, meta=_ROWS)
    places = dd.from_map(folder.places, folder.numbers, meta=_PLACES)
    rows, places = (frame.shuffle("key", npartitions=len(folder.numbers)) for frame in (rows, places))
    located = rows.map_partitions(folder.located, places, meta=_LOCATED)
    back = located.set_index("part", divisions=list(range(ids.npartitions + 1))).clear_divisions()
    meta = schema.empty_frame((one.column, schema.list_dtype(one.dtype)) for one in folder.kinds)
    return ids.map_partitions(folder.embeddings, back, located["row"].count(), meta=meta)


def _one_number(number: int) -> pd.DataFrame:
    return pd.DataFrame({"part": [number]})


def _assign(frame: Any, made: Any) -> Any:
    """Assign columns whose partitions are those of `frame`; ``assign`` would shuffle both by their index first."""
    from dask._collections import new_collection
    from dask.dataframe.dask_expr._expr import Assign

    pairs = [operand for name in made.columns for operand in (name, made[name].expr)]
    assigned = new_collection(Assign(frame.expr, *pairs))
    # Nothing to do, but Dask then sees one origin of the rows, and does not align the user's filters either.
    return assigned.repartition(npartitions=assigned.npartitions)


@dataclass(frozen=True)
class EmbeddingKind:
    """One kind of embeddings of a folder: its subfolder, the dataset's column, numbers an embedding, stored type."""

    name: str
    column: str
    size: int
    dtype: str


@dataclass(frozen=True)
class ClipFolder:
    """A folder that clip-retrieval wrote; its methods run on the workers.

    Attributes
    ----------
    numbers : list of str
        The ``<i>`` of its files, as they are written.
    dataset_id, id_col : str
        The column of ids in the dataset, and that in the folder's metadata.
    numeric : bool
        Whether ids are compared as numbers.
    says_shards : bool
        Whether we wrote it, so that ``shard`` is the dataset's.
    token : str
        Changes when the files do.
    """

    root: str
    numbers: Sequence[str]
    dataset_id: str
    id_col: str
    numeric: bool
    says_shards: bool
    kinds: Sequence[EmbeddingKind]
    storage_options: Mapping[str, Any]
    token: str

    def url(self, kind: str, number: str) -> str: ...
