"""Decontamination: rows too like an evaluation set, against plain numpy and imagehash."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import Decontaminate, PerceptualDedup
from nemo_image.dedup.evaluation.mark import nearest_hashes
from nemo_image.embedders import ImageEmbedder
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, MissingColumnError, RunError
from nemo_image.filters import KeepExpression
from tests.dedup.makers import computed, write_embeddings
from tests.makers import encoded, picture, write_rows, write_tar

SIZE = 12


class Grid(ImageEmbedder):
    """The mean colours of four parts of each picture."""

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        with tarfile.open(tar_path) as tar:
            for info in tar:
                if info.name.endswith(".jpg"):
                    file = tar.extractfile(info)
                    assert file is not None
                    yield grid(file.read())[None], [{"key": info.name.removesuffix(".jpg")}]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        return lambda batch: batch


def grid(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((2, 2), Image.Resampling.BOX)
    return np.asarray(image, np.float32).reshape(-1) - 120


def jpeg(seed: int, quality: int = 90, scale: float = 1.0) -> bytes:
    image = picture(seed, 128, 96)
    return encoded(image.resize((int(128 * scale), int(96 * scale))), quality=quality)


def write_pictures(folder: Path, pictures: dict[str, bytes]) -> Path:
    for name, data in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_images(folder: Path, shards: list[dict[str, bytes]]) -> ImageTextPairDataset:
    folder.mkdir(parents=True, exist_ok=True)
    for number, images in enumerate(shards):
        write_tar(folder / f"{number:05d}.tar", [(key, {"jpg": data}) for key, data in images.items()])
        write_rows(folder / f"{number:05d}.parquet", {"key": list(images)})
    return ImageTextPairDataset.from_webdataset(str(folder))


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In float64, of float32 vectors."""
    rows, others = rows.astype(np.float64), others.astype(np.float64)
    return (rows @ others.T) / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(others, axis=1)


TRAINING = {"a": jpeg(1), "b": jpeg(2), "c": jpeg(3, 60, 0.75), "d": jpeg(4), "e": jpeg(5)}
TESTS = {"x/one.jpg": jpeg(1), "x/three.jpg": jpeg(3), "y/nine.jpg": jpeg(9)}


@pytest.fixture
def training(tmp_path: Path) -> ImageTextPairDataset:
    shards = [{key: TRAINING[key] for key in keys} for keys in ("abc", "de")]
    return Grid("grid")(write_images(tmp_path / "training", shards)).save_metadata()


@pytest.fixture
def tests_folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "tests", TESTS)


def oracle(eps: float | None, max_distance: int | None) -> pd.DataFrame:
    """What each training row is, by numpy and imagehash alone."""
    names = sorted(TESTS)
    found = {}
    similarity = cosines(np.stack([grid(TRAINING[key]) for key in TRAINING]), np.stack([grid(TESTS[n]) for n in names]))
    hashes = {name: imagehash.phash(Image.open(io.BytesIO(TESTS[name]))) for name in names}
    for row, key in enumerate(TRAINING):
        own = imagehash.phash(Image.open(io.BytesIO(TRAINING[key])))
        bits = [int(own - hashes[name]) for name in names]
        best = int(similarity[row].argmax())
        close = eps is not None and np.float32(similarity[row, best]) >= 1 - eps
        near = max_distance is not None and min(bits) <= max_distance
        match = names[best] if close else names[int(np.argmin(bits))] if near else None
        distance = min(bits) if near else None
        found[key] = (bool(close or near), match, max(similarity[row, best], 0), distance)
    columns = ["contaminated", "eval_match", "eval_similarity", "eval_hash_distance"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns)


