"""Deduplication of a dataset on an S3 server: all of its files lie there, and the result is that of a local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import DedupResult, ExactDedup, PerceptualDedup, SemanticDedup
from tests.dedup.makers import clustered_vectors, computed, write_embeddings
from tests.makers import make_dataset


@pytest.fixture
def store(bucket: str) -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def upload(store: Any, folder: Path, root: str) -> ImageTextPairDataset:
    for path in folder.glob("0*"):
        store.pipe_file(f"{root.removeprefix('s3://')}/{path.name}", path.read_bytes())
    return ImageTextPairDataset.from_webdataset(root)


def test_semantic(bucket: str, store: Any, tmp_path: Path) -> None:
    vectors = list(clustered_vectors(80, 8, 8, 0.5))
    local = write_embeddings(tmp_path / "in", vectors, 2)
    wanted = computed(SemanticDedup(n_clusters=2, eps=0.05, n_probe=2)(local))
    remote = upload(store, tmp_path / "in", f"{bucket}/in")

    dedup = SemanticDedup(n_clusters=2, eps=0.05, n_probe=2, output_dir=f"{bucket}/out")
    found = dedup(remote)

    pd.testing.assert_frame_equal(computed(found), wanted)
    assert found.save_metadata().provenance["is_duplicate"]["operator"] == "SemanticDedup"
    assert DedupResult.read(f"{bucket}/out") == dedup.result_
    root = f"{bucket}/out/".removeprefix("s3://")
    left = {name.removeprefix(root).partition("/")[0] for name in store.find(root)}
    assert left == {
        "plan.json",
        "result.json",
        "dedup_summary.csv",
        "duplicate_ids.parquet",
        "kmeans_centroids.npy",
        "rows",
    }
    assert not [name for name in store.find(f"{bucket}/in") if "/clusters-" in name]


def test_hashes(bucket: str, store: Any, tmp_path: Path) -> None:
    local = ImageTextPairDataset.from_webdataset(str(make_dataset(tmp_path / "in", {"00000": 4, "00001": 3})))
    remote = upload(store, tmp_path / "in", f"{bucket}/in")
    wanted = computed(PerceptualDedup(max_distance=30)(ExactDedup()(local)))
    pd.testing.assert_frame_equal(computed(PerceptualDedup(max_distance=30)(ExactDedup()(remote))), wanted)
    assert wanted["is_duplicate"].any()
