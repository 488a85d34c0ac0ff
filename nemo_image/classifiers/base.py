"""The classifier interface, and how any classifier is mapped over a dataset."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.engine import threads
from nemo_image.engine.device import worker_device
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.engine.tokens import behaviour_token
from nemo_image.errors import ArgumentError, EmbeddingError, ModelError

if TYPE_CHECKING:
    import torch

    from nemo_image.datasets import ImageTextPairDataset

Model = Callable[["torch.Tensor"], "torch.Tensor"]
Predictions = npt.NDArray[Any]


class ImageClassifier:
    """Adds a score of each image to a dataset, computed from its embedding.

    A custom classifier overrides :meth:`load_model`, and :meth:`postprocess` if its model's output is not yet the
    prediction.

    Parameters
    ----------
    model_name : str
        Names the model in fingerprints.
    embedding_column : str
        The column of embeddings to read.
    pred_column : str
        The column to add.
    pred_type : str or pyarrow.DataType
        Its type, after :meth:`postprocess`: ``"float32"``, ``"int32"``, ``"string"``, ``"bool"``, …
    batch_size : int
        Embeddings that the model sees at once; -1 for a whole partition.
    embedding_size : int
        The length of an embedding, in numbers.
    """

    # Attributes that change where and how fast predictions are made, not what they are.
    _settings: ClassVar[tuple[str, ...]] = ("embedding_column", "pred_column", "batch_size", "_planned")
    _planned: str | None = None

    def __init__(
        self,
        model_name: str,
        embedding_column: str,
        pred_column: str,
        pred_type: str | pa.DataType,
        batch_size: int,
        embedding_size: int,
    ) -> None:
        self.model_name = model_name
        self.embedding_column = embedding_column
        self.pred_column = pred_column
        self.pred_type = pred_type
        self.batch_size = batch_size
        self.embedding_size = embedding_size

    def load_model(self, device: str) -> Model:
        """Return a callable from embeddings, float32 (n, embedding_size), to predictions, (n,) or (n, 1).

        Called once in each worker process. A ``torch.nn.Module`` is put into evaluation mode afterwards.

        Parameters
        ----------
        device : str
            A torch device: ``"cpu"`` or ``"cuda"``. The embeddings will be on it.
        """
        raise NotImplementedError(f"{type(self).__name__} must override load_model(device)")

    def postprocess(self, series: pd.Series) -> pd.Series:
        """Turn the model's predictions into the column's values; the identity by default.

        Parameters
        ----------
        series : Series of float32
            One prediction for each row of a partition (or of a part of it) that has an embedding.

        Returns
        -------
        Series
            As many values, which fit `pred_type`.
        """
        return series

    def accepts_embedding(self, fingerprint: Mapping[str, Any]) -> bool:
        """Tell whether embeddings of this origin suit the model; any do by default.

        Not asked for a column that came with the data, of which nothing is known.
        `fingerprint` says what made the embeddings: ``model``, ``weights_sha256``, ``normalized``, …
        """
        return True

    def unusable(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Tell which embeddings cannot be scored: those with a number that is not finite. Their scores are null.

        Takes a float32 tensor (n, embedding_size), returns one of bool (n,).
        """
        return ~embeddings.isfinite().all(dim=1)

    def prepare(self) -> None:
        """Check on the client what can be checked, so that errors come before any task starts.

        Raises
        ------
        ArgumentError
            If an argument is unusable.
        """
        if self.batch_size != -1 and self.batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, or -1 for a whole partition, not {self.batch_size}")
        if self.embedding_size < 1:
            raise ArgumentError(f"embedding_size must be at least 1, not {self.embedding_size}")
        _ = self.pred_dtype

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the model's weights, where they are one known file."""
        return None

    @property
    def wanted_embedding(self) -> str:
        """Which embeddings the model takes, in words for error messages."""
        return f"embeddings of {self.embedding_size} numbers"

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the predictions added, lazily; null where a row has no embedding.

        Raises
        ------
        MissingColumnError
            If there is no column of embeddings.
        EmbeddingError
            If the embeddings are known to have another size, or another origin, than the model takes.
        ArgumentError, WeightsError
            If the classifier cannot work.
        """
        dataset.require_columns([self.embedding_column])
        kind = dataset.metadata.dtypes[self.embedding_column]
        # What an object column holds is seen in the task.
        if kind != np.dtype(object) and not backend.is_embedding_dtype(kind):
            raise self._unfit(f"holds {kind}")
        # A copy: what the user changes on the object later must not change what is already planned.
        classifier = copy.copy(self)
        made_by = dataset.provenance.get(self.embedding_column)
        if made_by is not None:
            classifier.check_origin(made_by)
        classifier.prepare()
        # Once: a model that keeps notes on the object as it runs stays the same model.
        classifier._planned = classifier._behaviour()
        return dataset.map_columns(
            ScorePartition(classifier, worker_device()),
            inputs=[self.embedding_column],
            outputs={self.pred_column: self.pred_dtype},
            fingerprints={self.pred_column: classifier.fingerprint(made_by)},
        )

    def fingerprint(self, embedding_fingerprint: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what makes the predictions: values for JSON. Call :meth:`prepare` first.

        Parameters
        ----------
        embedding_fingerprint : dict or None
            What made the embeddings; None where that is not known.
        """
        parent = None if embedding_fingerprint is None else dict(embedding_fingerprint)
        made = {
            "operator": type(self).__name__,
            "model": self.model_name,
            "weights_sha256": self.weights_sha256,
            "dtype": "float32",
            "pred_type": str(self.pred_type),
            "parents": {self.embedding_column: parent},
        }
        return made if self._is_ours() else made | {"operator": self._qualified_name(), "state": self._behaviour()}

    def score(self, embeddings: torch.Tensor, device: str) -> Predictions:
        """Return the predictions for embeddings, postprocessed.

        Parameters
        ----------
        embeddings : tensor of float, shape (n, embedding_size)
            On any device.
        device : str
            Where the model runs.

        Returns
        -------
        ndarray, shape (n,)
            NaN or None where an embedding is unusable.

        Raises
        ------
        EmbeddingError
            If the embeddings have another size than the model takes.
        ModelError
            If the model or :meth:`postprocess` gives something of the wrong shape.
        """
        import torch

        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise self._unfit(
                f"holds embeddings of {embeddings.shape[-1]} numbers (a tensor {tuple(embeddings.shape)})"
            )
        vectors = embeddings.to(device, torch.float32)
        good = ~self.unusable(vectors)
        count = int(good.sum())
        if not count:
            return np.full(len(vectors), np.nan, np.float32)
        model = get_model(self._spec(device), lambda: _evaluating(self.load_model(device)))
        # An autocast around an embedder must not reach the classifier.
        with torch.inference_mode(), torch.autocast(device.partition(":")[0], enabled=False):
            predictions = self._predict(model, vectors if count == len(vectors) else vectors[good])
        values = self._postprocessed(predictions)
        if count == len(vectors):
            return values
        floats = values.dtype.kind == "f"
        spread: Predictions = np.full(len(vectors), np.nan if floats else None, values.dtype if floats else object)
        spread[good.cpu().numpy()] = values
        return spread

    @property
    def pred_dtype(self) -> pd.ArrowDtype:
        """The dtype of the column to add."""
        try:
            return schema.arrow_dtype(self.pred_type)
        except (AttributeError, TypeError, ValueError) as error:
            raise ArgumentError(f"pred_type must name a type such as 'float32', not {self.pred_type!r}") from error

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ImageClassifier", *(getattr(self, name) for name in self._settings), self._behaviour())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name!r}, {self.embedding_column!r} -> {self.pred_column!r})"

    def check_origin(self, made_by: Mapping[str, Any]) -> None:
        """Check that the model takes embeddings with the fingerprint `made_by`.

        Raises
        ------
        EmbeddingError
            If they are of another size or origin.
        """
        by = f"made by model {made_by.get('model')!r}"
        size = made_by.get("embedding_size", self.embedding_size)
        if size != self.embedding_size:
            raise self._unfit(f"holds embeddings of {size} numbers, {by}")
        if not self.accepts_embedding(made_by):
            raise self._unfit(f"was {by}{'' if made_by.get('normalized', True) else ' without normalising'}")

    def _unfit(self, what: str) -> EmbeddingError:
        return EmbeddingError(
            f"column {self.embedding_column!r} {what}; {type(self).__name__} takes {self.wanted_embedding}"
        )

    def _predict(self, model: Model, vectors: torch.Tensor) -> Predictions:
        import torch

        made = []
        for part in torch.split(vectors, self.batch_size if self.batch_size > 0 else len(vectors)):
            output = torch.as_tensor(model(part))
            if tuple(output.shape) not in ((len(part),), (len(part), 1)):
                raise ModelError(
                    f"{type(self).__name__}: the model gave shape {tuple(output.shape)} for {len(part)} embeddings; "
                    f"one number each is needed: ({len(part)},) or ({len(part)}, 1)"
                )
            made.append(output.reshape(len(part)).float())
        predictions: Predictions = torch.cat(made).cpu().numpy()
        return predictions

    def _postprocessed(self, predictions: Predictions) -> Predictions:
        values = pd.Series(self.postprocess(pd.Series(predictions)))
        if len(values) != len(predictions):
            raise ModelError(
                f"{type(self).__name__}.postprocess gave {len(values)} values for {len(predictions)} predictions"
            )
        result: Predictions = values.to_numpy()
        return result

    def _spec(self, device: str) -> ModelSpec:
        weights = self.weights_sha256 or ""
        extra = () if weights and self._is_ours() else (self._behaviour(),)
        return ModelSpec(self._qualified_name(), self.model_name, weights, "float32", device, extra)

    def _is_ours(self) -> bool:
        return type(self).__module__.partition(".")[0] == __name__.partition(".")[0]

    def _qualified_name(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def _behaviour(self) -> str:
        if self._planned is not None:
            return self._planned
        bare = copy.copy(self)
        for name in self._settings:
            bare.__dict__.pop(name, None)
        return behaviour_token(bare)


class ScorePartition:
    """Scores the rows of a partition, with a classifier that is prepared."""

    row_by_row = True

    def __init__(self, classifier: ImageClassifier, device: str = "cpu") -> None:
        self.classifier = classifier
        self.device = device

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the prediction column for `frame`."""
        import torch

        classifier = self.classifier
        matrix, rows = backend.to_matrix(frame[classifier.embedding_column])
        values: Predictions = np.zeros(0, np.float32)
        if len(rows):
            # torch warns of memory that it must not write to, such as Arrow's.
            vectors = torch.from_numpy(matrix if matrix.flags.writeable else matrix.copy())
            # Alone, so that the last bits do not depend on the machine.
            with threads.torch_threads(1):
                values = classifier.score(vectors, self.device)
        return _column(classifier, values, rows, frame.index).to_frame()

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ScorePartition", self.classifier.__dask_tokenize__(), self.device)


def _column(
    classifier: ImageClassifier, values: Predictions, rows: npt.NDArray[np.int64], index: pd.Index
) -> pd.Series:
    """Return predictions for the positions `rows` of `index` as a column; NaN and None become null."""
    try:
        array = pa.array(values, from_pandas=True).cast(classifier.pred_dtype.pyarrow_dtype)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ModelError(
            f"{type(classifier).__name__}: predictions do not fit pred_type={str(classifier.pred_type)!r} ({error})"
        ) from error
    places = np.full(len(index), -1, np.int64)
    places[rows] = np.arange(len(rows))
    spread = array.take(pa.array(places, mask=places < 0))
    return pd.Series(pd.arrays.ArrowExtensionArray(spread), index=index, name=classifier.pred_column)


def _evaluating(model: Model) -> Model:
    evaluate = getattr(model, "eval", None)
    if callable(evaluate):
        evaluate()
    return model
