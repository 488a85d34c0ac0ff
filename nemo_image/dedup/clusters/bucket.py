"""A bucket's rows, sorted by cluster and by the order in which they are judged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import schema
from nemo_image.dedup.clusters.sample import vector_matrix
from nemo_image.dedup.exchange.runs import read_batch
from nemo_image.dedup.pairs.vectors import DiskVectors, MemoryVectors, Vectors

MEMORY_BYTES = 2**28
"""Bytes of vectors that a task holds; a larger bucket, or cluster, is read from a temporary file."""

VECTOR = "vector"
OLD_RANK = "old_rank"
"""The place of a row that an earlier result kept; null for rows to judge."""

Rows = npt.NDArray[np.int64]


class Bucket:
    """Rows of some clusters.

    Attributes
    ----------
    table : pyarrow.Table
        All columns but the vectors, sorted.
    """

    def __init__(self, table: pa.Table, size: int, matrix: npt.NDArray[np.float32] | None, path: str | None) -> None:
        self.table = table
        self._size = size
        self._matrix = matrix
        self._path = path

    def clusters(self) -> Iterator[tuple[int, int, int]]:
        """Yield each cluster that has rows, its first row, and the one behind its last."""
        numbers = self.table[schema.CLUSTER].to_numpy()
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=True):
            yield int(numbers[start]), start, stop

    def vectors(self, start: int, stop: int) -> Vectors:
        """Return the vectors of some consecutive rows: in memory if they fit, else as they lie on disk."""
        if self._matrix is not None:
            return MemoryVectors(self._matrix[start:stop])
        assert self._path is not None
        on_disk = DiskVectors(self._path, start, stop - start, self._size)
        if (stop - start) * self._size * 4 <= MEMORY_BYTES:
            return MemoryVectors(on_disk.rows(0, stop - start))
        return on_disk


@contextmanager
def open_bucket(
    urls: Sequence[str], number: int, sort_keys: Sequence[tuple[str, str]], storage_options: Any
) -> Iterator[Bucket]:
    """Read a bucket from run files; a temporary file holds its vectors if they are too many.

    Parameters
    ----------
    urls : sequence of str
        The run files.
    sort_keys : sequence of (str, str)
        Columns and ``"ascending"`` or ``"descending"``; nulls come last.
    """
    names, size = _columns_of(urls, storage_options)
    counts: list[int] = []
    table = read_rows(urls, number, names, storage_options, counts)
    order = pc.sort_indices(table, sort_keys=list(sort_keys)).to_numpy().astype(np.int64)
    table = table.take(pa.array(order))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    pieces = _pieces(urls, number, counts, places, storage_options)
    if len(places) * size * 4 <= MEMORY_BYTES:
        matrix = np.empty((len(places), size), np.float32)
        for piece, into in pieces:
            matrix[into] = piece
        yield Bucket(table, size, matrix, None)
        return
    with tempfile.NamedTemporaryFile(prefix="nemo-image-bucket-", dir=scratch_folder()) as file:
        for piece, into in pieces:
            _write_rows(file.fileno(), piece, into)
        yield Bucket(table, size, None, file.name)


def read_rows(
    urls: Sequence[str],
    number: int,
    columns: Sequence[str] | None,
    storage_options: Any,
    counts: list[int] | None = None,
) -> pa.Table:
    """Return columns of a bucket's rows, in the order of the run files, with shards as plain text.

    Parameters
    ----------
    counts : list of int, optional
        The number of rows of each file is added to it.
    """
    parts = []
    for url in urls:
        part = read_batch(url, number, columns, storage_options)
        # Each file has a dictionary of its own, and few rows of a bucket.
        place = part.column_names.index(schema.SHARD)
        parts.append(part.set_column(place, schema.SHARD, part[schema.SHARD].cast(pa.string())))
        if counts is not None:
            counts.append(len(part))
    return pa.concat_tables(parts).combine_chunks()


def scratch_folder() -> str | None:
    """Return where a task may keep a large temporary file: the Dask worker's own folder; None for the system's."""
    try:
        from distributed import get_worker

        return str(get_worker().local_directory)
    except (ImportError, ValueError):
        return None


def _columns_of(urls: Sequence[str], storage_options: Any) -> tuple[list[str], int]:
    """Return the columns of the run files but the vectors, and the vectors' length."""
    head = read_batch(urls[0], 0, None, storage_options).schema
    return [name for name in head.names if name != VECTOR], head.field(VECTOR).type.list_size


def _pieces(
    urls: Sequence[str], number: int, counts: Sequence[int], places: Rows, storage_options: Any
) -> Iterator[tuple[npt.NDArray[np.float32], Rows]]:
    """Yield the vectors of each run file, and the places that they have in the sorted bucket."""
    start = 0
    for url, count in zip(urls, counts, strict=True):
        if count:
            table = read_batch(url, number, [VECTOR], storage_options)
            yield vector_matrix(table[VECTOR]), places[start : start + count]
        start += count


def _write_rows(descriptor: int, rows: npt.NDArray[np.float32], places: Rows) -> None:
    """Write rows to their places in a file; neighbours go in one write."""
    order = np.argsort(places)
    rows, places = rows[order], places[order]
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    width = rows.shape[1] * 4
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        data = memoryview(rows[start:stop].data).cast("B")
        offset = int(places[start]) * width
        while len(data):
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
