"""Clustering and comparison as two steps with files between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import ClusteringModel, SemanticClusterLevelDedup, SemanticDedup
from nemo_image.errors import ArgumentError, DatasetError
from tests.dedup.makers import clustered_vectors, computed, write_embeddings
from tests.dedup.oracle import expected, wrong_clusters

ROWS = 300


@pytest.fixture
def dataset(tmp_path: Path) -> ImageTextPairDataset:
    return write_embeddings(tmp_path / "data", clustered_vectors(ROWS, 12, 20, 0.5), 3)


def clustered(dataset: ImageTextPairDataset, tmp_path: Path) -> pd.DataFrame:
    model = ClusteringModel(n_clusters=5, clustering_output_dir=tmp_path / "clusters")
    return computed(model(dataset)).rename(columns={"key": "id", "image_embedding": "embedding"})


def test_clusters_are_right_and_saved(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    found = clustered(dataset, tmp_path)
    assert wrong_clusters(found, np.load(tmp_path / "clusters" / "kmeans_centroids.npy")) == {}
    assert found["cluster"].nunique() == 5
    saved = ClusteringModel(n_clusters=5, clustering_output_dir=tmp_path / "clusters")(dataset).save_metadata()
    assert computed(saved)["cluster"].tolist() == found["cluster"].tolist()


@pytest.mark.parametrize("order", ["hard", "easy"])
def test_comparison_is_as_published(dataset: ImageTextPairDataset, tmp_path: Path, order: Any) -> None:
    rows = clustered(dataset, tmp_path)
    step = SemanticClusterLevelDedup(5, tmp_path / "clusters", which_to_keep=order, output_dir=tmp_path / "out")
    step.compute_semantic_match_dfs()
    for eps in (0.02, 0.3):
        removed = step.extract_dedup_data(eps).compute()
        wanted = expected(rows, eps, order, representative=False)
        chosen = wanted["is_duplicate"].to_numpy(bool)
        ours = removed.astype(str).set_index("key")["duplicate_of"].to_dict()
        assert ours == dict(zip(rows.loc[chosen, "id"], wanted.loc[chosen, "duplicate_of"], strict=True))
        on_disk = pyarrow.dataset.dataset(tmp_path / "out" / "duplicate_ids.parquet").to_table()
        assert on_disk.num_rows == chosen.sum() > 0
        lines = (tmp_path / "out" / "dedup_summary.csv").read_text().splitlines()
        assert lines == ["eps,kept,removed,total", f"{eps},{ROWS - chosen.sum()},{chosen.sum()},{ROWS}"]
    matches = pyarrow.dataset.dataset(tmp_path / "out" / "matches").to_table().to_pandas().set_index("key")
    np.testing.assert_array_equal(
        matches.loc[rows["id"], "max_similarity"].to_numpy(np.float32), wanted["max_similarity"].to_numpy()
    )


def test_both_steps_equal_the_one(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    clustered(dataset, tmp_path)
    step = SemanticClusterLevelDedup(5, tmp_path / "clusters", sim_metric="l2", output_dir=tmp_path / "out")
    step.compute_semantic_match_dfs()
    removed = set(step.extract_dedup_data(0.1).compute()["key"])
    whole = computed(SemanticDedup(n_clusters=5, eps=0.1, representative=False)(dataset))
    assert removed == set(whole.loc[whole["is_duplicate"], "key"])


def test_steps_out_of_order_or_place(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    step = SemanticClusterLevelDedup(5, tmp_path / "clusters", output_dir=tmp_path / "out")
    with pytest.raises(DatasetError, match="holds no finished clustering"):
        step.compute_semantic_match_dfs()
    clustered(dataset, tmp_path)
    with pytest.raises(DatasetError, match=r"call compute_semantic_match_dfs\(\) first"):
        step.extract_dedup_data(0.1)
    with pytest.raises(ArgumentError, match=r"n_clusters is 7, but the clustering in .* has 5"):
        SemanticClusterLevelDedup(7, tmp_path / "clusters").compute_semantic_match_dfs()
    with pytest.raises(ArgumentError, match="id_column is 'url'"):
        SemanticClusterLevelDedup(5, tmp_path / "clusters", id_column="url").compute_semantic_match_dfs()
    with pytest.raises(ArgumentError, match=r"eps_to_extract must lie in \[0, 1\], not 2"):
        step.extract_dedup_data(2)
    with pytest.raises(ArgumentError, match="sim_metric"):
        SemanticClusterLevelDedup(5, "x", sim_metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="hold no columns to keep by"):
        SemanticClusterLevelDedup(5, "x", which_to_keep=("score", True))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="batched_cosine_similarity"):
        SemanticClusterLevelDedup(5, "x", batched_cosine_similarity=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(DatasetError, match="holds something else"):
        ClusteringModel(n_clusters=2, clustering_output_dir=tmp_path / "other")(dataset)
    with pytest.raises(DatasetError, match="another"):
        ClusteringModel(n_clusters=2, clustering_output_dir=tmp_path / "clusters")(dataset)
    with pytest.raises(ArgumentError, match="n_clusters=1000 is more than the 300 rows"):
        ClusteringModel(clustering_output_dir=tmp_path / "default")(dataset)
