"""clip-retrieval's folders of embeddings, in and out; :mod:`nemo_image.datasets.clip_folder` says what they are."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets import clip_folder, opening, save, scattered
from nemo_image.datasets.clip_folder import IMAGE, IMAGE_PATH, SUFFIXES, TEXT, ClipFolder
from nemo_image.datasets.clip_writer import WriteClipShard, Written, numbered
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.datasets.partitions import shard_tasks
from nemo_image.datasets.state import DatasetState
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError
from nemo_image.shards import files

RUN = "write_clip_retrieval"


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
        The folder with ``img_emb``, ``metadata`` and perhaps ``text_emb``; any fsspec URL, opened with the dataset's
        storage options.
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
        If the folder's metadata has no column `id_col`.
    EmbeddingError
        If a file is cut short, holds no floats (pickled objects are never loaded), has another number of rows than
        its metadata, or another size or type than the first file.
    IdMismatchError
        On computing, if an id stands more than once in the folder, or in several shards of the dataset. Only a folder
        that :func:`write_clip_retrieval` wrote says which shard it means.
    """
    columns = _columns(image_embedding_column, text_embedding_column)
    taken = {dataset.id_col, schema.SHARD} & set(columns.values())
    if taken:
        raise ArgumentError(f"column {taken.pop()!r} says which row is which: give the embeddings another name")
    root, options = files.folder(path), dataset.source.storage_options
    ids = backend.in_pandas(dataset.metadata[[schema.SHARD, dataset.id_col]])
    folder, numbers = clip_folder.open_folder(root, columns, id_col, dataset.id_col, ids._meta, options)
    result = copy.copy(dataset)
    made = backend.in_kind_of(_lazy_embeddings(folder, numbers, ids), dataset.metadata)
    result.metadata = _assign(dataset.metadata, made)
    return result


def _columns(image: str, text: str | None) -> dict[str, str]:
    if image == text:
        raise ArgumentError(f"image_embedding_column and text_embedding_column are both {image!r}: name two columns")
    return {IMAGE: image} if text is None else {IMAGE: image, TEXT: text}


def _lazy_embeddings(folder: ClipFolder, numbers: Sequence[str], ids: Any) -> Any:
    """Return the embeddings as a Dask frame whose partitions and index are those of `ids`."""
    import dask.dataframe as dd

    parts = dd.from_map(_one_number, range(ids.npartitions), meta=schema.empty_frame([("part", "int64")]))
    meeting = {"on": "key", "npartitions": len(numbers)}
    rows = ids.map_partitions(folder.rows, parts, meta=clip_folder.ROWS).shuffle(**meeting)
    places = dd.from_map(folder.places, numbers, meta=clip_folder.PLACES).shuffle(**meeting)
    located = rows.map_partitions(folder.located, places, meta=clip_folder.LOCATED)
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


