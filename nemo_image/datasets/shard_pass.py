"""One task's pass over one shard: what its functions share, and the window of rows that they work on.

A shard may have more rows than fit in memory with their embeddings. If all that the user's frame does is done row by
row, the task computes the frame over one window of rows after the other. The functions inside the frame are called by
Dask, which knows nothing of windows, so they find the present one in a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image.datasets.source import DatasetSource
from nemo_image.shards import parquet
from nemo_image.shards.read import ShardReader, match_samples
from nemo_image.shards.row_reader import RowReader

WINDOW_ROWS = parquet.ROW_GROUP_ROWS
"""Rows of a shard that are in memory at once, with all their columns."""

Positions = npt.NDArray[np.int64]

_current: ContextVar[ShardPass | None] = ContextVar("nemo_image_shard_pass", default=None)


class ShardPass:
    """A pass over a shard's rows; use it in a ``with`` block.

    Parameters
    ----------
    source : DatasetSource
    shard : str

    Attributes
    ----------
    window : tuple of int, or None
        First row and the one behind the last; None where the shard is worked on whole.
    """

    def __init__(self, source: DatasetSource, shard: str) -> None:
        self.source = source
        self.shard = shard
        self.window: tuple[int, int] | None = None
        self._ids: Any = None
        self._places: Positions | None = None
        self._tables: dict[str, pa.Table] = {}
        self._readers: dict[bool, ShardReader] = {}
        self._columns: dict[tuple[str, tuple[str, ...]], RowReader] = {}
        self._open = ExitStack()

    def __enter__(self) -> ShardPass:
        self._token = _current.set(self)
        self._open.enter_context(parquet.remembering())
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()
        _current.reset(self._token)

    def windows(self, ids: Any, in_windows: bool) -> Iterator[None]:
        """Move from window to window over the shard's rows; one for all if they are few, or not `in_windows`.

        Parameters
        ----------
        ids : pyarrow array or None
            Of all rows of the shard's metadata; None if there is none.
        """
        if not in_windows or ids is None or len(ids) <= WINDOW_ROWS:
            yield
            return
        self._ids = ids
        try:
            for start in range(0, len(ids), WINDOW_ROWS):
                self.window = (start, min(start + WINDOW_ROWS, len(ids)))
                yield
        finally:
            self.window = None

    def windows_of(self, ids: Any, in_windows: bool, lengths: Sequence[int]) -> Iterator[int]:
        """Move over the same windows as :meth:`windows`, with what an earlier move learned of each."""
        for length, _ in zip(lengths, self.windows(ids, in_windows), strict=True):
            yield length

    def reader(self, use_index_file: bool = False) -> ShardReader:
        """Return the shard's tar, open until the end of the pass."""
        if use_index_file not in self._readers:
            source = self.source
            reader = ShardReader(source.tar_url(self.shard), source.storage_options, use_index_file=use_index_file)
            self._readers[use_index_file] = self._open.enter_context(reader)
        return self._readers[use_index_file]

    def rows(self, url: str, columns: Sequence[str]) -> RowReader:
        """Return a reader of some columns of a Parquet file, open until the end of the pass."""
        key = (url, tuple(columns))
        if key not in self._columns:
            made = RowReader(url, columns, self.source.storage_options)
            self._columns[key] = self._open.enter_context(made)
        return self._columns[key]

    def whole(self, name: str, make: Any) -> pa.Table:
        """Return the table of that name, made when it is first asked for and kept until the end of the pass."""
        if name not in self._tables:
            self._tables[name] = make()
        return self._tables[name]

    def places(self, reader: ShardReader, ids: Sequence[Any]) -> Positions:
        """Return the sample of each id, as :func:`match_samples` decides for the shard as a whole; -1 for none."""
        assert self.window is not None
        start, stop = self.window
        if self._places is None:
            self._places = match_samples(reader, self._ids.to_pylist(), self.source.id_col)
        wanted = pa.array(ids, from_pandas=True)
        present = self._ids.slice(start, stop - start)
        if wanted.type != present.type:
            wanted, present = wanted.cast(pa.string()), present.cast(pa.string())
        rows = np.asarray(pc.fill_null(pc.index_in(wanted, value_set=present, skip_nulls=True), -1)).astype(np.int64)
        found = np.where(rows >= 0, self._places[start:stop][rows], -1)
        others = np.flatnonzero(rows < 0).tolist()
        if others:
            # The user gave these rows other ids than the shard's own.
            found[others] = match_samples(reader, [ids[row] for row in others], self.source.id_col)
        return found


def current(source: DatasetSource, shard: str) -> ShardPass | None:
    """Return the pass over this shard of this dataset that the present task is in, or None."""
    found = _current.get()
    if found is None or found.shard != shard:
        return None
    same = (found.source.tar_root, found.source.metadata_root) == (source.tar_root, source.metadata_root)
    return found if same else None


def in_window(source: DatasetSource, shard: str) -> ShardPass | None:
    """Return the present pass if it goes by windows, or None."""
    found = current(source, shard)
    return found if found is not None and found.window is not None else None


@contextmanager
def open_tar(source: DatasetSource, shard: str, use_index_file: bool = False) -> Iterator[ShardReader]:
    """Open a shard's tar for a ``with`` block: the present pass's, or its own."""
    found = current(source, shard)
    if found is not None:
        yield found.reader(use_index_file)
        return
    with ShardReader(source.tar_url(shard), source.storage_options, use_index_file=use_index_file) as reader:
        yield reader


def match_rows(reader: ShardReader, source: DatasetSource, shard: str, ids: Sequence[Any]) -> Positions:
    """Return the sample of each id; -1 for none. See :func:`match_samples`."""
    found = in_window(source, shard)
    return match_samples(reader, ids, source.id_col) if found is None else found.places(reader, ids)
