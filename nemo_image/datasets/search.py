"""Exact lookups in saved embeddings: the rows most like a text, a picture or a vector.

Shards are read one window of rows after the other, their ids and embeddings alone; a task returns its best `k` rows,
and the client merges them. What is found depends on the rows alone (:mod:`nemo_image.datasets.nearest`), and not on
partitions, windows or workers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nemo_image import backend, schema
from nemo_image.datasets.nearest import Doubles, nearest_rows
from nemo_image.datasets.partitions import PartitionTask, shard_tasks
from nemo_image.datasets.queries import fingerprint_of, query_vectors, require_same_model, require_saved, settled
from nemo_image.datasets.row_windows import frames
from nemo_image.datasets.show import Gallery
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState
from nemo_image.engine import threads
from nemo_image.engine.device import worker_device
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import ArgumentError, EmbeddingError, IdMismatchError, RunError, one_line

logger = logging.getLogger("nemo_image")

QUERY, SIMILARITY = "query", "similarity"

FAILURES_NAMED = 10


class Hit(NamedTuple):
    """A row that is among the best; sorts as results do: the most similar first, ties by shard, then id."""

    distance: float  # the negative cosine
    shard: str
    id: Any
    partition: int


@dataclass
class Best:
    """The best rows of some partitions, for each query, and what was looked at."""

    hits: list[list[Hit]]
    rows: int = 0
    without: int = 0
    unusable: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, other: Best, k: int) -> None:
        """Take over another's."""
        for query, (mine, theirs) in enumerate(zip(self.hits, other.hits, strict=True)):
            if theirs and (len(mine) < k or theirs[0] < mine[-1]):
                self.hits[query] = sorted([*mine, *theirs])[:k]
        self.rows += other.rows
        self.without += other.without
        self.unusable += other.unusable
        self.failures |= other.failures


class SearchResult:
    """The rows most like each query; a notebook shows them as pictures.

    Attributes
    ----------
    frame : DataFrame
        ``query`` (its number, from 0), ``similarity`` (the cosine, float64), ``shard``, the id, and other columns of
        the metadata. Of each query the most similar row first; ties go by shard, then id.
    rows : int
        Rows that were looked at.
    without_embedding, unusable : int
        Of them, those skipped: with no embedding, and with one that is zero or not finite (or with no id).
    """

    def __init__(self, frame: pd.DataFrame, source: DatasetSource, best: Best) -> None:
        self.frame = frame
        self.rows = best.rows
        self.without_embedding = best.without
        self.unusable = best.unusable
        self._source = source

    def show(self, n: int | None = None) -> Gallery:
        """Show the first `n` rows, all by default, as pictures with captions and similarities.

        Raises
        ------
        ArgumentError
            If `n` is less than 1.
        """
        if n is not None and n < 1:
            raise ArgumentError(f"n must be at least 1, not {n}")
        return Gallery.of(self.frame if n is None else self.frame.head(n), self._source)

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        skipped = self.without_embedding + self.unusable
        return f"<SearchResult: {len(self)} of {self.rows:,} rows ({skipped:,} skipped)\n{self.frame.to_string()}>"

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


def search(
    state: DatasetState, query: Any, k: int, embedder: Any | None, column: str, columns: Sequence[str] | None
) -> SearchResult:
    """Find the rows whose embeddings are most like a query; see :meth:`ImageTextPairDataset.search`."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ArgumentError(f"k must be a whole number, at least 1, not {k!r}")
    frame, lineage, id_col = state.frame, state.lineage, state.source.id_col
    require_saved(column, list(frame.columns), lineage.pending)
    shown = _shown_columns(state, columns)
    ready = None if embedder is None else settled(embedder)
    require_same_model(fingerprint_of(ready), lineage.provenance.get(column), column)
    vectors = query_vectors(query, ready)
    _require_size(lineage.provenance.get(column, {}).get("embedding_size"), vectors.shape[1], column)
    finding = FindBest(state.source, column, vectors, int(k), worker_device())
    best = _find(backend.in_pandas(frame[[schema.SHARD, id_col, column]]), finding)
    if best.failures:
        causes = [f"{name}: {cause}" for name, cause in sorted(best.failures.items())[:FAILURES_NAMED]]
        raise RunError(f"search: {len(best.failures)} shards could not be read. " + "; ".join(causes), best.failures)
    if best.unusable:
        logger.warning(
            "search: %d of %d rows have an embedding that is zero or not finite, or no id: they were skipped",
            best.unusable,
            best.rows,
        )
    return SearchResult(_rows_of(frame, best, id_col, shown), state.source, best)


def _require_size(there: int | None, asked: int, column: str) -> None:
    if there not in (None, asked):
        raise EmbeddingError(
            f"column {column!r} holds embeddings of {there} numbers, the query has {asked}: it comes from another model"
        )


def _shown_columns(state: DatasetState, columns: Sequence[str] | None) -> list[str]:
    """Return the columns to show beside the row's identity: what was asked for, or all that cost no computation."""
    if isinstance(columns, str):
        raise ArgumentError(f"columns must be a list of names, not a string: [{columns!r}]")
    dtypes, pending = state.frame.dtypes, state.lineage.pending
    if columns is None:
        chosen = [name for name in dtypes.index if name not in pending and not backend.is_embedding_dtype(dtypes[name])]
    else:
        state.require_columns(columns)
        chosen = list(dict.fromkeys(columns))
    return [name for name in chosen if name not in (QUERY, SIMILARITY, schema.SHARD, state.source.id_col)]


