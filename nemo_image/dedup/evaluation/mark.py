"""Which rows are too like an evaluation set: the function behind the columns of `Decontaminate`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from nemo_image import backend, schema
from nemo_image.dedup.clusters.bucket import MEMORY_BYTES, scratch_folder
from nemo_image.dedup.evaluation.collect import HASH, HASHES, NAME, NAMES, VECTORS, EvaluationSet
from nemo_image.dedup.exchange.usable import usable_vectors
from nemo_image.dedup.hashes.hamming import hashes_from_hex
from nemo_image.dedup.hashes.hash_run import FLAT
from nemo_image.dedup.hashes.multi_index import Hashes, near_pairs, spread
from nemo_image.dedup.pairs.judge import judge
from nemo_image.dedup.pairs.vectors import DiskVectors, Floats, Indices, MemoryVectors, Vectors
from nemo_image.engine import threads
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.shards import files, parquet

CONTAMINATED = "contaminated"
"""Whether a row is too like a picture of an evaluation set (bool); null where that could not be told."""

EVAL_SIMILARITY = "eval_similarity"
"""Largest cosine of a row's embedding and that of a picture of the evaluation set (float32); 0 where none is above."""

EVAL_HASH_DISTANCE = "eval_hash_distance"
"""Bits in which a row's perceptual hash differs from the nearest one of the evaluation set; null beyond the maximum."""

EVAL_MATCH = "eval_match"
"""The picture of the evaluation set that a contaminated row is like; null for other rows."""

BLOCK_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows compared at once. More of them share what is read of a large evaluation set, and take 48 KiB each."""

_NONE = np.iinfo(np.int64).max
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class MarkSettings:
    """How rows are compared with an evaluation set.

    Attributes
    ----------
    embedding_column : str or None
        None: not by embedding.
    hash_column : str or None
        None: not by perceptual hash.
    eps : float
        A row is contaminated from cosine ``1 - eps`` on.
    max_distance : int
        Or up to so many bits.
    """

    embedding_column: str | None
    hash_column: str | None
    eps: float
    max_distance: int

    @property
    def outputs(self) -> dict[str, str]:
        """The columns that are added, with their types."""
        made = {CONTAMINATED: "bool", EVAL_MATCH: "string"}
        if self.embedding_column is not None:
            made[EVAL_SIMILARITY] = "float32"
        if self.hash_column is not None:
            made[EVAL_HASH_DISTANCE] = "int32"
        return made


class MarkContaminated:
    """Compares the rows of a partition with an evaluation set.

    Parameters
    ----------
    evaluation : EvaluationSet
    settings : MarkSettings
    device : str
        Of torch, for the products.
    """

    row_by_row = True

    def __init__(self, evaluation: EvaluationSet, settings: MarkSettings, storage_options: Any, device: str) -> None:
        self.evaluation = evaluation
        self.settings = settings
        self.storage_options = storage_options
        self.device = device

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the columns for `frame`."""
        settings, rows = self.settings, len(frame)
        verdict, unknown = np.zeros(rows, bool), np.zeros(rows, bool)
        match = np.full(rows, None, object)
        made: dict[str, pa.Array] = {}
        reasons: dict[int, str] = {}
        if settings.hash_column is not None:
            near, has, distance, names = self._by_hash(frame[settings.hash_column])
            made[EVAL_HASH_DISTANCE] = pa.array(distance, pa.int32(), mask=distance < 0)
            unknown |= ~has
            verdict |= near
            match[near] = names[near]
        if settings.embedding_column is not None:
            close, has, similarity, names, reasons = self._by_embedding(frame)
            made[EVAL_SIMILARITY] = pa.array(similarity, pa.float32(), mask=~has)
            unknown |= ~has
            verdict |= close
            match[close] = names[close]
        # One test that fails is enough; to pass, a row must have taken them all.
        made[CONTAMINATED] = pa.array(verdict, mask=unknown & ~verdict)
        made[EVAL_MATCH] = pa.array(match, pa.string())
        columns = {name: backend.series_of(made[name], frame.index) for name in settings.outputs}
        columns[schema.IMAGE_ERROR] = _reasons(frame, reasons)
        return pd.DataFrame(columns, index=frame.index)

    def _by_embedding(self, frame: pd.DataFrame) -> tuple[Any, Any, Any, Any, dict[int, str]]:
        """Return which rows are close, which could be compared, their similarity, whom to, and reasons."""
        count, settings, evaluation = len(frame), self.settings, self.evaluation
        close, has = np.zeros(count, bool), np.zeros(count, bool)
        similarity, names = np.zeros(count, np.float32), np.full(count, None, object)
        column = settings.embedding_column
        assert column is not None
        if frame[column].isna().all():
            return close, has, similarity, names, {}
        matrix, rows, _, reasons = usable_vectors(frame[[column]], column, evaluation.size)
        known, named = _loaded(evaluation, self.storage_options)
        fixed = known.count
        with threads.torch_threads(threads.task_share()):
            found = judge(
                Beside(known, matrix),
                [1 - settings.eps],
                representative=True,
                fixed=fixed,
                silent=np.arange(fixed + len(rows)) >= fixed,
                block_rows=BLOCK_ROWS[self.device],
                device=self.device,
            )
        # The rows to compare are silent: their twins are all of the evaluation set.
        best, twin = found.similarity[0, fixed:], found.twin[0, fixed:]
        near = (best.astype(np.float64) >= 1 - settings.eps) & (twin >= 0)
        has[rows], similarity[rows], close[rows] = True, best, near
        names[rows[near]] = named.take(pa.array(twin[near])).to_pylist()
        return close, has, similarity, names, reasons

    def _by_hash(self, column: pd.Series) -> tuple[Any, Any, Any, Any]:
        """Return which rows are near, which have a hash, their distance, and whom to."""
        texts = backend.arrow_values(column)
        has = np.asarray(texts.is_valid()).astype(bool)
        distance, names = np.full(len(has), -1, np.int32), np.full(len(has), None, object)
        rows = np.flatnonzero(has)
        hashes = hashes_from_hex(texts.take(pa.array(rows)).cast(pa.string()))
        told = ~np.isin(hashes, FLAT)
        url = files.join(self.evaluation.folder, HASHES)
        spec = ModelSpec("evaluation hashes", url, self.evaluation.digest, "uint64", "cpu")
        table = get_model(spec, lambda: parquet.read_table(url, [HASH, NAME], self.storage_options).combine_chunks())
        bits, which = nearest_hashes(hashes[told], table[HASH].to_numpy(), self.settings.max_distance)
        distance[rows[told]] = bits
        near = distance >= 0
        names[near] = table[NAME].take(pa.array(which[bits >= 0])).to_pylist()
        return near, has, distance, names

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("MarkContaminated", self.evaluation.folder, self.evaluation.digest, repr(self.settings), self.device)