def write_clip_retrieval(
    dataset: ImageTextPairDataset,
    path: str | os.PathLike[str],
    image_embedding_column: str = schema.IMAGE_EMBEDDING,
    text_embedding_column: str | None = None,
    columns: Sequence[str] | None = None,
    dtype: str = "float16",
) -> dict[str, Any]:
    """Write the dataset's embeddings as clip-inference would, for clip-retrieval's index and back end.

    One partition of files a shard, numbered in the shards' order; a shard without any embedding has none. A rerun
    over a folder that the same call left unfinished writes it anew.

    Parameters
    ----------
    dataset : ImageTextPairDataset
    path : str or path
        A folder that holds nothing else.
    image_embedding_column, text_embedding_column : str
        Rows that lack one of them are left out, and counted in the ledger as ``without_embedding``.
    columns : sequence of str, optional
        What the metadata tells besides ``image_path`` (the id, as text), ``caption`` and ``shard``; by default every
        column that holds no lists of floats.
    dtype : {"float16", "float32"}
        The numbers' type in the files; clip-inference writes float16.

    Returns
    -------
    dict
        The sums of the ledger, and its URL.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    MissingColumnError
        If a column is not there.
    EmbeddingError
        If a column holds no embeddings, or those of the shards differ in size.
    DatasetError
        If `path` holds something else, or no row has an embedding.
    RunError
        If shards failed.
    """
    state = dataset.state
    target = files.folder(path)
    kinds = _columns(image_embedding_column, text_embedding_column)
    fields = _fields_to_write(state, kinds, columns, dtype)
    options = state.source.storage_options
    wanted = list(dict.fromkeys([schema.SHARD, state.source.id_col, *fields.names[1:], *kinds.values()]))
    if set(wanted) & set(state.lineage.pending):
        state, _ = save.materialize(state)  # or a killed run would have to embed anew
    frame = state.frame[wanted]
    _claim(target, tokenize(frame, kinds, fields.to_string(), dtype, list(state.shards)), options)
    work = WriteClipShard(state.source, target, kinds, fields, dtype)
    with (
        run_lock(target, RUN, options),
        scattered.saved_items(frame, shard_tasks(frame), state.shards, target, state.source) as items,
    ):
        numbered_items = numbered(items, state.shards)
        ratio = save.DEFAULT_FAILURE_RATIO
        records = save.run_shards(RUN, work, numbered_items, len(state.shards), ratio, target, state.source)
    made_by = {name: state.lineage.provenance[name] for name in kinds.values() if name in state.lineage.provenance}
    totals = save.finish(target, RUN, records, options, made_by)
    sizes = {record.size: record.shard for record in records if isinstance(record, Written) and record.size}
    if len(sizes) > 1:
        said = ", ".join(f"{' and '.join(map(str, size))} numbers in {shard}" for size, shard in sorted(sizes.items()))
        raise EmbeddingError(f"{target}: the shards' embeddings differ in size ({said}): no index can hold them")
    if not sizes:
        raise DatasetError(f"no row has a value in {', '.join(kinds.values())}: there is nothing to write")
    return totals


def _fields_to_write(
    state: DatasetState, kinds: Mapping[str, str], columns: Sequence[str] | None, dtype: str
) -> pa.Schema:
    """Check the arguments; return the columns of the metadata files."""
    if dtype not in schema.EMBEDDING_TYPES:
        raise ArgumentError(f"dtype must be 'float16' or 'float32', not {dtype!r}")
    if isinstance(columns, str):
        raise ArgumentError(f"columns must be a list of names, not a string: [{columns!r}]")
    meta, id_col = state.frame._meta, state.source.id_col
    state.require_columns([*kinds.values(), *(columns or ())])
    wrong = [name for name in kinds.values() if not backend.is_embedding_dtype(meta[name].dtype)]
    if wrong:
        raise EmbeddingError(f"column {wrong[0]!r} holds {meta[wrong[0]].dtype}, not lists of floats: name another")
    if id_col != IMAGE_PATH and IMAGE_PATH in (columns or ()):
        raise ArgumentError(f"column {IMAGE_PATH!r} of the files holds the id, {id_col!r}: rename the dataset's own")
    others = [name for name in meta.columns if not backend.is_embedding_dtype(meta[name].dtype)]
    chosen = others if columns is None else columns
    names = [*([schema.CAPTION] if schema.CAPTION in meta.columns else []), *chosen]
    texts = (IMAGE_PATH, schema.SHARD)
    kinds_of = {name: backend.arrow_type_of(meta[name]) for name in names if name not in texts}
    return pa.schema([(IMAGE_PATH, pa.string()), *kinds_of.items(), (schema.SHARD, pa.string())])


def _claim(target: str, token: str, options: Mapping[str, Any]) -> None:
    """Make the folder ours, or go on with one that the same call has begun."""
    fs, path = files.open_fs(target, options)
    begun = opening.read_manifest(target, options).get(RUN) if fs.isdir(path) else None
    there = sorted(one.rstrip("/").rpartition("/")[2] for one in fs.ls(path, detail=False)) if fs.exists(path) else []
    if there and begun != token:
        said = "embeddings of other rows or settings" if begun else f"something else ({there[0]}, …)"
        raise DatasetError(f"{target} holds {said}: give an empty folder")
    for kind in SUFFIXES:
        # clip-retrieval takes every file of a subfolder for one of its own.
        files.sweep_temporaries(files.join(target, kind), storage_options=options)
    opening.write_manifest(target, {RUN: token}, options)