class FindBest:
    """Finds the best rows of a partition.

    Parameters
    ----------
    column : str
        Of embeddings.
    queries : ndarray of float64, shape (n_queries, size)
    """

    task_name = "nemo-image-search"

    def __init__(self, source: DatasetSource, column: str, queries: Doubles, k: int, device: str) -> None:
        self.source = source
        self.column = column
        self.queries = queries
        self.k = k
        self.device = device

    def __call__(self, item: tuple[int, str, PartitionTask]) -> Best:
        """Look at one shard, window by window; a shard that cannot be read is a failure of the result."""
        number, shard, rows = item
        best = self.nothing()
        try:
            for frame in frames(self.source, shard, rows):
                best.add(self.of_frame(number, frame), self.k)
        except Exception as error:
            best.failures[shard] = one_line(error)
        return best

    def nothing(self) -> Best:
        """Return the best of no rows."""
        return Best([[] for _ in self.queries])

    def of_frame(self, number: int, frame: pd.DataFrame) -> Best:
        """Look at the rows of a frame, of the partition of that number."""
        best = self.nothing()
        best.rows = len(frame)
        kind = frame[self.column].dtype
        if not len(frame) or (not backend.is_embedding_dtype(kind) and frame[self.column].isna().all()):
            best.without = len(frame)
            return best
        matrix, rows = backend.to_matrix(frame[self.column])
        best.without = len(frame) - len(rows)
        _require_size(matrix.shape[1] if len(rows) else None, self.queries.shape[1], self.column)
        ids = frame[self.source.id_col]
        named = ids.notna().to_numpy(dtype=bool)[rows]
        with threads.torch_threads(threads.task_share()):
            found = nearest_rows(matrix, named, self.queries, self.k, self.device)
        best.unusable = found.unusable
        shards = frame[schema.SHARD]
        for query in range(len(self.queries)):
            places = rows[found.rows[query]]
            names = shards.iloc[places].astype(object), ids.iloc[places].tolist()
            made = zip((-found.cosines[query]).tolist(), *names, strict=True)
            best.hits[query] = sorted(Hit(distance, str(shard), one, number) for distance, shard, one in made)[: self.k]
        return best


def _find(frame: Any, finding: FindBest) -> Best:
    """Look at all partitions: as tasks of one shard each, or as Dask makes them where they are no longer that."""
    best = finding.nothing()
    tasks = shard_tasks(frame)
    if tasks is None:
        for one in _by_dask(frame, finding):
            best.add(one, finding.k)
        return best
    items = ((number, shard, rows) for number, (shard, rows) in enumerate(tasks))
    count = len(tasks.shards)
    with Progress("search", count) as progress:
        for one in run_tasks(finding, items, on_error=_Dead(finding), count=count):
            best.add(one, finding.k)
            progress.advance(one.rows)
    return best


def _by_dask(frame: Any, finding: FindBest) -> Sequence[Best]:
    from dask.base import compute
    from dask.delayed import delayed

    of_frame = delayed(finding.of_frame, pure=False)
    made: Sequence[Best] = compute(*(of_frame(number, part) for number, part in enumerate(frame.to_delayed())))
    return made


class _Dead:
    """Makes the record of a shard whose task died."""

    def __init__(self, finding: FindBest) -> None:
        self.finding = finding

    def __call__(self, item: tuple[int, str, PartitionTask], error: BaseException) -> Best:
        best = self.finding.nothing()
        best.failures[item[1]] = one_line(error)
        return best


def _rows_of(frame: Any, best: Best, id_col: str, shown: Sequence[str]) -> pd.DataFrame:
    """Return the rows that were found, with the columns to show, from the partitions that have them."""
    hits = [(query, hit) for query, found in enumerate(best.hits) for hit in found]
    made = pd.DataFrame(
        {
            QUERY: np.array([query for query, _ in hits], np.int64),
            SIMILARITY: np.array([-hit.distance for _, hit in hits], np.float64),
            schema.SHARD: pd.Series([hit.shard for _, hit in hits], dtype=schema.arrow_dtype("string")),
            id_col: pd.Series([hit.id for _, hit in hits], dtype=backend.in_pandas(frame[[id_col]]).dtypes[id_col]),
        }
    )
    if not hits:
        return made.assign(**{name: [] for name in shown})
    ids = sorted({hit.id for _, hit in hits})
    names = [schema.SHARD, id_col, *shown]
    there = backend.in_pandas(frame[names]).partitions[sorted({hit.partition for _, hit in hits})]
    rows = there.map_partitions(TakeRows(id_col, ids), meta=there._meta).compute()
    rows = rows.reset_index(drop=True)
    keys = zip(rows[schema.SHARD].astype(object), rows[id_col].tolist(), strict=True)
    places = {(str(shard), one): place for place, (shard, one) in enumerate(keys)}
    wanted = {(hit.shard, hit.id) for _, hit in hits}
    for pair in rows.loc[rows[[schema.SHARD, id_col]].duplicated(), [schema.SHARD, id_col]].itertuples(index=False):
        if (str(pair[0]), pair[1]) in wanted:
            raise IdMismatchError(
                f"{pair[0]}: its metadata has the id {pair[1]!r} more than once, so that the row that was found cannot "
                "be told from the other: make the ids unique"
            )
    taken = rows.iloc[[places[hit.shard, hit.id] for _, hit in hits]].reset_index(drop=True)
    return made.assign(**{name: taken[name] for name in shown})


class TakeRows:
    """Takes the rows of a partition that have one of some ids."""

    def __init__(self, id_col: str, ids: Sequence[Any]) -> None:
        self.id_col = id_col
        self.ids = list(ids)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return them."""
        return frame[frame[self.id_col].isin(self.ids).to_numpy(dtype=bool)]

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("TakeRows", self.id_col, self.ids)
