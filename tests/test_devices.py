"""The device that workers have reaches what computes: models, scores, and the products of deduplication."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_image import backend
from nemo_image.classifiers import ImageClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import column_functions
from nemo_image.dedup import SemanticDedup
from nemo_image.dedup.clusters import assign, sample, solve
from nemo_image.embedders import ImageEmbedder, TimmImageEmbedder
from nemo_image.engine import device as device_
from nemo_image.engine.gpu_share import GpuShares
from tests.makers import TINY_MODEL, make_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is a random network.*"),
    pytest.mark.in_process("plans for GPUs that are not there"),
]


class Own(ImageEmbedder):
    """An embedder of the user's."""

    def __init__(self) -> None:
        super().__init__("own")

    def load_dataset_shard(self, tar_path: str) -> Iterator[Any]:
        yield np.eye(3, 4, dtype=np.float32), [{"key": f"{number:06d}"} for number in range(3)]

    def load_embedding_model(self, device: str) -> Any:
        loaded_on.append(device)
        return lambda batch: batch + 1


class Sum(ImageClassifier):
    """A classifier of the user's."""

    def __init__(self) -> None:
        super().__init__("sum", "image_embedding", "total", "float32", -1, 4)

    def load_model(self, device: str) -> Any:
        return lambda vectors: vectors.sum(dim=1)


loaded_on: list[str] = []


@pytest.fixture
def dataset(tmp_path: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "in", {"a": 3}))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers with GPUs, seen from a client without."""
    for module in ("embedders.base", "embedders.network", "classifiers.base", "dedup.semantic_run"):
        monkeypatch.setattr(f"nemo_image.{module}.worker_device", lambda: "cuda")
    monkeypatch.setattr("nemo_image.dedup.clusters.clustering.worker_device", lambda: "cuda")
    monkeypatch.setattr(backend, "sees_gpu", lambda: False)


def planned(dataset: ImageTextPairDataset) -> dict[str, Any]:
    return {next(iter(one.outputs)): one.function for one in column_functions(dataset.metadata)}


def test_models(dataset: ImageTextPairDataset, gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Any] = []

    def on_a_worker(device: str, function: Any, *args: Any) -> str:
        probed.append((device, function.__name__))
        return "bfloat16"

    monkeypatch.setattr("nemo_image.embedders.prepared.where_device_is", on_a_worker)
    embedded = TimmImageEmbedder(TINY_MODEL)(dataset)
    work = planned(embedded)["image_embedding"]
    assert (work.device, work.embedder.device, work.embedder.dtype) == ("cuda", "cuda", "bfloat16")
    assert work.embedder.batch_of("cuda") == 256
    assert probed == [("cuda", "probe")]


def test_what_users_write(dataset: ImageTextPairDataset, gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_on.clear()
    shares = GpuShares()
    held: list[float] = []

    def share(gpus: float) -> Any:
        held.append(gpus)
        return shares.share(gpus)

    monkeypatch.setattr(device_, "gpu_share", share)
    embedded = Own()(dataset)
    assert planned(Sum()(embedded))["total"].device == "cuda"
    saved = embedded.save_metadata()
    assert loaded_on == ["cuda"]
    assert held == [1 / 4]
    matrix, _ = backend.to_matrix(saved.head()["image_embedding"])
    assert matrix[0].tolist() == [2, 1, 1, 1]


def test_deduplication(dataset: ImageTextPairDataset, gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def on_the_cpu(module: Any, name: str) -> None:
        real = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen[name] = kwargs["device"] if "device" in kwargs else args[3]
            return real(*args[:3], **{**kwargs, "device": "cpu"})

        monkeypatch.setattr(module, name, noted)

    for module, name in ((assign, "nearest_centroids"), (solve, "judge"), (sample, "fit_kmeans")):
        on_the_cpu(module, name)
    SemanticDedup(n_clusters=1, eps=0.1)(Own()(dataset))
    assert seen == {"nearest_centroids": "cuda", "judge": "cuda", "fit_kmeans": "cuda"}
