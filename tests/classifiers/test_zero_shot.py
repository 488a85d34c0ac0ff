"""Zero-shot tags, against plain numpy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nemo_image.classifiers import ZeroShotTagger
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import ArgumentError, EmbeddingError, MissingColumnError, RunError
from nemo_image.filters import KeepExpression
from tests.dedup.makers import computed, write_embeddings
from tests.makers import TINY_MODEL, make_dataset

SIZE = 24
PROMPTS = {
    "watermark": ["a photo with a watermark", "a stock photo"],
    "screenshot": "a screenshot",
    "photo": ["a photo", "a picture", "a snapshot"],
}


class Hashing:
    """A text tower that gives each text its own random unit vector."""

    def __init__(self, size: int = SIZE, made_by: dict[str, Any] | None = None) -> None:
        self.size = size
        self.made_by = made_by
        self.asked: list[str] = []

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        made = np.stack([np.random.default_rng(list(text.encode())).normal(size=self.size) for text in texts])
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    def fingerprint(self) -> dict[str, Any] | None:
        return self.made_by or {"model": "hashing", "weights_sha256": "ab"}


def vectors_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, SIZE)).astype(np.float32) * 3


def oracle(vectors: np.ndarray, prompts: dict[str, Any], temperature: float | None) -> dict[str, np.ndarray]:
    tags = []
    for texts in prompts.values():
        each = Hashing().embed_text([texts] if isinstance(texts, str) else texts).astype(np.float64)
        each /= np.linalg.norm(each, axis=1, keepdims=True)
        mean = each.mean(axis=0)
        tags.append(mean / np.linalg.norm(mean))
    cosines = (
        vectors.astype(np.float64) @ np.stack(tags).T / np.linalg.norm(vectors.astype(np.float64), axis=1)[:, None]
    )
    if temperature is not None:
        cosines = np.exp(cosines / temperature)
        cosines /= cosines.sum(axis=1, keepdims=True)
    return {f"tag_{tag}": cosines[:, number] for number, tag in enumerate(prompts)}


@pytest.fixture
def dataset(tmp_path: Path) -> ImageTextPairDataset:
    return write_embeddings(tmp_path / "data", list(vectors_of(50)))


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_softmax(dataset: ImageTextPairDataset, temperature: float, scheduler: Any) -> None:
    tagged = ZeroShotTagger(PROMPTS, Hashing(), temperature=temperature)(dataset).save_metadata()
    found = computed(tagged)
    for name, wanted in oracle(vectors_of(50), PROMPTS, temperature).items():
        np.testing.assert_allclose(found[name].to_numpy(float), wanted, rtol=1e-6, atol=1e-9)
        assert found[name].dtype == "float[pyarrow]"
    np.testing.assert_allclose(found[[f"tag_{tag}" for tag in PROMPTS]].sum(axis=1).astype(float), 1, atol=1e-6)


def test_cosine(dataset: ImageTextPairDataset) -> None:
    found = computed(ZeroShotTagger(PROMPTS, Hashing(), scores="cosine", column_prefix="like_")(dataset))
    for name, wanted in oracle(vectors_of(50), PROMPTS, None).items():
        np.testing.assert_allclose(found[name.replace("tag_", "like_")].to_numpy(float), wanted, rtol=0, atol=1e-7)


def test_a_list_of_prompts(dataset: ImageTextPairDataset) -> None:
    texts = ["A photo!", "a screen-shot of text"]
    tagger = ZeroShotTagger(texts, Hashing())
    assert tagger.columns == ["tag_a_photo", "tag_a_screen_shot_of_text"]
    found = computed(tagger(dataset))
    wanted = oracle(vectors_of(50), {"a": texts[0], "b": texts[1]}, 0.01)
    np.testing.assert_allclose(found["tag_a_photo"].to_numpy(float), wanted["tag_a"], rtol=1e-6, atol=1e-9)


def test_how_the_rows_lie_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name, shards, order in (("one", 1, None), ("many", 7, np.random.default_rng(0).permutation(50))):
        dataset = write_embeddings(tmp_path / name, list(vectors_of(50)), shards=shards, order=order)
        made.append(computed(ZeroShotTagger(PROMPTS, Hashing())(dataset)).drop(columns="shard"))
        monkeypatch.setattr("nemo_image.classifiers.zero_shot.BLOCK_ROWS", 3)
    pd.testing.assert_frame_equal(made[0], made[1])


def test_rows_without_a_usable_embedding_are_null(tmp_path: Path) -> None:
    good = vectors_of(50)[0]
    dataset = write_embeddings(tmp_path, [good, None, np.zeros(SIZE), np.full(SIZE, np.nan)], shards=1)
    found = computed(ZeroShotTagger(PROMPTS, Hashing())(dataset))
    assert found["tag_photo"].isna().tolist() == [False, True, True, True]
    nothing = write_embeddings(tmp_path / "none", [None, None], shards=1)
    assert computed(ZeroShotTagger(PROMPTS, Hashing())(nothing))["tag_photo"].isna().all()


def test_usable_in_an_expression(dataset: ImageTextPairDataset) -> None:
    frame = computed(ZeroShotTagger(PROMPTS, Hashing())(dataset))
    kept = KeepExpression("tag_watermark < 0.5")(frame)
    assert kept.tolist() == (oracle(vectors_of(50), PROMPTS, 0.01)["tag_watermark"] < 0.5).tolist()
    assert 0 < kept.sum() < 50


def test_finished_rows_are_taken_over(dataset: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = ZeroShotTagger(PROMPTS, Hashing())(dataset).save_metadata()

    def pending(**changes: Any) -> bool:
        arguments: dict[str, Any] = {"prompts": PROMPTS, "embedder": Hashing(), **changes}
        return bool(ZeroShotTagger(**arguments)(saved).pending_shards())

    assert not pending()
    assert pending(prompts={**PROMPTS, "screenshot": "a screen shot"})
    assert pending(temperature=0.02)
    assert pending(scores="cosine")
    assert pending(embedder=Hashing(made_by={"model": "hashing", "weights_sha256": "cd"}))
    assert ZeroShotTagger(PROMPTS, Hashing())(saved).provenance["tag_photo"]["text_model"]["model"] == "hashing"


def test_an_embedder_that_says_nothing_of_itself(dataset: ImageTextPairDataset) -> None:
    class Silent:
        def __init__(self, sign: int) -> None:
            self.sign = sign

        def embed_text(self, texts: Sequence[str]) -> np.ndarray:
            return self.sign * Hashing().embed_text(texts)

    one, two = (ZeroShotTagger(PROMPTS, Silent(sign))(dataset).provenance["tag_photo"] for sign in (1, -1))
    assert one != two


def test_prompts_are_embedded_once_on_the_client(dataset: ImageTextPairDataset) -> None:
    tower = Hashing()
    tagger = ZeroShotTagger(PROMPTS, tower)
    assert tower.asked == []
    tagged = tagger(dataset)
    assert len(tower.asked) == 6
    tagged.metadata.compute()
    assert len(tower.asked) == 6


def test_in_the_embedders_own_pass(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})
    plain = ImageTextPairDataset.from_webdataset(str(tmp_path))
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False)
    made_by = embedder(plain).provenance["image_embedding"]
    tagger = ZeroShotTagger(["a photo", "a screenshot"], Hashing(made_by["embedding_size"], made_by))
    in_one = TimmImageEmbedder(TINY_MODEL, autocast=False, classifiers=[tagger])(plain)
    found = computed(in_one.save_metadata(tmp_path / "one"))
    after = computed(tagger(embedder(plain).save_metadata(tmp_path / "two")))
    pd.testing.assert_series_equal(found["tag_a_photo"], after["tag_a_photo"])
    assert found["tag_a_photo"].notna().all()


def test_embeddings_of_another_model(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    made_by = dataset.provenance["image_embedding"]
    with pytest.raises(EmbeddingError, match="made by another model than the embedder given"):
        ZeroShotTagger(PROMPTS, Hashing())(dataset)
    with pytest.raises(EmbeddingError, match=f"embeddings of {made_by['embedding_size']} numbers, the prompts have 24"):
        ZeroShotTagger(PROMPTS, Hashing(SIZE, made_by))(dataset)


def test_embeddings_of_another_size_and_unknown_origin(dataset: ImageTextPairDataset) -> None:
    with pytest.raises(RunError, match="embeddings of 24 numbers, 7 are needed"):
        ZeroShotTagger(PROMPTS, Hashing(7))(dataset).save_metadata()


def test_columns_that_came_with_the_data_are_not_overwritten(tmp_path: Path) -> None:
    dataset = write_embeddings(tmp_path, list(vectors_of(3)), shards=1, tag_photo=[1, 2, 3])
    with pytest.raises(ArgumentError, match="column 'tag_photo' came with the data"):
        ZeroShotTagger(PROMPTS, Hashing())(dataset)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ({}, "prompts is empty"),
        ([], "prompts is empty"),
        ("a photo", "prompts must be a dict"),
        (3, "prompts must be a dict"),
        ({"a": [], "b": "x"}, "tag 'a' has no text"),
        ({"a": "  ", "b": "x"}, "tag 'a' needs texts"),
        ({"a": ["x", 3], "b": "x"}, "tag 'a' needs texts"),
        ({"not a name": "x", "b": "y"}, "would make the column 'tag_not a name'"),
        ({"": "x", "b": "y"}, "tag '' would make the column"),
        ({1: "x", "b": "y"}, "tag 1 would make the column"),
        (["A photo", "a photo."], "would both be column 'a_photo'"),
        (["!!", "a photo"], "tag '' would make the column"),
        ([3], "prompts must be texts, not 3"),
        ({"only": "x"}, "a softmax over one tag is always 1"),
    ],
)
def test_bad_prompts(prompts: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        ZeroShotTagger(prompts, Hashing())


def test_bad_arguments(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    for temperature in (0, -1, float("inf"), float("nan"), True, "x"):
        with pytest.raises(ArgumentError, match="temperature must be"):
            ZeroShotTagger(PROMPTS, Hashing(), temperature=temperature)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="scores must be"):
        ZeroShotTagger(PROMPTS, Hashing(), scores="probability")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="would make the column 'class'"):
        ZeroShotTagger({"class": "x", "b": "y"}, Hashing(), column_prefix="")
    with pytest.raises(ArgumentError, match=r"cannot embed texts: it has no embed_text"):
        ZeroShotTagger(PROMPTS, TimmImageEmbedder(TINY_MODEL))(dataset)
    with pytest.raises(MissingColumnError, match="no column 'other': run an embedder first"):
        ZeroShotTagger(PROMPTS, Hashing(), embedding_column="other")(dataset)


def test_a_single_tag_by_cosine(dataset: ImageTextPairDataset) -> None:
    found = computed(ZeroShotTagger({"cat": "a cat"}, Hashing(), scores="cosine")(dataset))
    wanted = oracle(vectors_of(50), {"cat": "a cat"}, None)["tag_cat"]
    np.testing.assert_allclose(found["tag_cat"].to_numpy(float), wanted, rtol=0, atol=1e-7)
