"""Exact and perceptual deduplication of datasets, and the cascade of all three."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import ExactDedup, PerceptualDedup, SemanticDedup
from nemo_image.errors import ArgumentError, DatasetError, MissingColumnError, RunError
from tests.dedup.makers import computed
from tests.makers import encoded, make_dataset, picture, write_rows, write_tar

VERDICT = ["is_duplicate", "duplicate_of", "duplicate_of_shard", "duplicate_tier"]


def jpeg(seed: int, quality: int = 90, scale: float = 1.0) -> bytes:
    image = picture(seed, 128, 96)
    return encoded(image.resize((int(128 * scale), int(96 * scale))), quality=quality)


def write_images(folder: Path, shards: list[dict[str, bytes]], **columns: dict[str, Any]) -> ImageTextPairDataset:
    """Write shards of images by key, with a column of values by key for each of `columns`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, images in enumerate(shards):
        write_tar(folder / f"{number:05d}.tar", [(key, {"jpg": data}) for key, data in images.items()])
        rows = {"key": list(images), **{name: [values.get(key) for key in images] for name, values in columns.items()}}
        write_rows(folder / f"{number:05d}.parquet", rows)
    return ImageTextPairDataset.from_webdataset(str(folder))


@pytest.fixture
def images() -> list[dict[str, bytes]]:
    """Three shards: pictures 0 to 9; exact copies of 0 to 4, and pictures 10 to 14; recompressed and resized copies."""
    first = {f"a{seed:02d}": jpeg(seed) for seed in range(10)}
    second = {f"b{seed:02d}": jpeg(seed) for seed in [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]}
    third = {f"c{seed:02d}": jpeg(seed, 60, 0.75) for seed in [0, 5, 6, 10]}
    return [first, second, third]


@pytest.fixture
def dataset(tmp_path: Path, images: Any) -> ImageTextPairDataset:
    return write_images(tmp_path / "data", images)


def verdict(found: pd.DataFrame) -> dict[str, str]:
    return dict(found.loc[found["is_duplicate"].fillna(False), ["key", "duplicate_of"]].itertuples(index=False))


def test_exact_copies(dataset: ImageTextPairDataset, images: Any, scheduler: Any) -> None:
    dedup = ExactDedup()

    found = computed(dedup(dataset))

    # An independent hash groups the same rows.
    groups: dict[str, list[str]] = {}
    for shard in images:
        for key, data in shard.items():
            groups.setdefault(hashlib.sha256(data).hexdigest(), []).append(key)
    assert verdict(found) == {key: min(keys) for keys in groups.values() for key in keys if key != min(keys)}
    assert len(verdict(found)) == 5
    assert found.groupby("image_hash").size().max() == 2
    assert set(found.loc[found["is_duplicate"], "duplicate_tier"]) == {"exact"}
    assert set(found.loc[found["is_duplicate"], "duplicate_of_shard"]) == {"00000"}
    assert found.loc[~found["is_duplicate"], VERDICT[1:]].isna().to_numpy().all()
    assert dedup.result_ is not None
    assert (dedup.result_.kept, dedup.result_.removed) == (19, 5)
    assert "5 of 24 rows removed" in str(dedup.result_)


def test_which_copy_is_kept(tmp_path: Path, images: Any) -> None:
    score = {key: float(number) for number, key in enumerate(key for shard in images for key in shard)}
    dataset = write_images(tmp_path, images, score=score)
    assert verdict(computed(ExactDedup(("score", False))(dataset)))["a00"] == "b00"
    assert verdict(computed(ExactDedup(("score", True))(dataset)))["b00"] == "a00"
    by_seed = {
        seed: tuple(sorted(verdict(computed(ExactDedup("random", random_state=seed)(dataset))))) for seed in (1, 2)
    }
    assert by_seed[1] != by_seed[2]
    assert by_seed[1] == tuple(sorted(verdict(computed(ExactDedup("random", random_state=1)(dataset)))))


@pytest.mark.parametrize("hash_name", ["phash", "dhash", "ahash"])
def test_perceptual_copies(dataset: ImageTextPairDataset, images: Any, hash_name: Any) -> None:
    dedup = PerceptualDedup(hash_name, max_distance=8)

    found = computed(dedup(dataset))

    function = {"phash": imagehash.phash, "dhash": imagehash.dhash, "ahash": imagehash.average_hash}[hash_name]
    kept: list[tuple[str, Any]] = []
    wanted: dict[str, tuple[str, int]] = {}
    hashes = {key: function(Image.open(io.BytesIO(data))) for shard in images for key, data in shard.items()}
    for key in sorted(hashes):
        near = [(int(hashes[key] - other), number) for number, (_, other) in enumerate(kept)]
        if near and min(near)[0] <= 8:
            wanted[key] = (kept[min(near)[1]][0], min(near)[0])
        else:
            kept.append((key, hashes[key]))
    removed = found[found["is_duplicate"]]
    assert dict(
        zip(removed["key"], zip(removed["duplicate_of"], removed["hash_distance"], strict=True), strict=True)
    ) == (wanted)
    assert {"b00", "c00", "c05", "c10"} <= set(wanted)
    assert dict(zip(found["key"], found[f"image_{hash_name}"], strict=True)) == {k: str(v) for k, v in hashes.items()}
    assert set(removed["duplicate_tier"]) == {"perceptual"}


