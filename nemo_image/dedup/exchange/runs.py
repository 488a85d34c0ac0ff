"""Run files: rows on their way to the other rows of their bucket.

A task that reads shards writes what it read as few large files, each with one Arrow record batch a bucket. A task that
works on a bucket reads that batch of every file. There are as many files as there are runs of `RUN_BYTES`, whatever the
number of shards, clusters or buckets; each is written whole under its name or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from nemo_image.errors import DatasetError
from nemo_image.shards import files

RUN_BYTES = 2**27
"""Bytes of rows that a task holds before it writes a file."""

MAX_BUCKETS = 1024


class RunWriter:
    """Writes rows to run files by bucket.

    Parameters
    ----------
    prefix : str
        Of the files' URLs: ``<prefix>-000.arrow`` and so on.
    buckets : int
        Their number.
    run_bytes : int
        Bytes of rows after which a file is written.

    Attributes
    ----------
    urls : list of str
        The files written so far.
    counts : ndarray of int64, shape (buckets,)
        Rows of each bucket so far.
    """

    def __init__(self, prefix: str, buckets: int, storage_options: Any = None, run_bytes: int = RUN_BYTES) -> None:
        self.urls: list[str] = []
        self.counts = np.zeros(buckets, np.int64)
        self._prefix = prefix
        self._buckets = buckets
        self._options = storage_options
        self._run_bytes = run_bytes
        self._waiting: list[tuple[pa.Table, npt.NDArray[Any]]] = []
        self._bytes = 0

    def add(self, table: pa.Table, buckets: npt.NDArray[Any]) -> None:
        """Add rows; `buckets` says where each belongs."""
        if not len(table):
            return
        self._waiting.append((table, buckets))
        self._bytes += table.nbytes
        if self._bytes >= self._run_bytes:
            self._write()

    def close(self) -> None:
        """Write the rows that are left."""
        if self._waiting:
            self._write()

    def _write(self) -> None:
        table = pa.concat_tables([one for one, _ in self._waiting]).unify_dictionaries().combine_chunks()
        buckets = np.concatenate([one for _, one in self._waiting])
        self._waiting, self._bytes = [], 0
        counts = np.bincount(buckets, minlength=self._buckets)
        url = f"{self._prefix}-{len(self.urls):03d}.arrow"
        write_batches(url, table.take(pa.array(np.argsort(buckets, kind="stable"))), counts, self._options)
        self.counts += counts
        self.urls.append(url)


def write_batches(url: str, table: pa.Table, counts: npt.NDArray[Any], storage_options: Any = None) -> None:
    """Write a table as one file of consecutive record batches of `counts` rows, atomically."""
    table = table.unify_dictionaries()
    columns = [column.combine_chunks() for column in table.columns]
    with files.atomic_writer(url, storage_options) as out, pa.ipc.new_file(out, table.schema) as writer:
        start = 0
        for count in counts.tolist():
            # One batch exactly, also of no rows: readers find it by its number.
            parts = [column.slice(start, count) for column in columns]
            writer.write_batch(pa.RecordBatch.from_arrays(parts, schema=table.schema))
            start += count


def read_batch(url: str, number: int, columns: Sequence[str] | None = None, storage_options: Any = None) -> pa.Table:
    """Read one record batch of a file, or some of its columns.

    Raises
    ------
    DatasetError
        If the file is damaged.
    FileNotFoundError
        If it is missing.
    """
    with _opened(url, columns, storage_options) as reader:
        return pa.Table.from_batches([reader.get_batch(number)])


def read_batches(url: str, columns: Sequence[str] | None = None, storage_options: Any = None) -> Iterator[pa.Table]:
    """Yield the record batches of a file, one after the other."""
    with _opened(url, columns, storage_options) as reader:
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


@contextmanager
def _opened(url: str, columns: Sequence[str] | None, storage_options: Any) -> Iterator[Any]:
    fs, path = files.open_fs(url, storage_options)
    # A file of the operating system's is read column by column, without a copy in between.
    file = pa.OSFile(path) if isinstance(fs, LocalFileSystem) else pa.PythonFile(fs.open(path, "rb"), mode="r")
    with file:
        try:
            schema = pa.ipc.open_file(file).schema
            fields = None if columns is None else [schema.get_field_index(name) for name in columns]
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
            yield pa.ipc.open_file(file, options=options)
        except pa.ArrowInvalid as error:
            cause = str(error).splitlines()[0]
            raise DatasetError(f"{url} is damaged ({cause}): remove its folder and run again") from error
