"""The two published classifiers over a dataset."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import urllib.parse
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch

from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.engine.model_cache import clear_models
from nemo_image.engine.weights import WeightsSource, sha256_file
from nemo_image.errors import ArgumentError, EmbeddingError, MissingColumnError, WeightsError
from tests.classifiers.makers import (
    StandIn,
    aesthetic_state,
    make_dataset,
    nsfw_state,
    numpy_aesthetic,
    numpy_nsfw,
    unit_vectors,
)

CLIP = {
    "operator": "TimmImageEmbedder",
    "model": "vit_large_patch14_clip_quickgelu_224.openai",
    "weights_sha256": "ab",
    "normalized": True,
    "embedding_size": 768,
}
BOTH = [
    pytest.param(AestheticClassifier, aesthetic_state, numpy_aesthetic, "aesthetic_score", id="aesthetic"),
    pytest.param(NsfwClassifier, nsfw_state, numpy_nsfw, "nsfw_score", id="nsfw"),
]


@pytest.mark.parametrize(
    ("classifier_class", "column"), [(AestheticClassifier, "aesthetic_score"), (NsfwClassifier, "nsfw_score")]
)
def test_published_arguments(classifier_class: Any, column: str) -> None:
    found = {name: one.default for name, one in inspect.signature(classifier_class).parameters.items()}
    assert found == {
        "embedding_column": "image_embedding",
        "pred_column": column,
        "batch_size": -1,
        "model_path": None,
    }


@pytest.mark.parametrize("classifier_class", [AestheticClassifier, NsfwClassifier])
def test_the_address_is_quoted(classifier_class: Any) -> None:
    source = classifier_class.source
    name = urllib.parse.urlsplit(source.url).path.rpartition("/")[2]
    assert "+" not in source.url
    assert source.member == source.filename if name.endswith(".zip") else urllib.parse.unquote(name) == source.filename


def test_the_published_sha256_is_that_of_the_shared_file(shared: Path) -> None:
    assert sha256_file(shared / "weights" / AestheticClassifier.source.filename) == AestheticClassifier.source.sha256


def test_the_aesthetic_score_rises_with_the_rating(shared: Path) -> None:
    """One real embedding for each rating; the ten scores rise strictly."""
    folder = shared / "weights"
    vectors = np.concatenate(
        [np.load(folder / f"clip_l14_rating_embeddings/rating{number}.npy") for number in range(10)]
    )
    classifier = AestheticClassifier(model_path=folder / "sac+logos+ava1-l14-linearMSE.pth")
    found = classifier(make_dataset(vectors, made_by=CLIP)).metadata.compute()["aesthetic_score"].to_numpy(float)
    assert (np.diff(found) > 0).all()
    assert 1 < found[0] < 3
    assert 5 < found[-1] < 7


class TestScores:
    @pytest.mark.parametrize(("classifier_class", "make_state", "oracle", "column"), BOTH)
    @pytest.mark.parametrize("batch_size", [-1, 1, 7, 1000])
    def test_agree_with_numpy(
        self, tmp_path: Path, classifier_class: Any, make_state: Any, oracle: Any, column: str, batch_size: int
    ) -> None:
        torch.save(make_state(), tmp_path / "w.pth")
        vectors = unit_vectors(40)
        classifier = classifier_class(model_path=tmp_path / "w.pth", batch_size=batch_size)
        scored = classifier(make_dataset(vectors, npartitions=3))
        assert str(scored.metadata.dtypes[column]) == "float[pyarrow]"
        frame = scored.metadata.compute()
        np.testing.assert_allclose(frame[column].to_numpy(float), oracle(make_state(), vectors), rtol=0, atol=1e-4)
        assert list(frame.columns) == ["key", "image_embedding", column]
        assert list(frame.index) == list(range(100, 140))

    def test_null_embeddings_get_null_scores(self, aesthetic_path: Path) -> None:
        vectors, rows = unit_vectors(3), [1, 2, 5]
        frame = AestheticClassifier(model_path=aesthetic_path)(make_dataset(vectors, rows, length=7)).metadata.compute()
        scores = frame["aesthetic_score"]
        assert scores.isna().tolist() == [row not in rows for row in range(7)]
        wanted = numpy_aesthetic(aesthetic_state(), vectors)
        np.testing.assert_allclose(scores.dropna().to_numpy(float), wanted, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
    def test_unusable_embeddings_get_null_scores(self, aesthetic_path: Path, bad: float) -> None:
        vectors = unit_vectors(6)
        wanted = numpy_aesthetic(aesthetic_state(), vectors)
        vectors[2] = bad
        frame = AestheticClassifier(model_path=aesthetic_path)(make_dataset(vectors)).metadata.compute()
        assert frame["aesthetic_score"].isna().tolist() == [False, False, True, False, False, False]
        assert not pa.array(frame["aesthetic_score"])[2].is_valid
        good = [0, 1, 3, 4, 5]
        found = frame["aesthetic_score"].iloc[good].to_numpy(float)
        np.testing.assert_allclose(found, wanted[good], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("vectors", [np.zeros((0, 768), np.float32), np.zeros((4, 768), np.float32)])
    def test_nothing_to_score(self, aesthetic_path: Path, vectors: np.ndarray) -> None:
        classifier = AestheticClassifier(model_path=aesthetic_path)
        rows = list(range(len(vectors)))
        frame = classifier(make_dataset(vectors, rows, length=4)).metadata.compute()
        assert frame["aesthetic_score"].isna().tolist() == [True] * 4

    def test_float16_embeddings(self, nsfw_path: Path) -> None:
        vectors = unit_vectors(20).astype(np.float16)
        frame = NsfwClassifier(model_path=nsfw_path)(make_dataset(vectors, dtype="float16")).metadata.compute()
        wanted = numpy_nsfw(nsfw_state(), vectors.astype(np.float32))
        np.testing.assert_allclose(frame["nsfw_score"].to_numpy(float), wanted, rtol=0, atol=1e-4)

    def test_other_columns(self, aesthetic_path: Path) -> None:
        dataset = make_dataset(unit_vectors(4))
        dataset.metadata = dataset.metadata.rename(columns={"image_embedding": "e"})
        classifier = AestheticClassifier(embedding_column="e", pred_column="a", model_path=aesthetic_path)
        scored = classifier(dataset)
        assert list(scored.metadata.columns) == ["key", "e", "a"]
        assert scored.provenance["a"]["parents"] == {"e": None}
        assert not scored.metadata.compute()["a"].isna().any()

    def test_one_after_the_other(self, aesthetic_path: Path, nsfw_path: Path) -> None:
        dataset = make_dataset(unit_vectors(4))
        frame = NsfwClassifier(model_path=nsfw_path)(AestheticClassifier(model_path=aesthetic_path)(dataset))
        assert list(frame.metadata.columns) == ["key", "image_embedding", "aesthetic_score", "nsfw_score"]
        assert frame.provenance.keys() == {"aesthetic_score", "nsfw_score"}

    def test_an_autocast_around_it_changes_nothing(self, aesthetic_path: Path) -> None:
        classifier = AestheticClassifier(model_path=aesthetic_path)
        vectors = torch.tensor(unit_vectors(8))
        plain = classifier.score(vectors, "cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(classifier.score(vectors, "cpu"), plain)

    def test_on_processes(self, scheduler: Any, aesthetic_path: Path) -> None:
        vectors = unit_vectors(30)
        scored = AestheticClassifier(model_path=aesthetic_path)(make_dataset(vectors, npartitions=4))
        found = scored.metadata["aesthetic_score"].compute().to_numpy(float)
        np.testing.assert_allclose(found, numpy_aesthetic(aesthetic_state(), vectors), rtol=0, atol=1e-4)


class TestOrigin:
    def scored(self, made_by: dict[str, Any] | None, path: Path, vectors: np.ndarray | None = None) -> StandIn:
        vectors = unit_vectors(4) if vectors is None else vectors
        return AestheticClassifier(model_path=path)(make_dataset(vectors, made_by=made_by))

    @pytest.mark.parametrize(
        "made_by",
        [
            None,
            CLIP,
            CLIP | {"model": "vit_large_patch14_clip_224.openai"},
            {"operator": "OpenClipImageEmbedder", "model": "ViT-L-14", "pretrained": "openai", "normalized": True},
            {"operator": "OpenClipImageEmbedder", "model": "ViT-L-14-quickgelu", "pretrained": "openai"},
            {"operator": "notebook.Mine", "model": "", "normalized": False},
        ],
    )
    def test_accepted(self, aesthetic_path: Path, made_by: dict[str, Any] | None) -> None:
        assert "aesthetic_score" in self.scored(made_by, aesthetic_path).metadata.columns

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"model": "tf_efficientnet_lite0", "embedding_size": 1280}, "holds embeddings of 1280 numbers"),
            ({"model": "vit_large_patch14_clip_224.laion2b"}, "was made by model 'vit_large_patch14_clip_224.laion2b'"),
            ({"model": "vit_large_patch14_clip_336.openai"}, "was made by model 'vit_large_patch14_clip_336.openai'"),
            ({"model": "ViT-L-14", "pretrained": "laion2b_s32b_b82k"}, "was made by model 'ViT-L-14'"),
            ({"normalized": False}, "without normalising"),
        ],
    )
    def test_refused_on_the_client(self, aesthetic_path: Path, change: dict[str, Any], says: str) -> None:
        with pytest.raises(EmbeddingError, match=says) as caught:
            self.scored(CLIP | change, aesthetic_path)
        text = str(caught.value)
        assert "column 'image_embedding'" in text
        assert "AestheticClassifier takes L2-normalised CLIP ViT-L/14 embeddings of 768 numbers" in text
        assert "vit_large_patch14_clip_quickgelu_224.openai" in text

    def test_a_user_may_accept_others(self, aesthetic_path: Path) -> None:
        class Lenient(AestheticClassifier):
            def accepts_embedding(self, fingerprint: Any) -> bool:
                return True

        made_by = CLIP | {"model": "mine"}
        assert Lenient(model_path=aesthetic_path)(make_dataset(unit_vectors(2), made_by=made_by))

    def test_another_size_in_the_data(self, aesthetic_path: Path) -> None:
        scored = self.scored(None, aesthetic_path, unit_vectors(4, size=512))
        with pytest.raises(EmbeddingError, match=r"holds embeddings of 512 numbers.*of 768 numbers"):
            scored.metadata.compute()

    @pytest.mark.parametrize("factor", [0.5, 1.02, 30.0])
    def test_norms_other_than_one(self, aesthetic_path: Path, factor: float) -> None:
        vectors = unit_vectors(8)
        vectors[3:5] *= factor
        scored = self.scored(None, aesthetic_path, vectors)
        with pytest.raises(EmbeddingError, match=rf"holds 2 of 8 embeddings with an L2 norm from {factor:.4g} to"):
            scored.metadata.compute()

    def test_random_networks_are_told(self, aesthetic_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "nemo_image"):
            self.scored(CLIP, aesthetic_path)
            assert not caplog.records
            self.scored(CLIP | {"weights_sha256": "random weights, seed 0"}, aesthetic_path)
        assert ["random network" in record.getMessage() for record in caplog.records] == [True]

    def test_a_missing_column(self, aesthetic_path: Path) -> None:
        with pytest.raises(MissingColumnError):
            AestheticClassifier("no_such_column", model_path=aesthetic_path)(make_dataset(unit_vectors(2)))

    def test_a_column_of_strings(self, aesthetic_path: Path) -> None:
        with pytest.raises(EmbeddingError, match="column 'key' holds string"):
            AestheticClassifier("key", model_path=aesthetic_path)(make_dataset(unit_vectors(2)))


class TestWeights:
    def test_constructors_only_store(self, tmp_path: Path) -> None:
        AestheticClassifier(model_path=tmp_path / "none.pth")
        NsfwClassifier()
        assert list(Path(os.environ["NEMO_IMAGE_HOME"]).iterdir()) == []

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "model_path=.*there is no such file"),
            (b"", "an empty file"),
            (b"<!DOCTYPE html><html>", "an HTML page"),
            (nsfw_state, "does not hold weights of AestheticHead: it lacks"),
        ],
    )
    def test_bad_files_are_errors_before_any_task(self, tmp_path: Path, content: Any, says: str) -> None:
        path = tmp_path / "w.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content(), path)
        with pytest.raises(WeightsError, match=says) as caught:
            AestheticClassifier(model_path=path)(make_dataset(unit_vectors(2)))
        assert str(path) in str(caught.value)

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(
            NsfwClassifier, "source", WeightsSource("http://127.0.0.1:9/w.zip", "w.pth", member="w.pth")
        )
        with pytest.raises(WeightsError, match=r"cannot download http://127.0.0.1:9/w.zip") as caught:
            NsfwClassifier()(make_dataset(unit_vectors(2)))
        assert f"put it at {os.environ['NEMO_IMAGE_HOME']}/w.pth" in str(caught.value)

    def test_the_file_in_home_is_used(self, monkeypatch: pytest.MonkeyPatch, nsfw_path: Path) -> None:
        source = WeightsSource("http://127.0.0.1:9/w.pth", nsfw_path.name, sha256_file(nsfw_path))
        monkeypatch.setattr(NsfwClassifier, "source", source)
        monkeypatch.setenv("NEMO_IMAGE_HOME", str(nsfw_path.parent))
        classifier = NsfwClassifier()
        vectors = unit_vectors(3)
        found = classifier.score(torch.tensor(vectors), "cpu")
        np.testing.assert_allclose(found, numpy_nsfw(nsfw_state(), vectors), rtol=0, atol=1e-4)

    def test_a_worker_without_the_clients_path_takes_its_own_copy(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("client", "worker"):
            (tmp_path / name).mkdir()
            torch.save(nsfw_state(), tmp_path / name / "w.pth")
        sha256 = sha256_file(tmp_path / "client" / "w.pth")
        monkeypatch.setattr(NsfwClassifier, "source", WeightsSource("http://127.0.0.1:9/w.pth", "w.pth", sha256))
        monkeypatch.setenv("NEMO_IMAGE_HOME", str(tmp_path / "client"))
        classifier = NsfwClassifier()
        classifier.prepare()
        sent = pickle.dumps(classifier)
        clear_models()
        (tmp_path / "client" / "w.pth").unlink()
        monkeypatch.setenv("NEMO_IMAGE_HOME", str(tmp_path / "worker"))
        vectors = unit_vectors(3)
        found = pickle.loads(sent).score(torch.tensor(vectors), "cpu")
        np.testing.assert_allclose(found, numpy_nsfw(nsfw_state(), vectors), rtol=0, atol=1e-4)

    def test_a_worker_with_other_weights_says_so(self, nsfw_path: Path) -> None:
        classifier = NsfwClassifier(model_path=nsfw_path)
        classifier.prepare()
        sent = pickle.dumps(classifier)
        clear_models()
        torch.save(nsfw_state(1), nsfw_path)
        with pytest.raises(WeightsError, match=r"nsfw\.pth on this machine has SHA-256 .*, the client's weights have"):
            pickle.loads(sent).score(torch.tensor(unit_vectors(1)), "cpu")

    def test_a_worker_without_the_users_file_says_so(self, nsfw_path: Path) -> None:
        classifier = NsfwClassifier(model_path=nsfw_path)
        classifier.prepare()
        sent = pickle.dumps(classifier)
        clear_models()
        nsfw_path.unlink()
        with pytest.raises(WeightsError, match="no such file on this machine"):
            pickle.loads(sent).score(torch.tensor(unit_vectors(1)), "cpu")

    def test_different_weights_never_share_a_copy(self, tmp_path: Path) -> None:
        vectors = unit_vectors(5)
        for seed in (0, 1):
            torch.save(aesthetic_state(seed), tmp_path / f"{seed}.pth")
        for seed in (0, 1, 0):
            found = AestheticClassifier(model_path=tmp_path / f"{seed}.pth")(make_dataset(vectors))
            wanted = numpy_aesthetic(aesthetic_state(seed), vectors)
            np.testing.assert_allclose(
                found.metadata.compute()["aesthetic_score"].to_numpy(float), wanted, rtol=0, atol=1e-4
            )

    def test_the_same_weights_share_a_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loads: list[str] = []
        build = AestheticClassifier.build

        def counting(state: Any, where: str) -> Any:
            loads.append(where)
            return build(state, where)

        monkeypatch.setattr(AestheticClassifier, "build", staticmethod(counting))
        for name in ("a.pth", "b.pth"):
            torch.save(aesthetic_state(), tmp_path / name)
        (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes())
        for name in ("a.pth", "b.pth"):
            AestheticClassifier(model_path=tmp_path / name)(
                make_dataset(unit_vectors(9), npartitions=3)
            ).metadata.compute()
        assert len(loads) == 1

    @pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("batch_size", -2)])
    def test_unusable_arguments(self, aesthetic_path: Path, argument: str, value: Any) -> None:
        classifier = AestheticClassifier(model_path=aesthetic_path, **{argument: value})
        with pytest.raises(ArgumentError, match=argument):
            classifier(make_dataset(unit_vectors(2)))


class TestFingerprint:
    def test_says_what_made_the_column(self, aesthetic_path: Path) -> None:
        found = AestheticClassifier(model_path=aesthetic_path)(make_dataset(unit_vectors(2), made_by=CLIP)).provenance
        assert found["aesthetic_score"] == {
            "operator": "AestheticClassifier",
            "model": "sac+logos+ava1-l14-linearMSE",
            "weights_sha256": sha256_file(aesthetic_path),
            "dtype": "float32",
            "pred_type": "float32",
            "parents": {"image_embedding": CLIP},
        }

    @pytest.mark.parametrize("derived", [False, True])
    def test_where_and_how_fast_make_no_difference(self, aesthetic_path: Path, tmp_path: Path, derived: bool) -> None:
        (tmp_path / "copy.pth").write_bytes(aesthetic_path.read_bytes())

        class Derived(AestheticClassifier):
            pass

        def made(**arguments: Any) -> dict[str, Any]:
            classifier = (Derived if derived else AestheticClassifier)(**arguments)
            classifier.prepare()
            return classifier.fingerprint(CLIP)

        wanted = made(model_path=aesthetic_path)
        assert made(model_path=str(tmp_path / "copy.pth"), batch_size=3, pred_column="x") == wanted

    def test_weights_and_embeddings_make_a_difference(self, tmp_path: Path) -> None:
        found = []
        for seed, parent in ((0, CLIP), (1, CLIP), (0, None), (0, CLIP | {"weights_sha256": "cd"})):
            torch.save(aesthetic_state(seed), tmp_path / f"{seed}.pth")
            classifier = AestheticClassifier(model_path=tmp_path / f"{seed}.pth")
            classifier.prepare()
            found.append(str(classifier.fingerprint(parent)))
        assert len(set(found)) == 4

    def test_travels_to_workers(self, aesthetic_path: Path) -> None:
        classifier = AestheticClassifier(model_path=aesthetic_path)
        classifier.prepare()
        assert cloudpickle.loads(cloudpickle.dumps(classifier)).fingerprint(CLIP) == classifier.fingerprint(CLIP)