@pytest.mark.parametrize("hash_name", ["phash", "dhash", "ahash"])
def test_pictures_of_one_colour_are_no_copies_of_each_other(tmp_path: Path, hash_name: Any) -> None:
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255)}
    flat = {name: encoded(Image.new("RGB", (64, 48), colour), "PNG") for name, colour in colours.items()}
    dataset = write_images(tmp_path, [{**flat, "one": jpeg(1), "same": jpeg(1)}])
    assert verdict(computed(PerceptualDedup(hash_name)(dataset))) == {"same": "one"}


def test_max_distance_decides(dataset: ImageTextPairDataset) -> None:
    removed = [len(verdict(computed(PerceptualDedup(max_distance=bits)(dataset)))) for bits in (0, 8, 64)]
    assert 5 <= removed[0] <= removed[1] < removed[2] == 23  # all but one


@pytest.mark.in_process("watches or changes this process")
def test_hashes_are_made_once(dataset: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(PerceptualDedup(max_distance=0)(dataset))

    def refuse(*args: Any) -> Any:
        raise AssertionError("hashed again")

    monkeypatch.setattr("nemo_image.dedup.hashes.hashing.PerceptualHash.hash_all", refuse)
    computed(PerceptualDedup(max_distance=9)(dataset))
    with pytest.raises(RunError, match="hashed again"):
        PerceptualDedup("dhash")(dataset)


def test_pictures_that_cannot_be_hashed_say_why(tmp_path: Path, images: Any) -> None:
    images[0]["a03"] = b"no picture at all"
    folder = tmp_path / "data"
    write_images(folder, images)
    table = pq.read_table(folder / "00001.parquet")
    pq.write_table(table.set_column(0, "key", [["nobody", *table["key"].to_pylist()[1:]]]), folder / "00001.parquet")
    dataset = ImageTextPairDataset.from_webdataset(str(folder))

    perceptual = PerceptualDedup()
    found = computed(perceptual(dataset)).set_index("key")
    exact = computed(ExactDedup()(dataset)).set_index("key")

    for one, bad in ((found, ["a03", "nobody"]), (exact, ["nobody"])):
        assert one.loc[bad, VERDICT].isna().to_numpy().all()
        assert one["image_error"].notna().sum() == len(bad)
    assert found.loc["nobody", "image_error"].startswith("missing: ")
    assert perceptual.result_ is not None
    assert (perceptual.result_.rows, perceptual.result_.bad_value) == (24, 2)


def test_a_broken_tar_is_named(dataset: ImageTextPairDataset) -> None:
    (Path(dataset.path) / "00001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(RunError, match=r"00001\.tar"):
        ExactDedup()(dataset)


def test_arguments_are_checked(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="max_distance must be a number of bits from 0 to 64, not 65"):
        PerceptualDedup(max_distance=65)
    with pytest.raises(ArgumentError, match="which_to_keep must be 'id', 'random'"):
        ExactDedup("hard")
    with pytest.raises(MissingColumnError, match="'beauty'"):
        ExactDedup(("beauty", True))(dataset)
    with pytest.raises(ArgumentError, match="hash"):
        PerceptualDedup("md5")(dataset)  # type: ignore[arg-type]
    ExactDedup(output_dir=tmp_path / "out")(dataset)
    with pytest.raises(DatasetError, match="another deduplication"):
        ExactDedup("random", output_dir=tmp_path / "out")(dataset)


def test_filtered_and_empty_partitions(dataset: ImageTextPairDataset) -> None:
    dataset.metadata = dataset.metadata[dataset.metadata["key"] > "b"]
    assert verdict(computed(ExactDedup()(dataset))) == {}
    assert set(verdict(computed(PerceptualDedup()(dataset)))) == {"c00", "c10"}


def test_embeddings_to_compute_stay_to_compute(dataset: ImageTextPairDataset) -> None:
    """Exact deduplication before embedding reads the images' bytes, and computes no embedding."""
    from nemo_image.embedders import TimmImageEmbedder
    from tests.makers import TINY_MODEL

    lazy = TimmImageEmbedder(TINY_MODEL)(dataset)
    found = ExactDedup()(lazy)

    assert "image_embedding" in found.lineage.pending
    assert verdict(computed(found)) == verdict(computed(ExactDedup()(dataset)))


def test_pending_embeddings_are_computed_once(dataset: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_image.embedders import TimmImageEmbedder
    from nemo_image.embedders.base import EmbedPartition
    from tests.makers import TINY_MODEL

    found = SemanticDedup(n_clusters=1, eps=0.0)(TimmImageEmbedder(TINY_MODEL)(dataset))
    assert "image_embedding" not in found.lineage.pending

    def refuse(*args: Any) -> Any:
        raise AssertionError("embedded again")

    monkeypatch.setattr(EmbedPartition, "__call__", refuse)
    assert {f"b{seed:02d}": f"a{seed:02d}" for seed in range(5)}.items() <= symmetric(verdict(computed(found))).items()


def symmetric(pairs: dict[str, str]) -> dict[str, str]:
    return {**pairs, **{twin: copy for copy, twin in pairs.items()}}


def test_cascade(tmp_path: Path, images: Any) -> None:
    """Each tier judges what the one before kept; who fell keeps what it says."""
    dataset = write_images(tmp_path / "data", images)
    vectors = {
        key: [float(int(key[1:]) // 2 == place) + 0.01 * place for place in range(8)] for s in images for key in s
    }
    for number, shard in enumerate(images):
        path = tmp_path / "data" / f"{number:05d}.parquet"
        rows = pq.read_table(path).to_pydict()
        write_rows(path, {**rows, "image_embedding": [vectors[key] for key in shard]})
    dataset = ImageTextPairDataset.from_webdataset(dataset.path)
    tiers: list[Any] = [ExactDedup(), PerceptualDedup(), SemanticDedup(n_clusters=1, eps=0.001)]

    found = dataset
    for tier in tiers:
        found = tier(found)
    rows = computed(found.save_metadata(tmp_path / "saved"))

    assert rows["duplicate_tier"].value_counts().to_dict() == {
        tier.result_.tier: tier.result_.removed for tier in tiers
    }
    exact = rows[rows["duplicate_tier"] == "exact"]
    assert dict(zip(exact["key"], exact["duplicate_of"], strict=True)) == {
        f"b{seed:02d}": f"a{seed:02d}" for seed in range(5)
    }
    perceptual = rows[rows["duplicate_tier"] == "perceptual"]
    assert set(perceptual["key"]) >= {"c00", "c05", "c06", "c10"}
    passed = [tier.result_.passed_by for tier in tiers]
    assert passed == [0, 5, 5 + len(perceptual)]
    # Pairs of even and odd seeds share an embedding: one of each pair is left.
    kept = rows[~rows["is_duplicate"]]
    assert sorted(kept["key"].str[1:].astype(int) // 2) == list(range(8))
    assert rows.loc[rows["duplicate_tier"].isin(["exact", "perceptual"]), "max_similarity"].isna().all()
    assert rows["image_hash"].notna().all()
    assert rows.loc[rows["duplicate_tier"] != "exact", "image_phash"].notna().all()


def test_the_same_again_on_its_own_result_changes_nothing(dataset: ImageTextPairDataset) -> None:
    first = computed(PerceptualDedup()(ExactDedup()(dataset)).save_metadata())
    again = ImageTextPairDataset.from_webdataset(dataset.path)
    pd.testing.assert_frame_equal(computed(PerceptualDedup()(ExactDedup()(again)))[first.columns], first)


def test_ids_to_remove_are_in_files(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    found = computed(ExactDedup(output_dir=tmp_path / "out")(dataset))
    removed = pyarrow.dataset.dataset(tmp_path / "out" / "duplicate_ids.parquet").to_table().to_pylist()
    assert {row["key"]: row["duplicate_of"] for row in removed} == verdict(found)
    assert (tmp_path / "out" / "dedup_summary.csv").read_text() == "eps,kept,removed,total\n,19,5,24\n"


def test_many_buckets_and_groups_change_nothing(dataset: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = computed(ExactDedup("random")(dataset))
    monkeypatch.setattr("nemo_image.dedup.hashes.hash_run.BUCKET_ROWS", 3)
    monkeypatch.setattr("nemo_image.dedup.exchange.scatter.RUN_BYTES", 100)
    monkeypatch.setattr("nemo_image.dedup.exchange.gather.RANGE_ROWS", 5)
    again = computed(ExactDedup("random", output_dir=f"{dataset.path}-out")(dataset))
    pd.testing.assert_frame_equal(again, first)


def test_rows_are_never_judged_by_position(tmp_path: Path, images: Any) -> None:
    dataset = write_images(tmp_path, images)
    wanted = verdict(computed(ExactDedup()(dataset)))
    rng = np.random.default_rng(0)
    for path in tmp_path.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(rng.permutation(len(table))), path)
    assert verdict(computed(ExactDedup()(ImageTextPairDataset.from_webdataset(str(tmp_path))))) == wanted


@pytest.mark.parametrize("operator", [ExactDedup, PerceptualDedup])
def test_no_row_at_all(operator: Any, tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "in", {"a": 3}))
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] < 0]
    made = operator()(dataset)
    found = made.metadata.compute()
    assert len(found) == 0
    assert {"is_duplicate", "duplicate_of", "duplicate_tier"} <= set(found.columns)


def test_no_row_has_a_hash(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{number:06d}", {"jpg": b""}) for number in range(3)])
    write_rows(tmp_path / "a.parquet", {"key": [f"{number:06d}" for number in range(3)]})
    found = PerceptualDedup()(ImageTextPairDataset.from_webdataset(tmp_path)).metadata.compute()
    assert len(found) == 3
    assert found["image_error"].notna().all()
    assert found["duplicate_of"].isna().all()
    assert not found["is_duplicate"].fillna(False).any()
