"""Custom embedders: two methods overridden, and nothing else."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_image.backend import to_matrix
from nemo_image.classifiers import ImageClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import ImageEmbedder
from nemo_image.errors import RunError
from tests.makers import encoded, make_dataset, picture, sample, write_rows, write_tar

lock = threading.Lock()
loads: list[str] = []


class MeanColour(ImageEmbedder):
    """The mean colour of each picture, read by the standard library's own tar reader."""

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        with tarfile.open(tar_path) as tar:
            for info in tar:
                if info.name.endswith(".jpg"):
                    file = tar.extractfile(info)
                    assert file is not None
                    image = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                    yield image[None], [{"key": info.name.removesuffix(".jpg"), "more": 1}]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        with lock:
            loads.append(device)
        return lambda batch: batch.reshape(len(batch), -1, 3).mean(axis=1)


def colour(seed: int) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded(picture(seed), quality=90))).convert("RGB")
    return np.asarray(image).reshape(-1, 3).mean(axis=0)


@pytest.mark.in_process("watches or changes this process")
def test_two_methods_are_enough(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 4, "b": 3})
    loads.clear()
    done = MeanColour()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    frame = done.metadata.compute()
    matrix, rows = to_matrix(frame["image_embedding"])
    assert len(rows) == 7
    assert np.allclose(matrix, [colour(seed) for seed in frame["seed"]], atol=1e-3)
    assert loads == ["cpu"]


@pytest.mark.in_process("watches or changes this process")
def test_an_embedder_that_changes_itself_as_it_runs_loads_once(tmp_path: Path) -> None:
    class Counting(MeanColour):
        batches = 0

        def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, Any]]:
            for batch in super().load_dataset_shard(tar_path):
                self.batches += 1
                yield batch

    make_dataset(tmp_path, {"a": 4, "b": 3, "c": 2})
    loads.clear()
    Counting()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert loads == ["cpu"]


def test_a_constructor_that_does_not_call_ours(tmp_path: Path) -> None:
    class Own(MeanColour):
        def __init__(self) -> None:
            self.anything = 1

    make_dataset(tmp_path, {"a": 2})
    done = Own()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert done.metadata.compute()["image_embedding"].notna().all()


def test_options_of_the_base(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    embedder = MeanColour("mean colour", "colour", normalize_embeddings=True, embedding_dtype="float16")
    frame = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path))).metadata.compute()
    matrix, _ = to_matrix(frame["colour"])
    assert matrix.dtype == np.float16
    assert np.allclose(np.linalg.norm(matrix.astype(float), axis=1), 1, atol=1e-2)


def test_rows_that_the_loader_does_not_give(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000"), sample(1, "001")])
    write_rows(tmp_path / "a.parquet", {"key": ["001", "999"]})
    frame = MeanColour()(ImageTextPairDataset.from_webdataset(str(tmp_path))).metadata.compute()
    assert np.allclose(to_matrix(frame["image_embedding"])[0][0], colour(1), atol=1e-3)
    assert frame["image_error"].iloc[1].startswith("missing:")
    assert "'999'" in frame["image_error"].iloc[1]


def test_metadata_as_a_dict_of_lists(tmp_path: Path) -> None:
    class Columns(MeanColour):
        def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, Any]]:
            for batch, metadata in super().load_dataset_shard(tar_path):
                yield batch, {"key": [one["key"] for one in metadata]}

    make_dataset(tmp_path, {"a": 2})
    frame = Columns()(ImageTextPairDataset.from_webdataset(str(tmp_path))).metadata.compute()
    assert frame["image_embedding"].notna().all()


def test_metadata_without_the_id_names_what_is_missing(tmp_path: Path) -> None:
    class NoId(MeanColour):
        def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, Any]]:
            for batch, _ in super().load_dataset_shard(tar_path):
                yield batch, [{"name": "x"}]

    make_dataset(tmp_path, {"a": 2})
    with pytest.raises(RunError, match="'key'"):
        NoId()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()


def test_a_model_that_gives_another_shape(tmp_path: Path) -> None:
    class Flat(MeanColour):
        def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
            return lambda batch: np.zeros(5)

    make_dataset(tmp_path, {"a": 2})
    with pytest.raises(RunError, match=r"shape \(5,\)"):
        Flat()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()


def test_vectors_that_are_not_finite_are_reasons(tmp_path: Path) -> None:
    class Broken(MeanColour):
        def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
            return lambda batch: np.full((len(batch), 2), np.nan)

    make_dataset(tmp_path, {"a": 2})
    frame = Broken()(ImageTextPairDataset.from_webdataset(str(tmp_path))).metadata.compute()
    assert frame["image_embedding"].isna().all()
    assert frame["image_error"].str.startswith("embedding:").all()


def test_classifiers_score_in_the_same_pass(tmp_path: Path) -> None:
    class Redness(ImageClassifier):
        def __init__(self) -> None:
            super().__init__("redness", "image_embedding", "redness", "float32", -1, 3)

        def load_model(self, device: str) -> Callable[[Any], Any]:
            return lambda embeddings: embeddings[:, 0] / 255

    make_dataset(tmp_path, {"a": 3})
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    frame = MeanColour(classifiers=[Redness()])(dataset).save_metadata().metadata.compute()
    assert np.allclose(frame["redness"].astype(float), [colour(seed)[0] / 255 for seed in frame["seed"]], atol=1e-5)


def test_changed_code_is_computed_anew(tmp_path: Path) -> None:
    class Doubled(MeanColour):
        def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
            return lambda batch: 2 * batch.reshape(len(batch), -1, 3).mean(axis=1)

    make_dataset(tmp_path, {"a": 2})
    MeanColour()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    Doubled.__qualname__ = MeanColour.__qualname__
    Doubled.__module__ = MeanColour.__module__
    done = Doubled()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert np.allclose(
        to_matrix(done.metadata.compute()["image_embedding"])[0], [2 * colour(0), 2 * colour(1)], atol=1e-3
    )


def test_methods_that_are_not_overridden() -> None:
    with pytest.raises(NotImplementedError, match="load_dataset_shard"):
        ImageEmbedder().load_dataset_shard("a.tar")
    with pytest.raises(NotImplementedError, match="load_embedding_model"):
        ImageEmbedder().load_embedding_model("cpu")