@pytest.mark.parametrize(("eps", "max_distance"), [(0.0, None), (None, 6), (0.002, 6)])
def test_a_folder_of_pictures(
    training: ImageTextPairDataset, tests_folder: Path, eps: Any, max_distance: Any, scheduler: Any
) -> None:
    operator = Decontaminate(tests_folder, Grid("grid"), eps, max_distance)
    found = computed(operator(training)).set_index("key")
    wanted = oracle(eps, max_distance)
    assert {"a"} <= set(wanted.index[wanted["contaminated"]]) < {"a", "b", "c", "d", "e"}
    assert found["contaminated"].tolist() == wanted["contaminated"].tolist()
    assert found["eval_match"].fillna("").tolist() == wanted["eval_match"].fillna("").tolist()
    assert ("eval_similarity" in found) == (eps is not None)
    assert ("eval_hash_distance" in found) == (max_distance is not None)
    if eps is not None:
        np.testing.assert_allclose(found["eval_similarity"], wanted["eval_similarity"], rtol=0, atol=1e-6)
    if max_distance is not None:
        assert found["eval_hash_distance"].fillna(-1).tolist() == wanted["eval_hash_distance"].fillna(-1).tolist()
    assert operator.evaluation_ is not None
    assert operator.evaluation_.rows == 3