class Beside:
    """The vectors of an evaluation set, and behind them those of rows, in memory."""

    def __init__(self, known: Vectors, matrix: Floats) -> None:
        self._known = known
        self._own = MemoryVectors(matrix)
        self.count = known.count + len(matrix)
        self.size = known.size

    def rows(self, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` (not included)."""
        first = self._known.count
        if stop <= first:
            return self._known.rows(start, stop)
        if start >= first:
            return self._own.rows(start - first, stop - first)
        return np.concatenate([self._known.rows(start, first), self._own.rows(0, stop - first)])

    def take(self, indices: Indices) -> Floats:
        """Return the rows at `indices`, which ascend."""
        first = self._known.count
        cut = int(np.searchsorted(indices, first))
        if cut == len(indices):
            return self._known.take(indices)
        if cut == 0:
            return self._own.take(indices - first)
        return np.concatenate([self._known.take(indices[:cut]), self._own.take(indices[cut:] - first)])


def nearest_hashes(
    hashes: Hashes, references: Hashes, max_distance: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Find the nearest reference of each hash.

    Parameters
    ----------
    hashes : ndarray of uint64, shape (n,)
    references : ndarray of uint64, shape (m,)
    max_distance : int
        Bits, 0 to 64.

    Returns
    -------
    distance : ndarray of int32, shape (n,)
        Bits; -1 where no reference is within `max_distance`.
    which : ndarray of int64, shape (n,)
        The reference, the first of equally near ones; -1 where there is none.
    """
    moved = spread(np.concatenate([references, hashes]))
    places = np.arange(len(references))
    best = np.full(len(hashes), _NONE)
    open_ = np.arange(len(hashes))
    # The radius grows, so that a hash with a close neighbour is not compared with all of its distant ones.
    radius = 0
    while len(open_):
        for query, reference, distance in near_pairs(moved, len(references) + open_, places, radius):
            np.minimum.at(best, open_[query], distance << 32 | reference)
        open_ = open_[best[open_] == _NONE]
        if radius == max_distance:
            break
        radius = min(max(1, 2 * radius), max_distance)
    found = best != _NONE
    return np.where(found, best >> 32, -1).astype(np.int32), np.where(found, best & _LOW, -1)


def _loaded(evaluation: EvaluationSet, storage_options: Any) -> tuple[Vectors, pa.Array]:
    """Return the vectors of an evaluation set and their names, one copy in a process: in memory if they fit."""

    def load() -> tuple[Vectors, pa.Array]:
        table = parquet.read_table(files.join(evaluation.folder, NAMES), [NAME], storage_options)
        return _vectors(evaluation, storage_options), table[NAME].combine_chunks()

    spec = ModelSpec("evaluation vectors", evaluation.folder, evaluation.digest, "float32", "cpu")
    return get_model(spec, load)


def _vectors(evaluation: EvaluationSet, storage_options: Any) -> Vectors:
    url = files.join(evaluation.folder, VECTORS)
    shape = (evaluation.vectors, evaluation.size)
    fs, path = files.open_fs(url, storage_options)
    if shape[0] * shape[1] * 4 <= MEMORY_BYTES:
        return MemoryVectors(np.frombuffer(files.read_bytes(url, storage_options), "<f4").reshape(shape))
    if isinstance(fs, LocalFileSystem):
        return DiskVectors(path, 0, *shape)
    return LocalCopy(fs, path, *shape)


class LocalCopy(DiskVectors):
    """Vectors of a remote file, copied to a temporary one, which goes when nothing refers to it any more."""

    def __init__(self, fs: Any, path: str, count: int, size: int) -> None:
        file = tempfile.NamedTemporaryFile(prefix="nemo-image-evaluation-", dir=scratch_folder())  # noqa: SIM115
        fs.get_file(path, file.name)
        super().__init__(file.name, 0, count, size)
        object.__setattr__(self, "_file", file)


def _reasons(frame: pd.DataFrame, reasons: dict[int, str]) -> pd.Series:
    """Return ``image_error``: what was there, and behind it the reasons of vectors that are unusable."""
    own = [reasons.get(row) for row in range(len(frame))]
    made = pd.Series(own, frame.index, schema.arrow_dtype("string"))
    if schema.IMAGE_ERROR not in frame:
        return made
    before = frame[schema.IMAGE_ERROR].astype(made.dtype)
    return before.where(before.notna(), made)
