"""Scores by the published heads, and the thresholds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.errors import ArgumentError, EmbeddingError, WeightsError
from nemo_image.stages.base import RunContext, collecting_metrics
from nemo_image.stages.embedder import ImageEmbeddingStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.score_filters import ImageAestheticFilterStage, ImageNSFWFilterStage, ScoreFilterStage
from nemo_image.stages.tasks import FileGroup, ImageBatch
from tests.classifiers.makers import aesthetic_state, nsfw_state, numpy_aesthetic, numpy_nsfw
from tests.makers import TINY_MODEL

HEADS = {
    ImageAestheticFilterStage: (AestheticClassifier, "aesthetic_score", aesthetic_state, numpy_aesthetic),
    ImageNSFWFilterStage: (NsfwClassifier, "nsfw_score", nsfw_state, numpy_nsfw),
}
STAGES = list(HEADS)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of heads with seeded random weights, in the published layout and under the published names."""
    for classifier, _, make_state, _ in HEADS.values():
        torch.save(make_state(), tmp_path / classifier.source.filename)
        monkeypatch.setattr(classifier, "source", dataclasses.replace(classifier.source, sha256=None))
    return str(tmp_path)


def batch(count: int = 40) -> ImageBatch:
    vectors = np.random.default_rng(3).standard_normal((count, 768)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ImageBatch([ImageObject(image_id=str(row), embedding=vector) for row, vector in enumerate(vectors)])


def prepared(one: ScoreFilterStage) -> ScoreFilterStage:
    made = one.prepare(RunContext("test"))
    made.connect([], [])
    return made


@pytest.mark.parametrize("kind", STAGES)
def test_scores_are_those_of_the_network(kind: Any, models: str) -> None:
    _, column, make_state, oracle = HEADS[kind]
    task = batch()
    expected = oracle(make_state(), np.stack([image.embedding for image in task.data])).ravel()
    made = prepared(kind(model_dir=models, filter=False)).process(task)
    assert len(made.data) == 40
    assert np.allclose([getattr(image, column) for image in made.data], expected, atol=1e-4)


@pytest.mark.parametrize("kind", STAGES)
def test_the_right_side_of_the_threshold_stays(kind: Any, models: str) -> None:
    column = HEADS[kind][1]
    scores = {
        one.image_id: getattr(one, column)
        for one in prepared(kind(model_dir=models, filter=False)).process(batch()).data
    }
    threshold = sorted(scores.values())[20]
    made = prepared(kind(model_dir=models, score_threshold=threshold)).process(batch())
    is_kept = (
        (lambda value: value >= threshold) if kind is ImageAestheticFilterStage else (lambda value: value < threshold)
    )
    expected = [name for name, value in scores.items() if is_kept(value)]
    assert [one.image_id for one in made.data] == expected
    assert len(expected) == 20


@pytest.mark.parametrize("kind", STAGES)
def test_images_without_embedding_have_no_score_and_are_dropped(kind: Any, models: str) -> None:
    task = batch(3)
    task.data[1].embedding = None
    one = prepared(kind(model_dir=models, filter=False))
    made = one.process(task)
    assert [getattr(image, HEADS[kind][1]) is None for image in made.data] == [False, True, False]
    with collecting_metrics() as metrics:
        lenient = prepared(kind(model_dir=models, score_threshold=1.0))
        kept = lenient.process(task)
    assert "1" not in [image.image_id for image in kept.data]
    assert metrics[one.name]["dropped without score"] == 1


def test_a_batch_of_nothing(models: str) -> None:
    assert prepared(ImageAestheticFilterStage(model_dir=models)).process(ImageBatch([])).data == []


def test_real_embeddings_rise_with_their_rating(shared: Path) -> None:
    found = sorted((shared / "weights" / "clip_l14_rating_embeddings").glob("*.npy"))
    assert found
    one = prepared(ImageAestheticFilterStage(model_dir=str(shared / "weights"), filter=False))
    means = []
    for path in found:
        vectors = np.load(path).reshape(-1, 768).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        made = one.process(ImageBatch([ImageObject(embedding=vector) for vector in vectors]))
        means.append(np.mean([image.aesthetic_score for image in made.data]))
    assert means[-1] > means[0] + 1


@pytest.mark.parametrize(("threshold", "said"), [(0.5, "keeps nearly all"), (11, "keeps none"), (5, None), (1, None)])
def test_thresholds_off_the_aesthetic_scale_warn(
    threshold: float, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ImageAestheticFilterStage(score_threshold=threshold)
    assert [said in record.message for record in caplog.records] == ([] if said is None else [True])
    caplog.clear()
    ImageAestheticFilterStage(score_threshold=threshold, filter=False)
    assert not caplog.records


def test_defaults_keep_what_spec_says() -> None:
    assert ImageAestheticFilterStage().score_threshold == 5.0
    assert ImageNSFWFilterStage().score_threshold == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageNSFWFilterStage(score_threshold=1.5), r"score_threshold=1\.5: NSFW scores lie from 0 to 1"),
        (lambda: ImageNSFWFilterStage(score_threshold=-0.1), "NSFW scores"),
        (lambda: ImageAestheticFilterStage(score_threshold=float("nan")), "score_threshold must be a number"),
        (lambda: ImageAestheticFilterStage(score_threshold="5"), "score_threshold must be a number"),  # type: ignore[arg-type]
        (lambda: ImageAestheticFilterStage(model_inference_batch_size=0), "model_inference_batch_size"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_embeddings_of_another_model_are_refused(models: str) -> None:
    embedder = ImageEmbeddingStage(model_name=TINY_MODEL, random_weights=True, autocast=False).prepare(
        RunContext("test")
    )
    with pytest.raises(EmbeddingError, match="takes L2-normalised CLIP ViT-L/14"):
        ImageAestheticFilterStage(model_dir=models).prepare(RunContext("test")).connect([embedder], [])


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip_autokeras_binary_nsfw.pth").write_text("not weights")
    with pytest.raises(WeightsError, match="clip_autokeras_binary_nsfw"):
        ImageNSFWFilterStage(model_dir=str(tmp_path)).prepare(RunContext("test"))


@pytest.mark.parametrize("verbose", [True, False])
def test_a_line_a_file_group_on_request(models: str, verbose: bool, caplog: pytest.LogCaptureFixture) -> None:
    one = prepared(ImageAestheticFilterStage(model_dir=models, filter=False, verbose=verbose))
    embedder = ImageEmbeddingStage(model_name=TINY_MODEL, random_weights=True, autocast=False, verbose=verbose)
    with caplog.at_level("INFO", "nemo_image"):
        list(one.stream(iter([batch(3), batch(2)]), FileGroup(name="g")))
        list(embedder.prepare(RunContext("test")).stream(iter([ImageBatch([])]), FileGroup(name="g")))
    said = [record.message for record in caplog.records if ": g: " in record.message]
    expected = ["image_aesthetic_filter: g: 5 of 5 images kept", "image_embedding: g: 0 images"]
    assert said == (expected if verbose else [])
