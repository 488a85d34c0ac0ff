"""The embedder interface, and how any embedder is mapped over a dataset."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine import threads
from nemo_image.engine.device import Device, computing_on, task_device, worker_device
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.engine.tokens import behaviour_token
from nemo_image.errors import ArgumentError, ShardError
from nemo_image.shards.keys import match_ids

FloatMatrix = npt.NDArray[np.floating[Any]]
Columns = Mapping[str, Sequence[Any]]
"""Columns of metadata: a value a row."""

_Vectors = list[tuple[FloatMatrix, npt.NDArray[np.int64]]]


@dataclass
class ShardEmbeddings:
    """What an embedder found for some rows of a shard.

    Attributes
    ----------
    matrix : ndarray of float, shape (n, size)
        The embeddings, of as many rows as have one.
    rows : ndarray of int64, shape (n,)
        The position of each among the rows asked for, in any order.
    errors : dict of int to str
        Reason by position, for rows without an embedding.
    widths, heights : dict of int to int
        Size of the stored image in pixels, by position.
    vectors : dict of str to (ndarray, ndarray)
        Further columns of vectors, each as a matrix and its rows, like `matrix` and `rows`.
    values : dict of str to dict of int to number
        Further columns of numbers, by position.
    """

    matrix: FloatMatrix
    rows: npt.NDArray[np.int64]
    errors: dict[int, str] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)
    heights: dict[int, int] = field(default_factory=dict)
    vectors: dict[str, tuple[FloatMatrix, npt.NDArray[np.int64]]] = field(default_factory=dict)
    values: dict[str, Mapping[int, float]] = field(default_factory=dict)


class ImageEmbedder:
    """Adds an embedding of each image to a dataset.

    A custom embedder overrides :meth:`load_dataset_shard` and :meth:`load_embedding_model`, and nothing else.

    Parameters
    ----------
    model_name : str
        Names the model in fingerprints.
    image_embedding_column : str, default "image_embedding"
        The column to add.
    classifiers : iterable of ImageClassifier
        Score the embeddings in the same pass.
    normalize_embeddings : bool, default False
        Whether to divide each embedding by its L2 norm.
    embedding_dtype : {"float32", "float16"}
        The precision in which embeddings are kept.
    """

    # Class attributes, so that a subclass whose constructor does not call this one works too.
    model_name: str = ""
    image_embedding_column: str = schema.IMAGE_EMBEDDING
    classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]] = ()
    normalize_embeddings: bool = False
    embedding_dtype: str = "float32"
    adds_sizes: bool = False
    input_columns: Sequence[str] = ()
    """Columns of metadata that `embed_rows` is given, as a further argument."""
    _planned: str | None = None

    def __init__(
        self,
        model_name: str = "",
        image_embedding_column: str = schema.IMAGE_EMBEDDING,
        classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]] = (),
        *,
        normalize_embeddings: bool = False,
        embedding_dtype: str = "float32",
    ) -> None:
        self.model_name = model_name
        self.image_embedding_column = image_embedding_column
        self.classifiers = tuple(classifiers)
        self.normalize_embeddings = normalize_embeddings
        self.embedding_dtype = embedding_dtype

    # To override -----------------------------------------------------------------------------------------------------

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, Sequence[Mapping[str, Any]]]]:
        """Yield ``(batch, metadata)`` over a shard.

        Parameters
        ----------
        tar_path : str
            The shard's tar.

        Yields
        ------
        batch : object
            Whatever the model takes.
        metadata : list of dict
            One a sample of the batch, each with the dataset's ``id_col``.
        """
        raise NotImplementedError(f"{type(self).__name__} must override load_dataset_shard(tar_path)")

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Return a callable that turns a batch into embeddings of shape (n, size).

        Called once in each worker process.

        Parameters
        ----------
        device : str
            A torch device: ``"cpu"`` or ``"cuda"``.
        """
        raise NotImplementedError(f"{type(self).__name__} must override load_embedding_model(device)")

    # May be overridden -----------------------------------------------------------------------------------------------

    def prepare(self, dataset: ImageTextPairDataset) -> ImageEmbedder:
        """Check on the client what can be checked, before any task starts; return the embedder to run.

        Raises
        ------
        ArgumentError
            If an argument is unusable.
        """
        if self.embedding_dtype not in schema.EMBEDDING_TYPES:
            raise ArgumentError(f"embedding_dtype must be 'float32' or 'float16', not {self.embedding_dtype!r}")
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes the embedding column: values for JSON."""
        return {
            "operator": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": self.model_name,
            "state": behaviour_token(self if self._planned is not None else self._as_planned()),
            "normalized": self.normalize_embeddings,
            "embedding_dtype": self.embedding_dtype,
        }

    def further_columns(self, dataset: ImageTextPairDataset) -> dict[str, tuple[Any, dict[str, Any]]]:
        """Return the dtype and the fingerprint of each column that is added besides the embedding."""
        return {}

    def settled_as(self, made_by: Mapping[str, Any]) -> ImageEmbedder | None:
        """Return the embedder with the fingerprint `made_by`, if a probe is all that tells it from this one."""
        return None

    def embed_rows(
        self, source: DatasetSource, shard: str, ids: Sequence[Any], columns: Columns | None = None
    ) -> ShardEmbeddings:
        """Embed the rows of one shard that have the ids given, and `input_columns`' values in `columns`."""
        model = self._model(task_device())
        seen: dict[int, npt.NDArray[Any]] = {}
        for batch, metadata in self.load_dataset_shard(source.tar_url(shard)):
            names = _ids_of(metadata, source.id_col, type(self).__name__)
            wanted = match_ids([*ids], [str(name) for name in names])
            hits = [(row, place) for row, place in enumerate(wanted) if place >= 0 and row not in seen]
            if not hits:
                continue
            made = as_matrix(model(batch), len(names), type(self).__name__)
            seen |= {row: made[place] for row, place in hits}
            if len(seen) == len(ids):
                break
        rows = np.array(sorted(seen), np.int64)
        matrix = np.stack([seen[row] for row in rows]) if len(rows) else np.zeros((0, 0), np.float32)
        missing = sorted(set(range(len(ids))) - set(seen))
        errors = {
            row: f"missing: load_dataset_shard gave no sample with {source.id_col} {ids[row]!r}" for row in missing
        }
        return finished(matrix, rows, errors, normalize=self.normalize_embeddings)

    # Final -----------------------------------------------------------------------------------------------------------

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the embedding (and the classifiers' scores) added, lazily.

        Adds ``image_error`` too, and ``width`` and ``height`` where the dataset has no columns of those names.
        """
        # A copy: what the user changes on the object later, or the object itself while it runs, changes no plan.
        embedder = self.prepare(dataset)._as_planned()
        made = embedder.fingerprint()
        further = embedder.further_columns(dataset)
        outputs: dict[str, Any] = {self.image_embedding_column: schema.list_dtype(self.embedding_dtype)}
        outputs |= {name: dtype for name, (dtype, _) in further.items()}
        if self.adds_sizes:
            added = [name for name in (schema.WIDTH, schema.HEIGHT) if may_add(dataset, name)]
            outputs |= {name: schema.arrow_dtype("int32") for name in added}
        outputs[schema.IMAGE_ERROR] = schema.arrow_dtype("string")
        result = dataset.map_columns(
            EmbedPartition(embedder, dataset.source, outputs, worker_device()),
            inputs=embedder.input_columns,
            outputs=outputs,
            fingerprints={name: further[name][1] if name in further else made for name in outputs},
            reads_images=True,
        )
        for classifier in self.classifiers:
            result = classifier(result)
        return result

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ImageEmbedder", behaviour_token(self))

    def _as_planned(self) -> ImageEmbedder:
        """Return a copy that knows what it was when its work was planned."""
        embedder = copy.copy(self)
        embedder._planned = behaviour_token(embedder)
        return embedder

    def _model(self, device: str) -> Callable[[Any], Any]:
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        token = self._planned or behaviour_token(self)
        spec = ModelSpec(kind=name, name=self.model_name, weights_sha256=token, dtype="", device=device)
        return get_model(spec, lambda: self.load_embedding_model(device))


class EmbedPartition:
    """Embeds the rows of a partition, shard by shard."""

    def __init__(
        self, embedder: ImageEmbedder, source: DatasetSource, outputs: Mapping[str, Any], device: Device = "cpu"
    ) -> None:
        self.embedder = embedder
        self.source = source
        self.outputs = dict(outputs)
        self.device: Device = device
        # An embedder that reads whole shards would read them again for each piece.
        self.row_by_row = type(embedder).embed_rows is not ImageEmbedder.embed_rows

    def settled_as(self, made_by: Mapping[str, Any]) -> EmbedPartition | None:
        """Return the same with the embedder that made earlier results, if only what it settles by a probe differs."""
        embedder = self.embedder.settled_as(made_by)
        return None if embedder is None else EmbedPartition(embedder, self.source, self.outputs, self.device)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the embedder's columns for `frame`.

        A shard that cannot be read marks its rows instead of raising, so that the other shards' rows of the
        partition are not lost with it; saving turns the mark into a failed shard.
        """
        index = frame.index
        vectors: dict[str, _Vectors] = defaultdict(list)
        values: dict[str, dict[int, float]] = defaultdict(dict)
        errors: dict[int, str] = {}
        for shard, places in rows_by_shard(frame).items():
            try:
                with threads.torch_threads(threads.task_share()), computing_on(self.device):
                    found = self._embed(shard, frame, places)
            except ShardError as error:
                errors |= dict.fromkeys(places.tolist(), f"{schema.SHARD_FAILED}: {error}")
                continue
            errors |= {int(places[row]): reason for row, reason in found.errors.items()}
            made = {self.embedder.image_embedding_column: (found.matrix, found.rows), **found.vectors}
            for name, (matrix, rows) in made.items():
                vectors[name].append((matrix, places[rows]))
            numbers = {schema.WIDTH: found.widths, schema.HEIGHT: found.heights, **found.values}
            for name, by_row in numbers.items():
                values[name] |= {int(places[row]): value for row, value in by_row.items()}
        columns = {}
        for name, dtype in self.outputs.items():
            by_place: Mapping[int, Any] = errors if name == schema.IMAGE_ERROR else values[name]
            if pa.types.is_list(dtype.pyarrow_dtype):
                columns[name] = self._column(vectors[name], index)
            else:
                columns[name] = pd.Series([by_place.get(row) for row in range(len(index))], index, dtype)
        return pd.DataFrame(columns, index=index)

    def _embed(self, shard: str, frame: pd.DataFrame, places: npt.NDArray[np.int64]) -> ShardEmbeddings:
        ids = frame[self.source.id_col].iloc[places].tolist()
        wanted = self.embedder.input_columns
        if not wanted:  # embedders that users wrote take three arguments
            return self.embedder.embed_rows(self.source, shard, ids)
        columns = {name: backend.arrow_values(frame[name].iloc[places]).to_pylist() for name in wanted}
        return self.embedder.embed_rows(self.source, shard, ids, columns)

    def _column(self, vectors: _Vectors, index: pd.Index) -> pd.Series:
        filled = [(matrix, places) for matrix, places in vectors if len(places)]
        if not filled:
            nothing = np.zeros((0, 0), np.float32)
            return backend.to_column(nothing, index, np.array([], np.int64), self.embedder.embedding_dtype)
        matrix, places = filled[0]
        if len(filled) > 1:
            matrix = np.concatenate([one for one, _ in filled])
            places = np.concatenate([one for _, one in filled])
        if (np.diff(places) < 0).any():
            order = np.argsort(places)
            matrix, places = matrix[order], places[order]
        return backend.to_column(matrix, index, places, self.embedder.embedding_dtype)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("EmbedPartition", self.embedder.__dask_tokenize__(), self.source.__dask_tokenize__(), str(self.outputs))


def finished(
    matrix: FloatMatrix, rows: npt.NDArray[np.int64], errors: dict[int, str], *, normalize: bool
) -> ShardEmbeddings:
    """Return embeddings with those that are zero or not finite taken out, and normalised (in place) if asked for."""
    if not len(rows):
        return ShardEmbeddings(matrix, rows, errors)
    # In float64, but with no copy of the matrix: a shard's embeddings may take most of the memory that there is.
    norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    good = np.isfinite(norms) & ((norms > 0) | (not normalize))
    for row, norm in zip(rows[~good], norms[~good], strict=True):
        errors[int(row)] = f"embedding: the model gave a vector of norm {norm}"
    if not good.all():
        matrix, rows, norms = matrix[good], rows[good], norms[good]
    if normalize:
        np.divide(matrix, norms[:, None], out=matrix, casting="same_kind")
    return ShardEmbeddings(matrix, rows, errors)


def as_matrix(made: Any, length: int, who: str) -> FloatMatrix:
    """Return a model's output as a float32 matrix of `length` rows.

    Raises
    ------
    ArgumentError
        If it has another shape.
    """
    if hasattr(made, "detach"):
        made = made.detach().float().cpu().numpy()
    matrix = np.asarray(made, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != length:
        raise ArgumentError(f"{who}: the model gave an array of shape {matrix.shape} for a batch of {length} images")
    return matrix


def _ids_of(metadata: Any, id_col: str, who: str) -> list[Any]:
    """Return the batch's ids from a list of dicts, or from a dict of lists."""
    try:
        if isinstance(metadata, Mapping):
            return list(metadata[id_col])
        return [one[id_col] for one in metadata]
    except (KeyError, TypeError) as error:
        raise ArgumentError(
            f"{who}.load_dataset_shard: the metadata of a batch must be a list of dicts with the field {id_col!r} "
            "(id_col)"
        ) from error


def may_add(dataset: ImageTextPairDataset, name: str) -> bool:
    """Columns of the sizes' names that came with the data stay as they are; our own are made anew."""
    return name not in dataset.metadata.columns or name in dataset.provenance
