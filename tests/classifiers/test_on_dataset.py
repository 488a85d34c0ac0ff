"""Classifiers on real datasets: tars, Parquet, saving, resuming, and in an embedder's pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemo_image.classifiers import AestheticClassifier, ImageClassifier, NsfwClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import EmbeddingError, RunError
from tests.classifiers.makers import (
    aesthetic_state,
    nsfw_state,
    numpy_aesthetic,
    numpy_nsfw,
    unit_vectors,
)
from tests.makers import TINY_MODEL, make_dataset

SIZES = {"00000": 5, "00001": 3, "00002": 4}


def with_embeddings(folder: Path, vectors: np.ndarray, missing: tuple[int, ...] = ()) -> ImageTextPairDataset:
    """Write a dataset whose Parquet files already have an embedding column, null at the rows `missing`."""
    make_dataset(folder, SIZES)
    row = 0
    for name, size in SIZES.items():
        table = pq.read_table(folder / f"{name}.parquet")
        lists = [None if number in missing else vectors[number].tolist() for number in range(row, row + size)]
        row += size
        pq.write_table(
            table.append_column("image_embedding", pa.array(lists, pa.list_(pa.float32()))), folder / f"{name}.parquet"
        )
    return ImageTextPairDataset.from_webdataset(str(folder))


def test_both_heads_saved_in_place_and_resumed(
    scheduler: Any, tmp_path: Path, aesthetic_path: Path, nsfw_path: Path
) -> None:
    vectors = unit_vectors(12)
    dataset = with_embeddings(tmp_path / "data", vectors, missing=(6,))
    scored = NsfwClassifier(model_path=nsfw_path)(AestheticClassifier(model_path=aesthetic_path)(dataset))
    saved = scored.save_metadata()
    tables = [pq.read_table(tmp_path / "data" / f"{name}.parquet") for name in SIZES]
    table = pa.concat_tables([table.select(["key", "aesthetic_score", "nsfw_score"]) for table in tables])
    assert [field.type for field in table.schema][1:] == [pa.float32(), pa.float32()]
    for column, oracle, state in (
        ("aesthetic_score", numpy_aesthetic, aesthetic_state()),
        ("nsfw_score", numpy_nsfw, nsfw_state()),
    ):
        found = table[column].to_pylist()
        assert found.pop(6) is None
        np.testing.assert_allclose(found, np.delete(oracle(state, vectors), 6), rtol=0, atol=1e-4)
    assert saved.provenance.keys() == {"aesthetic_score", "nsfw_score"}
    assert saved.provenance["aesthetic_score"]["parents"] == {"image_embedding": None}


class Noting(ImageClassifier):
    """The mean of an embedding; notes in a file how many embeddings it was shown."""

    def __init__(self, note: Path, size: int, add: float = 0.0) -> None:
        super().__init__("noting", "image_embedding", "mean", "float32", -1, size)
        self.note = note
        self.add = add

    def load_model(self, device: str) -> Any:
        def model(embeddings: torch.Tensor) -> torch.Tensor:
            with self.note.open("a") as file:
                file.write(f"{len(embeddings)}\n")
            return embeddings.mean(dim=1) + self.add

        return model

    def shown(self) -> list[int]:
        counts = sorted(map(int, self.note.read_text().split())) if self.note.exists() else []
        self.note.unlink(missing_ok=True)
        return counts


def test_a_rerun_scores_nothing_again_and_other_values_all(tmp_path: Path) -> None:
    with_embeddings(tmp_path / "data", unit_vectors(12))
    classifier = Noting(tmp_path / "note", 768)

    def run(classifier: Noting) -> list[int]:
        classifier(ImageTextPairDataset.from_webdataset(str(tmp_path / "data"))).save_metadata()
        return classifier.shown()

    assert run(classifier) == [3, 4, 5]
    assert run(classifier) == []
    assert run(Noting(tmp_path / "note", 768, add=1.0)) == [3, 4, 5]


def test_a_filtered_frame_scores_the_rows_that_are_left(tmp_path: Path) -> None:
    vectors = unit_vectors(12)
    dataset = with_embeddings(tmp_path / "data", vectors)
    dataset.metadata = dataset.metadata[dataset.metadata["seed"].astype("int64") % 2 == 0].repartition(npartitions=1)
    classifier = Noting(tmp_path / "note", 768)
    frame = classifier(dataset).metadata.compute()
    np.testing.assert_allclose(frame["mean"].to_numpy(float), vectors[::2].astype(float).mean(axis=1), atol=1e-6)
    assert classifier.shown() == [6]


@pytest.mark.filterwarnings("ignore:.*is a random network.*")
class TestInAnEmbeddersPass:
    def embedder(self, *classifiers: ImageClassifier, **options: Any) -> TimmImageEmbedder:
        return TimmImageEmbedder(TINY_MODEL, autocast=False, classifiers=classifiers, **options)

    def size(self) -> int:
        import timm

        return int(timm.create_model(TINY_MODEL, num_classes=0).num_features)

    def test_scores_stand_beside_the_embeddings(self, scheduler: Any, tmp_path: Path) -> None:
        folder = make_dataset(tmp_path / "data", SIZES)
        classifier = Noting(tmp_path / "note", self.size())
        lazy = self.embedder(classifier)(ImageTextPairDataset.from_webdataset(str(folder)))
        assert not classifier.note.exists()
        saved = lazy.save_metadata(str(tmp_path / "out"))
        frame = saved.metadata.compute()
        means = [np.mean(vector, dtype=np.float64) for vector in frame["image_embedding"]]
        assert len(means) == 12
        np.testing.assert_allclose(frame["mean"].to_numpy(float), means, atol=1e-6)
        assert classifier.shown() == [3, 4, 5]
        parent = saved.provenance["mean"]["parents"]["image_embedding"]
        assert parent == saved.provenance["image_embedding"]

    def test_another_models_embeddings_are_refused_before_any_task(self, tmp_path: Path, aesthetic_path: Path) -> None:
        dataset = ImageTextPairDataset.from_webdataset(str(make_dataset(tmp_path / "data", SIZES)))
        with pytest.raises(EmbeddingError, match=f"{self.size()} numbers, made by model '{TINY_MODEL}'"):
            self.embedder(AestheticClassifier(model_path=aesthetic_path))(dataset)

    def test_its_saved_embeddings_are_refused_later(self, tmp_path: Path, aesthetic_path: Path) -> None:
        dataset = ImageTextPairDataset.from_webdataset(str(make_dataset(tmp_path / "data", SIZES)))
        saved = self.embedder()(dataset).save_metadata()
        with pytest.raises(EmbeddingError, match=f"made by model '{TINY_MODEL}'"):
            NsfwClassifier(model_path=aesthetic_path)(saved)


def test_embeddings_of_another_size_in_a_shard_fail_that_shard_by_name(tmp_path: Path, aesthetic_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", SIZES)
    for name, size in SIZES.items():
        table = pq.read_table(folder / f"{name}.parquet")
        vectors = unit_vectors(size, size=512 if name == "00001" else 768)
        column = pa.array(vectors.tolist(), pa.list_(pa.float32()))
        pq.write_table(table.append_column("image_embedding", column), folder / f"{name}.parquet")
    scored = AestheticClassifier(model_path=aesthetic_path)(ImageTextPairDataset.from_webdataset(str(folder)))
    with pytest.raises(RunError, match=r"00001: .*holds embeddings of 512 numbers") as caught:
        scored.save_metadata(max_failure_ratio=0.9)
    assert list(caught.value.failures) == ["00001"]
    assert "aesthetic_score" in pq.read_schema(folder / "00002.parquet").names
