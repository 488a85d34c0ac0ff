"""Classifiers that users write."""

from __future__ import annotations

import threading
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import nemo_image.classifiers
from nemo_image.classifiers import ImageClassifier
from nemo_image.classifiers.base import ScorePartition
from nemo_image.errors import ArgumentError, EmbeddingError, ModelError
from tests.classifiers.makers import make_dataset, unit_vectors

SIZE = 6


class Mean(ImageClassifier):
    """The mean of an embedding, times a factor."""

    def __init__(self, pred_type: Any = "float32", batch_size: int = -1, factor: float = 1.0) -> None:
        super().__init__("mean", "image_embedding", "score", pred_type, batch_size, SIZE)
        self.factor = factor
        self.model: Any = None

    def load_model(self, device: str) -> Any:
        return lambda embeddings: embeddings.mean(dim=1) * self.factor


class Post(Mean):
    """As `Mean`, with a given last step."""

    def __init__(self, step: Any, pred_type: Any) -> None:
        super().__init__(pred_type)
        self.step = step

    def postprocess(self, series: pd.Series) -> pd.Series:
        return self.step(series)


def vectors(rows: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, SIZE)).astype(np.float32)


def scored(classifier: ImageClassifier, data: np.ndarray, **options: Any) -> pd.Series:
    return classifier(make_dataset(data, **options)).metadata.compute()[classifier.pred_column]


def _words(mean: np.ndarray) -> list[str]:
    return ["up" if x > 0 else "down" for x in mean]


def test_names() -> None:
    known = ["AestheticClassifier", "ImageClassifier", "NsfwClassifier", "ZeroShotTagger"]
    assert nemo_image.classifiers.__all__ == known


@pytest.mark.parametrize("batch_size", [-1, 1, 4, 100])
@pytest.mark.parametrize("npartitions", [1, 2])
def test_scores(batch_size: int, npartitions: int) -> None:
    data = vectors()
    found = scored(Mean(batch_size=batch_size), data, npartitions=npartitions)
    np.testing.assert_allclose(found.to_numpy(float), data.astype(np.float64).mean(axis=1), rtol=0, atol=1e-6)
    assert found.dtype == pd.ArrowDtype(pa.float32())


@pytest.mark.in_process("watches or changes this process")
def test_the_model_sees_float32_batches_of_the_size_asked_for() -> None:
    shapes: list[tuple[int, ...]] = []

    class Watch(Mean):
        def load_model(self, device: str) -> Any:
            def model(embeddings: torch.Tensor) -> torch.Tensor:
                assert embeddings.dtype == torch.float32
                assert not embeddings.requires_grad
                shapes.append(tuple(embeddings.shape))
                return embeddings[:, :1]  # (n, 1) is fine too

            return model

    data = vectors(10).astype(np.float16)
    found = scored(Watch(batch_size=4), data, dtype="float16")
    assert shapes == [(4, SIZE), (4, SIZE), (2, SIZE)]
    assert found.to_numpy(float).tolist() == data[:, 0].tolist()


@pytest.mark.parametrize(
    ("step", "pred_type", "arrow", "wanted"),
    [
        (lambda s: s, "float32", pa.float32(), lambda mean: [float(np.float32(x)) for x in mean]),
        (lambda s: s.astype("float64") * 2, "float64", pa.float64(), lambda mean: [2 * float(x) for x in mean]),
        (lambda s: (s > 0).astype(int), "int32", pa.int32(), lambda mean: [int(x > 0) for x in mean]),
        (lambda s: (s > 0).astype("Int8"), "int32", pa.int32(), lambda mean: [int(x > 0) for x in mean]),
        (lambda s: s > 0, "bool", pa.bool_(), lambda mean: [bool(x > 0) for x in mean]),
        (lambda s: (s > 0).map({True: "up", False: "down"}), "string", pa.string(), _words),
        (lambda s: pd.cut(s, [-9, 0, 9], labels=["down", "up"]), "string", pa.string(), _words),
        (lambda s: np.where(s > 0, "up", "down"), "str", pa.string(), _words),
    ],
)
@pytest.mark.parametrize("case", ["all", "nulls", "not finite"])
def test_postprocess_and_type(step: Any, pred_type: str, arrow: pa.DataType, wanted: Any, case: str) -> None:
    data = vectors(5)
    means = wanted(torch.tensor(data).mean(dim=1).numpy())
    if case == "all":
        found = scored(Post(step, pred_type), data)
    elif case == "nulls":
        found = scored(Post(step, pred_type), data, rows=[0, 2, 3, 4, 6], length=7)
        means = [means[0], None, *means[1:4], None, means[4]]
    else:
        data[1, 3] = np.nan
        found = scored(Post(step, pred_type), data)
        means[1] = None
    assert found.dtype == pd.ArrowDtype(arrow)
    assert pa.array(found).to_pylist() == means