def vectors_with_copies(count: int, known: np.ndarray, seed: int) -> np.ndarray:
    """Return vectors of which some are exact, scaled or near copies of known ones."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, known.shape[1])).astype(np.float32)
    vectors[5] = known[7]
    vectors[20] = known[11] * np.float32(4)
    vectors[33] = known[3] + 0.01 * rng.normal(size=known.shape[1])
    return vectors


def write_evaluation(folder: Path, seed: int = 0, size: int = SIZE) -> tuple[ImageTextPairDataset, np.ndarray]:
    known = np.random.default_rng(seed).normal(size=(40, size)).astype(np.float32)
    known[12] = known[11]  # the earlier of equals is named
    return write_embeddings(folder, list(known), shards=2), known


def test_exact_copies_fall_at_eps_0(tmp_path: Path, scheduler: Any) -> None:
    evaluation, known = write_evaluation(tmp_path / "tests")
    vectors = vectors_with_copies(60, known, 1)
    dataset = write_embeddings(tmp_path / "training", list(vectors))
    found = computed(Decontaminate(evaluation, eps=0.0, max_distance=None)(dataset))
    similarity = cosines(vectors, known)
    np.testing.assert_allclose(found["eval_similarity"], similarity.max(axis=1).clip(0), rtol=0, atol=1e-7)
    assert found["key"][found["contaminated"]].tolist() == ["000005", "000020"]
    assert found["eval_match"].dropna().tolist() == ["00000/000007", "00000/000011"]
    assert found["contaminated"].dtype == "bool[pyarrow]"
    assert found["eval_similarity"].dtype == "float[pyarrow]"


def test_how_the_rows_lie_makes_no_difference(tmp_path: Path) -> None:
    evaluation, known = write_evaluation(tmp_path / "tests")
    vectors = vectors_with_copies(60, known, 1)
    order = np.random.default_rng(5).permutation(60)
    made = []
    for name, shards, laid in (("one", 1, None), ("many", 7, order)):
        dataset = write_embeddings(tmp_path / name, list(vectors), shards=shards, order=laid)
        made.append(computed(Decontaminate(evaluation, eps=0.3, max_distance=None)(dataset)).drop(columns="shard"))
    pd.testing.assert_frame_equal(made[0], made[1])
    dataset.metadata = dataset.metadata.repartition(npartitions=2)
    again = computed(Decontaminate(evaluation, eps=0.3, max_distance=None)(dataset)).drop(columns="shard")
    pd.testing.assert_frame_equal(made[0], again)


def test_rows_that_cannot_be_compared(tmp_path: Path) -> None:
    evaluation, known = write_evaluation(tmp_path / "tests")
    vectors: list[Any] = [known[0], None, np.zeros(SIZE), np.full(SIZE, np.nan), -known[0]]
    dataset = write_embeddings(tmp_path / "training", vectors, shards=1)
    found = computed(Decontaminate(evaluation, eps=0.1, max_distance=None)(dataset))
    assert found["contaminated"].isna().tolist() == [False, True, True, True, False]
    assert found["contaminated"].dropna().tolist() == [True, False]
    assert found["eval_similarity"].isna().tolist() == [False, True, True, True, False]
    assert found["image_error"].iloc[2] == "embedding: image_embedding is a vector of norm 0.0"
    assert found["image_error"].iloc[3].endswith("norm nan")
    assert found["image_error"].isna().tolist() == [True, True, False, False, True]


def test_a_picture_that_cannot_be_hashed_is_not_called_clean(tmp_path: Path, tests_folder: Path) -> None:
    flat = encoded(Image.new("RGB", (64, 48), (200, 0, 0)))
    dataset = write_images(tmp_path / "training", [{"a": jpeg(1), "bad": b"no picture", "flat": flat, "z": jpeg(20)}])
    found = computed(Decontaminate(tests_folder, eps=None)(dataset)).set_index("key")
    assert found["contaminated"].isna().tolist() == [False, True, False, False]
    assert found["contaminated"].dropna().tolist() == [True, False, False]
    assert found["image_error"].notna().tolist() == [False, True, False, False]


def test_pictures_of_one_colour_are_like_nothing(tmp_path: Path) -> None:
    red, blue = (encoded(Image.new("RGB", (64, 48), colour), "PNG") for colour in ("red", "blue"))
    folder = write_pictures(tmp_path / "tests", {"red.png": red, "one.jpg": jpeg(1)})
    dataset = write_images(tmp_path / "training", [{"a": jpeg(1), "blue": blue, "red": red, "z": jpeg(20)}])
    close = computed(Decontaminate(folder, eps=None, max_distance=0)(dataset))
    assert close["key"][close["contaminated"]].tolist() == ["a"]
    anything = computed(Decontaminate(folder, eps=None, max_distance=64)(dataset))
    assert anything["key"][anything["contaminated"]].tolist() == ["a", "z"]
    (folder / "one.jpg").unlink()
    nothing = computed(Decontaminate(folder, eps=None, max_distance=64)(dataset))
    assert nothing["contaminated"].tolist() == [False] * 4


def test_recompressed_and_halved_photographs(shared: Path, tmp_path: Path) -> None:
    photographs = sorted((shared / "data" / "photos").glob("*.jpg"))[::3]
    dataset = write_images(tmp_path / "training", [{path.stem: path.read_bytes() for path in photographs}])
    copies = {}
    for path in photographs[::7]:
        image = Image.open(path).convert("RGB")
        copies[f"{path.stem}_50.jpg"] = encoded(image, quality=50)
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        copies[f"{path.stem}_half.jpg"] = encoded(half, quality=90)
    found = computed(Decontaminate(write_pictures(tmp_path / "tests", copies), eps=None)(dataset))
    assert found["key"][found["contaminated"]].tolist() == [path.stem for path in photographs[::7]]
    assert [name[:12] for name in found["eval_match"].dropna()] == [path.stem for path in photographs[::7]]


def test_bad_pictures_of_the_evaluation_set_are_said(
    training: ImageTextPairDataset, tests_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tests_folder, {"broken.png": b"no picture", "notes.md": b"#"})
    operator = Decontaminate(tests_folder, eps=None)
    assert computed(operator(training)).set_index("key")["contaminated"]["a"]
    assert operator.evaluation_ is not None
    assert (operator.evaluation_.rows, operator.evaluation_.hashed) == (4, 3)
    assert "1 of the 4 pictures of the evaluation set have no usable embedding or hash" in caplog.text


def test_pictures_that_differ_in_the_extension_alone(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "tests", {"same.jpg": jpeg(1), "same.png": encoded(picture(2, 128, 96), "PNG")})
    dataset = write_images(tmp_path / "training", [{"a": jpeg(1), "b": jpeg(2), "c": jpeg(3)}])
    found = computed(Decontaminate(folder, eps=None)(dataset))
    assert found["eval_match"].dropna().tolist() == ["same.jpg", "same.png"]


def test_hashes_that_are_there_are_taken(
    training: ImageTextPairDataset, tests_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = PerceptualDedup()(training).save_metadata()
    Decontaminate(tests_folder, eps=None, max_distance=0)(hashed)  # the evaluation set's own

    def refuse(*args: Any) -> Any:
        raise AssertionError("hashed again")

    monkeypatch.setattr("nemo_image.dedup.hashes.hashing.PerceptualHash.hash_all", refuse)
    found = computed(Decontaminate(tests_folder, eps=None, max_distance=6)(hashed)).set_index("key")
    assert found["contaminated"].tolist() == oracle(None, 6)["contaminated"].tolist()


def test_the_evaluation_set_is_embedded_once(
    training: ImageTextPairDataset, tests_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Decontaminate(tests_folder, Grid("grid"), 0.002)(training)
    kept = [path.name for path in (Path(training.path) / "_nemo_image").glob("decontaminate-*/*")]
    assert sorted(name for name in kept if name != "_nemo_image") == [
        "evaluation.json",
        "hashes.parquet",
        "names.parquet",
        "plan.json",
        "vectors.f32",
    ]
    monkeypatch.setattr("nemo_image.dedup.decontaminate.collect", None)
    second = Decontaminate(tests_folder, Grid("grid"), 0.5)(training)  # another threshold asks for nothing new
    assert first.provenance["contaminated"] != second.provenance["contaminated"]
    assert first.provenance["contaminated"]["against"] == second.provenance["contaminated"]["against"]
    write_pictures(tests_folder, {"more.jpg": jpeg(30)})
    with pytest.raises(TypeError):
        Decontaminate(tests_folder, Grid("grid"), 0.5)(training)


@pytest.mark.in_process("watches or changes this process")
def test_saved_columns_are_taken_over_and_filter(
    training: ImageTextPairDataset, tests_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = Decontaminate(tests_folder, Grid("grid"), 0.002, 6)
    saved = operator(training).save_metadata()
    assert saved.provenance["contaminated"]["operator"] == "Decontaminate"

    def refuse(*args: Any) -> Any:
        raise AssertionError("compared again")

    monkeypatch.setattr("nemo_image.dedup.evaluation.mark.MarkContaminated.__call__", refuse)
    saved = operator(saved).save_metadata()
    with pytest.raises(RunError, match="compared again"):
        Decontaminate(tests_folder, Grid("grid"), 0.1, 6)(saved).save_metadata()
    frame = computed(saved)
    wanted = oracle(0.002, 6)
    assert frame["key"][KeepExpression("not contaminated")(frame)].tolist() == (
        wanted.index[~wanted["contaminated"]].tolist()
    )


def test_a_folder_of_tars(training: ImageTextPairDataset, tmp_path: Path) -> None:
    write_images(tmp_path / "tars", [{"one": jpeg(1)}, {"three": jpeg(3)}])
    found = computed(Decontaminate(str(tmp_path / "tars"), Grid("grid"), 0.0, None)(training))
    assert found["eval_match"].dropna().tolist() == ["00000/one"]


@pytest.mark.parametrize("count", [1, 300])
def test_nearest_hashes(count: int) -> None:
    rng = np.random.default_rng(count)
    references = rng.integers(0, 2**63, count, dtype=np.uint64)
    references[count // 2 :] = references[: count - count // 2] ^ np.uint64(0b1011)  # near each other
    flips = np.array(
        [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False)) for _ in range(500)]
    )
    hashes = references[rng.integers(0, count, 500)] ^ flips.astype(np.uint64)
    bits = np.array([[int(a ^ b).bit_count() for b in references.tolist()] for a in hashes.tolist()])
    for most in (0, 3, 6, 64):
        distance, which = nearest_hashes(hashes, references, most)
        found = bits.min(axis=1) <= most
        np.testing.assert_array_equal(distance, np.where(found, bits.min(axis=1), -1))
        np.testing.assert_array_equal(which, np.where(found, bits.argmin(axis=1), -1))


def test_other_vectors_of_the_same_names_are_another_set(tmp_path: Path) -> None:
    sets = [write_evaluation(tmp_path / f"tests-{seed}", seed)[0] for seed in (0, 1)]
    dataset = write_embeddings(tmp_path / "training", list(np.eye(SIZE)))
    made = [Decontaminate(one, max_distance=None)(dataset).provenance["contaminated"] for one in sets]
    assert made[0] != made[1]


def test_large_sets_are_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, known = write_evaluation(tmp_path / "tests")
    vectors = vectors_with_copies(60, known, 1)
    dataset = write_embeddings(tmp_path / "training", list(vectors))
    wanted = computed(Decontaminate(evaluation, eps=0.3, max_distance=None)(dataset))
    monkeypatch.setattr("nemo_image.dedup.evaluation.mark.MEMORY_BYTES", 100)
    monkeypatch.setattr("nemo_image.dedup.evaluation.mark.get_model", lambda spec, load: load())
    pd.testing.assert_frame_equal(computed(Decontaminate(evaluation, eps=0.3, max_distance=None)(dataset)), wanted)
    monkeypatch.setattr("nemo_image.dedup.evaluation.mark.LocalFileSystem", type(None))  # as if it were remote
    pd.testing.assert_frame_equal(computed(Decontaminate(evaluation, eps=0.3, max_distance=None)(dataset)), wanted)


def test_other_models_are_refused(training: ImageTextPairDataset, tests_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match="made by another model than that of the evaluation set"):
        Decontaminate(tests_folder, Grid("another"))(training)
    evaluation, _ = write_evaluation(tmp_path / "other", size=5)
    with pytest.raises(RunError, match="embeddings of 12 numbers, 5 are needed"):
        Decontaminate(evaluation, max_distance=None)(training).save_metadata()


def test_bad_input(training: ImageTextPairDataset, tests_folder: Path, tmp_path: Path) -> None:
    bare = write_images(tmp_path / "bare", [{"a": jpeg(1)}])
    with pytest.raises(MissingColumnError, match="run an embedder first, or give eps=None"):
        Decontaminate(tests_folder)(bare)
    with pytest.raises(ArgumentError, match=r"against has no column 'image_embedding': give embedder="):
        Decontaminate(tests_folder)(training)
    with pytest.raises(DatasetError, match="no such folder"):
        Decontaminate(tmp_path / "nowhere", eps=None)(training)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no pictures"):
        Decontaminate(tmp_path / "empty", eps=None)(training)
    write_pictures(tmp_path / "broken", {"a.jpg": b"no picture"})
    with pytest.raises(DatasetError, match="none of the 1 pictures of the evaluation set can be decoded"):
        Decontaminate(tmp_path / "broken", eps=None)(training)
    nulls = write_embeddings(tmp_path / "nulls", [None, np.zeros(SIZE)], shards=1)
    with pytest.raises(DatasetError, match="none of the 2 pictures of the evaluation set has a usable embedding"):
        Decontaminate(nulls, max_distance=None)(training)
    for arguments, says in [
        ({"eps": 1.5}, "eps must lie in"),
        ({"eps": None, "max_distance": None}, "nothing to compare by"),
        ({"max_distance": 65}, "max_distance must be"),
        ({"max_distance": True}, "max_distance must be"),
        ({"embedder": 3}, "embedder: int cannot embed a dataset"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            Decontaminate(tests_folder, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="against must be"):
        Decontaminate(7)
