"""Rows of a Parquet file by their position, in bounded memory, whatever the size of its row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nemo_image.errors import MetadataFileError
from nemo_image.shards.files import StorageOptions
from nemo_image.shards.parquet import ROW_GROUP_ROWS, open_parquet, reading

PIECE_ROWS = ROW_GROUP_ROWS
BUFFER = 2**20
"""Bytes of a column that are read at once."""


class RowReader:
    """Reads ranges of rows. Ranges in ascending order cost one pass over the file, whatever they are.

    Parameters
    ----------
    url : str
    columns : sequence of str
        In the order in which they are wanted.
    storage_options : mapping, optional
        For fsspec.
    """

    def __init__(self, url: str, columns: Sequence[str], storage_options: StorageOptions = None) -> None:
        self.url = url
        self.columns = list(columns)
        self._file = open_parquet(url, storage_options, BUFFER)
        with reading(url):
            metadata = self._file.metadata
            names = self._file.schema_arrow.names
        self.schema = pa.schema([self._file.schema_arrow.field(name) for name in self.columns if name in names])
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.array(groups, np.int64))
        self.rows = int(self._ends[-1]) if groups else 0
        self._pieces: Iterator[pa.RecordBatch] = iter(())
        self._group = -1
        self._piece = pa.table({})
        self._start = self._stop = 0

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._pieces = iter(())
        self._file.close(force=True)

    def read(self, start: int, stop: int) -> pa.Table:
        """Return the rows from `start` to before `stop`.

        Raises
        ------
        MetadataFileError
            If the file cannot be read, or has fewer rows.
        """
        if not 0 <= start <= stop <= self.rows:
            raise MetadataFileError(f"{self.url}: rows {start} to {stop} wanted, the file has {self.rows}")
        parts = []
        while start < stop:
            self._seek(start)
            end = min(stop, self._stop)
            parts.append(self._piece.slice(start - self._start, end - start))
            start = end
        return pa.concat_tables(parts) if parts else self.schema.empty_table()

    def take(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """Return the rows at `positions`, in any order; they may repeat.

        Raises
        ------
        MetadataFileError
            As :meth:`read`.
        """
        if not len(positions):
            return self.schema.empty_table()
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        parts = []
        done = 0
        while done < len(ascending):
            start = int(ascending[done])
            until = int(np.searchsorted(ascending, start + PIECE_ROWS))
            piece = self.read(start, int(ascending[until - 1]) + 1)
            wanted = ascending[done:until] - start
            parts.append(piece if len(wanted) == len(piece) and _consecutive(wanted) else piece.take(pa.array(wanted)))
            done = until
        table = pa.concat_tables(parts)
        if _consecutive(order):
            return table
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return table.take(pa.array(back))

    def _seek(self, row: int) -> None:
        """Make the piece that holds `row` the present one."""
        if self._start <= row < self._stop:
            return
        with reading(self.url):
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group != self._group or row < self._start:
                self._group = group
                self._stop = int(self._ends[group - 1]) if group else 0
                self._pieces = self._file.iter_batches(
                    batch_size=PIECE_ROWS, row_groups=[group], columns=self.columns, use_threads=False
                )
            while not self._start <= row < self._stop:
                piece = next(self._pieces, None)
                if piece is None:
                    raise MetadataFileError(f"{self.url}: ends before row {row}: the file is damaged")
                self._piece = pa.Table.from_batches([piece]).select(self.columns)
                self._start, self._stop = self._stop, self._stop + len(piece)


def _consecutive(values: npt.NDArray[np.int64]) -> bool:
    return bool((np.diff(values) == 1).all()) if len(values) > 1 else True
