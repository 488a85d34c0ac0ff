"""Lookups in saved embeddings, against plain numpy in float64."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.nearest import nearest_rows
from nemo_image.embedders import ImageEmbedder, TimmImageEmbedder
from nemo_image.errors import ArgumentError, EmbeddingError, MissingColumnError, RunError
from tests.dedup.makers import write_embeddings
from tests.makers import TINY_MODEL, encoded, make_dataset, picture

SIZE = 16
ROWS = 200


class Words:
    """An embedder that knows a few texts, and pictures by their mean colour."""

    def __init__(self, known: dict[str, np.ndarray], made_by: dict[str, Any] | None = None) -> None:
        self.known = known
        self.made_by = made_by

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.known[text] for text in texts]).astype(np.float32)

    def embed_pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        return np.stack([self.known["black" if _brightness(one) < 128 else "white"] for one in pictures])

    def fingerprint(self) -> dict[str, Any]:
        return self.made_by or {}


def _brightness(data: Any) -> float:
    image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    return float(np.asarray(image.convert("L")).mean())


@pytest.fixture(scope="module")
def vectors() -> list[Any]:
    """Vectors with exact copies in other shards, some scaled, and rows that cannot be found."""
    rng = np.random.default_rng(0)
    made: list[Any] = list(rng.normal(size=(ROWS, SIZE)).astype(np.float32))
    for row in (150, 20, 60):
        made[row] = made[7]
    made[90] = made[7] * np.float32(0.5)
    made[11], made[12], made[13] = None, np.zeros(SIZE), np.full(SIZE, np.nan)
    return made


@pytest.fixture
def dataset(tmp_path: Path, vectors: list[Any]) -> ImageTextPairDataset:
    captions = [f"caption {row}" for row in range(ROWS)]
    return write_embeddings(tmp_path / "data", vectors, shards=3, caption=captions)


def oracle(vectors: list[Any], query: Any, k: int) -> tuple[list[str], list[float]]:
    """Ids and cosines of the nearest rows, in float64; equal ones by shard, then id: here, as ids grow, by id."""
    asked = np.asarray(query, np.float64)
    found = []
    for row, vector in enumerate(vectors):
        if vector is not None and np.isfinite(vector).all() and np.any(vector):
            exact = np.asarray(vector, np.float64)
            cosine = float(exact @ asked / np.sqrt(exact @ exact) / np.sqrt(asked @ asked))
            found.append((-round(cosine, 12), f"{row:06d}"))
    found.sort()
    return [name for _, name in found[:k]], [-cosine for cosine, _ in found[:k]]


def test_nearest_rows_are_found_exactly(dataset: ImageTextPairDataset, vectors: list[Any], scheduler: Any) -> None:
    result = dataset.search(vectors[7], k=8)
    ids, cosines = oracle(vectors, vectors[7], 8)
    assert ids[:5] == ["000007", "000020", "000060", "000090", "000150"]  # equal ones: by shard and id
    assert result.frame["key"].tolist() == ids
    np.testing.assert_allclose(result.frame["similarity"], cosines, rtol=0, atol=1e-12)
    assert result.frame["caption"].tolist() == [f"caption {int(one)}" for one in ids]
    assert list(result.frame.columns) == ["query", "similarity", "shard", "key", "caption"]
    assert (result.rows, result.without_embedding, result.unusable) == (ROWS, 1, 2)
    # Of equal rows of one shard, the first.
    assert dataset.search(vectors[7], k=2).frame["key"].tolist() == ids[:2]


@pytest.mark.parametrize("k", [1, 3, 50, 1000])
def test_several_queries(dataset: ImageTextPairDataset, vectors: list[Any], k: int) -> None:
    queries = np.random.default_rng(3).normal(size=(5, SIZE))
    frame = dataset.search(queries, k=k).frame
    for number, query in enumerate(queries):
        ids, cosines = oracle(vectors, query, k)
        mine = frame[frame["query"] == number]
        assert mine["key"].tolist() == ids  # all 197, if k is larger
        np.testing.assert_allclose(mine["similarity"], cosines, rtol=0, atol=1e-12)
    assert frame["query"].is_monotonic_increasing


def test_how_the_rows_lie_makes_no_difference(tmp_path: Path, vectors: list[Any], monkeypatch: Any) -> None:
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(3, SIZE))
    made = []
    for name, shards, order in (("one", 1, None), ("many", 9, rng.permutation(ROWS))):
        dataset = write_embeddings(tmp_path / name, vectors, shards=shards, order=order)
        made.append(dataset.search(queries, 20).frame)
    repartitioned = ImageTextPairDataset.from_webdataset(dataset.path)
    repartitioned.metadata = repartitioned.metadata.repartition(npartitions=2)
    made.append(repartitioned.search(queries, 20).frame)
    monkeypatch.setattr("nemo_image.datasets.shard_pass.WINDOW_ROWS", 7)
    monkeypatch.setattr("nemo_image.datasets.nearest.BLOCK_ROWS", 3)
    monkeypatch.setattr("nemo_image.datasets.nearest.QUERIES_AT_ONCE", 2)
    monkeypatch.setattr("nemo_image.datasets.nearest.PAIRS_AT_ONCE", 2)
    made.append(dataset.search(queries, 20).frame)
    for other in made[1:]:
        assert other["similarity"].tolist() == made[0]["similarity"].tolist()  # to the last bit
        assert sorted(other["key"]) == sorted(made[0]["key"])
    pd.testing.assert_frame_equal(made[1], made[2])
    pd.testing.assert_frame_equal(made[1], made[3])


def test_a_shard_of_copies() -> None:
    """All rows tie: each is a candidate, and none may be left out by the error of float32 products."""
    rng = np.random.default_rng(2)
    matrix = np.tile(rng.normal(size=(1, 64)).astype(np.float32), (5000, 1))
    query = rng.normal(size=(1, 64))
    found = nearest_rows(matrix, np.ones(5000, bool), query, 3)
    assert found.rows[0].tolist() == list(range(5000))
    assert len(set(found.cosines[0].tolist())) == 1


def test_near_ties_are_told_apart_in_float64() -> None:
    base = np.zeros(32)
    base[0] = 1
    tilted = np.zeros((3000, 32))
    tilted[:, 0], tilted[:, 1] = 1, 1e-5 + 1e-9 * np.random.default_rng(0).permutation(3000)
    exact = 1 / np.sqrt(1 + tilted[:, 1] ** 2)
    assert len(set((tilted / np.linalg.norm(tilted, axis=1)[:, None]).astype(np.float32)[:, 0].tolist())) == 1
    found = nearest_rows(tilted, np.ones(3000, bool), base[None], 5)
    best = found.rows[0][np.argsort(-found.cosines[0], kind="stable")][:5]
    np.testing.assert_allclose(exact[best], np.sort(exact)[::-1][:5], rtol=0, atol=3e-16)


def test_near_ties_in_any_direction() -> None:
    """float32 products of these rows come in another order than their cosines."""
    rng = np.random.default_rng(4)
    query = rng.normal(size=(1, 64))
    matrix = query + 3e-4 * rng.normal(size=(4000, 64))
    exact = (matrix.astype(np.longdouble) @ query[0].astype(np.longdouble)) / np.sqrt(
        (matrix.astype(np.longdouble) ** 2).sum(axis=1) * (query[0].astype(np.longdouble) ** 2).sum()
    )
    order = np.argsort(-exact)[:7]
    rounded = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    single = rounded @ (query[0] / np.linalg.norm(query[0])).astype(np.float32)
    assert set(np.argsort(-single, kind="stable")[:7]) != set(order)
    found = nearest_rows(matrix, np.ones(4000, bool), query, 7)
    assert found.rows[0][np.argsort(-found.cosines[0], kind="stable")].tolist() == order.tolist()


def test_a_filtered_frame(dataset: ImageTextPairDataset, vectors: list[Any]) -> None:
    dataset.metadata = dataset.metadata[dataset.metadata["key"] > "000100"]
    dataset.metadata["double"] = dataset.metadata["key"].str.len() * 2
    frame = dataset.search(vectors[7], k=2, columns=["double"]).frame
    assert frame["key"].iloc[0] == "000150"
    assert list(frame.columns) == ["query", "similarity", "shard", "key", "double"]
    assert frame["double"].tolist() == [12, 12]
    dataset.metadata = dataset.metadata[dataset.metadata["key"] > "x"]
    nothing = dataset.search(vectors[7], k=2)
    assert len(nothing) == 0
    assert list(nothing.frame.columns) == ["query", "similarity", "shard", "key", "caption", "double"]


def test_ids_that_repeat_in_other_shards(tmp_path: Path, vectors: list[Any]) -> None:
    ids = [row % 67 for row in range(ROWS)]  # shards of 67, 67 and 66 rows
    dataset = write_embeddings(tmp_path, vectors, shards=3, ids=ids)
    frame = dataset.search(vectors[7], k=5).frame
    found = list(zip(frame["shard"], frame["key"], strict=True))
    assert found == [("00000", 7), ("00000", 20), ("00000", 60), ("00001", 23), ("00002", 16)]
    assert frame["key"].dtype == "int64[pyarrow]"


@pytest.mark.in_process("watches or changes this process")
def test_only_what_is_needed_is_read(dataset: ImageTextPairDataset, vectors: list[Any], monkeypatch: Any) -> None:
    from nemo_image.datasets import load

    read: list[Any] = []
    original = load.read_rows
    monkeypatch.setattr(
        load, "read_rows", lambda source, shard, columns: read.append(columns) or original(source, shard, columns)
    )
    dataset.search(vectors[7], k=1, columns=["caption"])
    assert sum("image_embedding" in columns for columns in read) == 3  # once a shard
    assert [columns for columns in read if "caption" in columns] == [["key", "caption"]]  # of the shard that has it


def test_texts_and_pictures(tmp_path: Path, vectors: list[Any], dataset: ImageTextPairDataset) -> None:
    known = {"a cat": vectors[3], "a dog": vectors[5], "black": vectors[8], "white": vectors[9]}
    embedder = Words(known)
    Image.new("RGB", (9, 9)).save(tmp_path / "dark.png")
    white = Image.new("RGB", (9, 9), "white")

    def best(query: Any) -> list[str]:
        return list(dataset.search(query, 1, embedder=embedder).frame["key"])

    assert best("a cat") == ["000003"]
    assert best(tmp_path / "dark.png") == ["000008"]
    assert best(str(tmp_path / "dark.png")) == ["000008"]
    assert best(white) == ["000009"]
    assert best(encoded(white, "PNG")) == ["000009"]
    assert best(["a dog", white, "a cat", tmp_path / "dark.png"]) == ["000005", "000009", "000003", "000008"]
    assert best(vectors[30].tolist()) == ["000030"]


def test_the_embedder_must_be_the_one_that_made_them(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    dataset = TimmImageEmbedder(TINY_MODEL)(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    made_by = dataset.provenance["image_embedding"]
    size = made_by["embedding_size"]
    known = {"text": np.ones(size)}
    same = Words(known, {**made_by, "dtype": "other", "operator": "Another"})
    assert len(dataset.search("text", embedder=same)) == 3
    for changed in ({"weights_sha256": "0" * 64}, {"model": "another"}):
        with pytest.raises(EmbeddingError, match="made by another model than the embedder given"):
            dataset.search("text", embedder=Words(known, {**made_by, **changed}))
    with pytest.raises(EmbeddingError, match=f"embeddings of {size} numbers, the query has 3"):
        dataset.search([1.0, 2.0, 3.0])


def test_pictures_through_a_real_embedder(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 4, "b": 3})
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    result = dataset.search(encoded(picture(5), quality=90), k=2, embedder=embedder)
    assert result.frame["key"].iloc[0] == "000005"
    assert result.frame["similarity"].iloc[0] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ArgumentError, match=r"cannot embed texts: it has no embed_text"):
        dataset.search("a picture", embedder=embedder)
    shown = result.show()
    assert [card.title for card in shown.cards] == [
        f"{shard}/{key}" for shard, key in zip(result.frame["shard"], result.frame["key"], strict=True)
    ]
    assert "picture number 5" in result._repr_html_()
    assert result.show(1).cards[0].jpeg is not None


def test_an_embedder_of_the_users_own(tmp_path: Path) -> None:
    class Own(ImageEmbedder):
        def __init__(self, shade: float) -> None:
            super().__init__("own")
            self.shade = shade

        def load_dataset_shard(self, tar_path: str) -> Any:
            yield np.zeros(3), [{"key": f"{row:06d}"} for row in range(3)]

        def load_embedding_model(self, device: str) -> Any:
            return lambda batch: np.eye(3) + self.shade

        def embed_text(self, texts: Sequence[str]) -> np.ndarray:
            return np.eye(3)[[int(text) for text in texts]]

    make_dataset(tmp_path, {"a": 3})
    dataset = Own(0.1)(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert dataset.search(["2", "0"], 1, embedder=Own(0.1)).frame["key"].tolist() == ["000002", "000000"]
    with pytest.raises(EmbeddingError, match="state"):
        dataset.search("2", embedder=Own(0.2))


def test_what_is_skipped_is_said(
    dataset: ImageTextPairDataset, vectors: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nemo_image"):
        result = dataset.search(vectors[0])
    assert "2 of 200 rows have an embedding that is zero or not finite" in caplog.text
    assert "<SearchResult: 10 of 200 rows (3 skipped)" in repr(result)
    with pytest.raises(ArgumentError, match="n must be at least 1"):
        result.show(0)


def test_no_saved_embeddings(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    with pytest.raises(MissingColumnError, match="no column 'image_embedding': run an embedder and save_metadata"):
        dataset.search([1.0])
    with pytest.raises(MissingColumnError, match="not computed yet: call save_metadata"):
        TimmImageEmbedder(TINY_MODEL)(dataset).search([1.0])


def test_shards_that_cannot_be_read_are_named(dataset: ImageTextPairDataset, vectors: list[Any]) -> None:
    (Path(dataset.path) / "00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(RunError, match=r"1 shards could not be read.*00001\.parquet") as caught:
        dataset.search(vectors[7])
    assert list(caught.value.failures) == ["00001"]


def test_a_shard_without_embeddings(dataset: ImageTextPairDataset, vectors: list[Any]) -> None:
    path = Path(dataset.path) / "00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("image_embedding"), path)
    result = ImageTextPairDataset.from_webdataset(dataset.path).search(vectors[7], k=3)
    assert result.frame["key"].tolist() == ["000007", "000020", "000060"]
    assert result.without_embedding == 1 + 67


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (np.zeros(SIZE), "vector 0 has norm 0.0"),
        (np.full((2, SIZE), np.inf), "vector 0 has norm inf"),
        (np.zeros((0, SIZE)), "a vector .* is needed, not one of shape"),
        ([], "is needed, not one of shape"),
        (np.zeros((2, 2, 2)), "is needed, not one of shape"),
        ({"a": 1}, "dict is neither text"),
        ("a cat", "texts and pictures need embedder="),
    ],
)
def test_bad_queries(dataset: ImageTextPairDataset, query: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        dataset.search(query)


def test_bad_arguments(dataset: ImageTextPairDataset, vectors: list[Any], tmp_path: Path) -> None:
    for k in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="k must be a whole number"):
            dataset.search(vectors[7], k)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="columns must be a list"):
        dataset.search(vectors[7], columns="caption")
    with pytest.raises(MissingColumnError, match="'beauty'"):
        dataset.search(vectors[7], columns=["beauty"])
    with pytest.raises(ArgumentError, match="text 0 is empty"):
        dataset.search("  ", embedder=Words({}))
    with pytest.raises(RunError, match=f"embeddings of {SIZE} numbers, the query has 3"):  # of unknown origin
        dataset.search([1.0, 2.0, 3.0])
    with pytest.raises(ArgumentError, match=r"nowhere\.jpg: no such file"):
        dataset.search(tmp_path / "nowhere.jpg", embedder=Words({}))
