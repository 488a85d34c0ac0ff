"""What rows are compared with: an evaluation set's vectors and hashes, in few files of a folder.

.. code-block:: text

    <folder>/vectors.f32         float32 numbers, little-endian, one vector after the other
    <folder>/names.parquet       the name of each vector
    <folder>/hashes.parquet      each hash (uint64), and the name of the first picture that has it
    <folder>/evaluation.json     written last
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from nemo_image import backend
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.evaluation.pictures import PATH
from nemo_image.dedup.exchange.usable import usable_vectors
from nemo_image.dedup.exchange.work import read_json, write_json
from nemo_image.dedup.hashes.hamming import hashes_from_hex
from nemo_image.dedup.hashes.hash_run import FLAT
from nemo_image.errors import EmbeddingError
from nemo_image.shards import files, parquet

EVALUATION, VECTORS, NAMES, HASHES = "evaluation.json", "vectors.f32", "names.parquet", "hashes.parquet"
HASH, NAME = "hash", "name"


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set, ready to be compared with.

    Attributes
    ----------
    folder : str
    rows : int
        Its pictures.
    vectors : int
        Those with a usable embedding.
    size : int
        The length of an embedding, in numbers; 0 where none were asked for.
    hashes : int
        Its different perceptual hashes, without those of pictures of one colour.
    hashed : int
        Pictures with a hash.
    digest : str
        Of all of this: evaluation sets of the same digest mark the same rows.
    """

    folder: str
    rows: int
    vectors: int
    size: int
    hashes: int
    hashed: int
    digest: str

    def __str__(self) -> str:
        parts = [f"{self.rows:,} pictures"]
        if self.size:
            parts.append(f"{self.vectors:,} with an embedding of {self.size} numbers")
        if self.hashed:
            parts.append(f"{self.hashed:,} with a perceptual hash ({self.hashes:,} different ones that tell something)")
        return ", ".join(parts)


def read_evaluation(folder: str, storage_options: Any) -> EvaluationSet | None:
    """Return the evaluation set that a folder holds; None if it is not finished."""
    values = read_json(files.join(folder, EVALUATION), storage_options)
    return None if values is None else EvaluationSet(**{**values, "folder": folder})


def collect(
    saved: ImageTextPairDataset, vector_column: str | None, hash_column: str | None, folder: str
) -> EvaluationSet:
    """Bring an evaluation set's vectors and hashes from its saved metadata into a folder, in one task.

    Raises
    ------
    RunError
        If its embeddings differ in length, or a file cannot be read.
    """
    work = Collect(saved, vector_column, hash_column, folder)
    options = saved.source.storage_options
    made: EvaluationSet = run_all("collect the evaluation set", work, [folder], 1)[0]
    write_json(files.join(folder, EVALUATION), asdict(made), options)
    return made


class Collect:
    """Writes the files of an evaluation set, reading one row group of metadata at a time."""

    def __init__(
        self, saved: ImageTextPairDataset, vector_column: str | None, hash_column: str | None, folder: str
    ) -> None:
        self.source = saved.source
        self.shards = saved.shards
        self.vector_column = vector_column
        self.hash_column = hash_column
        self.has_paths = PATH in saved.source.schema.names
        self.folder = folder

    def __call__(self, folder: str) -> EvaluationSet:
        """Write them."""
        options = self.source.storage_options
        digest = xxhash.xxh3_128()
        names: list[pa.Array] = []
        texts: list[pa.Array] = []
        hashed_names: list[pa.Array] = []
        rows = size = 0
        with files.atomic_writer(files.join(folder, VECTORS), options) as out:
            for shard, table in self._tables():
                rows += len(table)
                named = self._names(shard, table)
                if self.vector_column is not None:
                    matrix, found = self._vectors(shard, table, size or None)
                    size = matrix.shape[1] if len(matrix) else size
                    data = np.ascontiguousarray(matrix, "<f4").tobytes()
                    out.write(data)
                    digest.update(data)
                    names.append(named.take(pa.array(found)))
                if self.hash_column is not None:
                    has = table[self.hash_column].combine_chunks().is_valid()
                    texts.append(table[self.hash_column].combine_chunks().filter(has))
                    hashed_names.append(named.filter(has))
        vectors = sum(map(len, names))
        all_names = pa.chunked_array(names, pa.string()).combine_chunks()
        parquet.write_table(files.join(folder, NAMES), pa.table({NAME: all_names}), None, options)
        hashed = sum(map(len, texts))
        hashes = _distinct(texts, hashed_names)
        parquet.write_table(files.join(folder, HASHES), hashes, None, options)
        for column in (all_names, *hashes.columns):
            digest.update("\n".join(map(str, column.to_pylist())).encode("utf-8", "surrogatepass"))
        return EvaluationSet(folder, rows, vectors, size, len(hashes), hashed, digest.hexdigest())

    def _tables(self) -> Iterator[tuple[str, pa.Table]]:
        options = self.source.storage_options
        for shard in self.shards:
            url = self.source.parquet_url(shard)
            with parquet.reading(url):
                file = parquet.open_parquet(url, options)
                try:
                    for group in range(file.num_row_groups):
                        yield shard, file.read_row_group(group, use_threads=False)
                finally:
                    file.close(force=True)

    def _names(self, shard: str, table: pa.Table) -> pa.Array:
        """Return what a picture is called: its path, or shard and id."""
        if self.has_paths:
            return table[PATH].combine_chunks().cast(pa.string())
        ids = pc.fill_null(table[self.source.id_col].combine_chunks().cast(pa.string()), "")
        return pc.binary_join_element_wise(pa.scalar(shard), ids, "/")

    def _vectors(
        self, shard: str, table: pa.Table, size: int | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        assert self.vector_column is not None
        column = table[self.vector_column]
        if column.null_count == len(column):
            return np.zeros((0, size or 0), np.float32), np.zeros(0, np.int64)
        frame = pd.DataFrame({self.vector_column: backend.series_of(column, pd.RangeIndex(len(column)))})
        try:
            matrix, found, _, _ = usable_vectors(frame, self.vector_column, size)
        except EmbeddingError as error:
            raise EmbeddingError(f"evaluation set, shard {shard}: {error}") from error
        return matrix, found


def _distinct(texts: Sequence[pa.Array], names: Sequence[pa.Array]) -> pa.Table:
    """Return the different hashes that tell something, ascending, each with the first name that has it."""
    hashes = hashes_from_hex(pa.chunked_array(texts, pa.string()))
    told = np.flatnonzero(~np.isin(hashes, FLAT))
    values, first = np.unique(hashes[told], return_index=True)
    named = pa.chunked_array(names, pa.string()).combine_chunks().take(pa.array(told[first]))
    return pa.table({HASH: pa.array(values), NAME: named})