def test_nan_predictions_become_null() -> None:
    found = scored(Post(lambda s: s.where(s > 0), "float32"), vectors(6))
    assert found.isna().tolist() == (vectors(6).mean(axis=1) <= 0).tolist()
    assert pa.array(found).null_count == found.isna().sum() > 0


def test_a_partition_without_embeddings_loads_no_model() -> None:
    class Never(Mean):
        def load_model(self, device: str) -> Any:
            pytest.fail("loaded")

    assert scored(Never(), np.zeros((0, SIZE), np.float32), rows=[], length=3).isna().all()
    assert scored(Never("string"), np.full((2, SIZE), np.nan, np.float32)).isna().all()
    assert len(scored(Never(), np.zeros((0, SIZE), np.float32))) == 0


def test_a_network_is_put_into_evaluation_mode() -> None:
    class Dropping(Mean):
        def load_model(self, device: str) -> Any:
            return torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Flatten(), _First())

    data = vectors(50)
    assert scored(Dropping(), data).to_numpy(np.float32).tolist() == data[:, 0].tolist()


class _First(torch.nn.Module):
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings[:, 0]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda e: e, r"the model gave shape \(9, 6\) for 9 embeddings"),
        (lambda e: e.mean(), r"the model gave shape \(\) for 9"),
        (lambda e: e[:4, 0], r"the model gave shape \(4,\) for 9"),
    ],
)
def test_a_model_of_the_wrong_shape(model: Any, says: str) -> None:
    class Wrong(Mean):
        def load_model(self, device: str) -> Any:
            return self.model

    classifier = Wrong()
    classifier.model = model
    with pytest.raises(ModelError, match=says):
        scored(classifier, vectors())


def test_a_postprocess_that_loses_rows() -> None:
    with pytest.raises(ModelError, match=r"postprocess gave \d values for 9 predictions"):
        scored(Post(lambda s: s[s > 0], "float32"), vectors())


def test_predictions_that_do_not_fit_their_type() -> None:
    with pytest.raises(ModelError, match="do not fit pred_type='int32'"):
        scored(Mean("int32"), vectors())


@pytest.mark.parametrize("pred_type", ["flaot32", "list<float>", 3])
def test_an_unknown_type(pred_type: Any) -> None:
    with pytest.raises(ArgumentError, match="pred_type"):
        Mean(pred_type)(make_dataset(vectors()))


def test_another_embedding_size() -> None:
    with pytest.raises(EmbeddingError, match=r"'image_embedding' holds embeddings of 5 numbers.*of 6 numbers"):
        scored(Mean(), unit_vectors(3, size=5))
    with pytest.raises(EmbeddingError, match=r"holds embeddings of 5 numbers, made by model 'm'"):
        Mean()(make_dataset(vectors(), made_by={"model": "m", "embedding_size": 5}))
    with pytest.raises(EmbeddingError, match=r"\(6,\)"):
        Mean().score(torch.zeros(SIZE), "cpu")


def test_base_methods_must_be_overridden() -> None:
    base = ImageClassifier("m", "image_embedding", "score", "float32", -1, SIZE)
    with pytest.raises(NotImplementedError, match="load_model"):
        scored(base, vectors())


@pytest.mark.in_process("watches or changes this process")
def test_calling_is_lazy_and_takes_a_copy() -> None:
    class Loud(Mean):
        def load_model(self, device: str) -> Any:
            loads.append(device)
            return super().load_model(device)

    loads: list[str] = []
    classifier = Loud(factor=2.0)
    lazy = classifier(make_dataset(vectors()))
    assert loads == []
    classifier.factor = 1000.0
    found = lazy.metadata.compute()["score"].to_numpy(float)
    np.testing.assert_allclose(found, 2 * vectors().astype(float).mean(axis=1), rtol=0, atol=1e-6)
    assert loads == ["cpu"]


def test_other_values_make_another_model() -> None:
    for factor in (1.0, 2.0, 1.0):
        found = scored(Mean(factor=factor), vectors()).to_numpy(float)
        np.testing.assert_allclose(found, factor * vectors().astype(float).mean(axis=1), rtol=0, atol=1e-6)


def test_many_tasks_load_one_copy() -> None:
    loads: list[str] = []

    class Counting(Mean):
        def load_model(self, device: str) -> Any:
            loads.append(device)
            return super().load_model(device)

    dataset = Counting()(make_dataset(vectors(64), npartitions=16))
    with dask.config.set(scheduler="threads", num_workers=8):
        dataset.metadata.compute()
    assert loads == ["cpu"]


def test_notes_that_a_model_keeps_do_not_make_it_another_one() -> None:
    class Keeping(Mean):
        loads = 0
        rows = 0

        def load_model(self, device: str) -> Any:
            self.loads += 1
            return self.run

        def run(self, embeddings: torch.Tensor) -> torch.Tensor:
            self.rows += len(embeddings)
            return torch.full((len(embeddings),), float(self.loads))

    classifier = Keeping()
    with dask.config.set(scheduler="synchronous"):
        assert set(scored(classifier, vectors(12), npartitions=4)) == {1.0}
    assert (classifier.loads, classifier.rows) == (0, 0)


def test_on_processes(scheduler: Any) -> None:
    found = Mean()(make_dataset(vectors(20), npartitions=4)).metadata["score"].compute()
    np.testing.assert_allclose(found.to_numpy(float), vectors(20).astype(float).mean(axis=1), rtol=0, atol=1e-6)


class TestToken:
    NOTEBOOK = """
import threading
from nemo_image.classifiers import ImageClassifier

LOCK = threading.Lock()

class Mine(ImageClassifier):
    guard = threading.Lock()

    def __init__(self, factor=1.0):
        super().__init__("mine", "image_embedding", "score", "float32", -1, 6)
        self.factor = factor
        self.lock = threading.Lock()

    def load_model(self, device):
        with LOCK, self.guard, self.lock:
            return lambda embeddings: embeddings.mean(dim=1) * self.factor

    def postprocess(self, series):
        return series + CONSTANT
"""

    def notebook(self, constant: str = "1") -> Any:
        """A class as a notebook's cell defines it: in `__main__`, without a source file."""
        cell: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(self.NOTEBOOK.replace("CONSTANT", constant), "<cell>", "exec"), cell)
        return cell["Mine"]

    def token(self, classifier: ImageClassifier) -> str:
        return dask.base.tokenize(ScorePartition(classifier))

    @pytest.mark.in_process("watches or changes this process")
    def test_a_notebook_class_that_refers_to_locks_works(self) -> None:
        found = scored(self.notebook()(), vectors()).to_numpy(float)
        np.testing.assert_allclose(found, vectors().astype(float).mean(axis=1) + 1, rtol=0, atol=1e-6)

    def test_the_control_dask_alone_cannot_hash_it(self) -> None:
        with pytest.raises(Exception, match="determin"):
            dask.base.tokenize(threading.Lock(), ensure_deterministic=True)

    def test_defined_again_it_is_the_same_and_with_other_code_it_is_not(self) -> None:
        first = self.token(self.notebook()())
        assert self.token(self.notebook()()) == first
        assert self.token(self.notebook("2")()) != first
        assert self.token(self.notebook()(factor=2.0)) != first

    def test_fingerprints_too(self) -> None:
        first = self.notebook()().fingerprint(None)
        assert first["operator"] == "__main__.Mine"
        assert self.notebook()().fingerprint(None) == first
        assert self.notebook("2")().fingerprint(None) != first
        assert self.notebook()(factor=2.0).fingerprint(None) != first

    def test_settings_are_part_of_the_token_but_not_of_the_fingerprint(self) -> None:
        one, other = Mean(), Mean(batch_size=2)
        assert self.token(one) != self.token(other)
        assert one.fingerprint(None) == other.fingerprint(None)


def test_repr_says_what_goes_where() -> None:
    assert repr(Mean()) == "Mean('mean', 'image_embedding' -> 'score')"
