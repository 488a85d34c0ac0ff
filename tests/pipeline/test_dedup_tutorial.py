"""The tutorial of duplicate removal, end to end: embed, find duplicates, remove them, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nemo_image.pipeline import DaskExecutor, Pipeline, PipelineResults, SemanticDeduplicationWorkflow
from nemo_image.pipeline.workflows import ExactDeduplicationWorkflow
from nemo_image.stages import (
    ConvertImageBatchToDocumentBatchStage,
    FilePartitioningStage,
    ImageDuplicatesRemovalStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
    ParquetWriter,
)
from tests.makers import TINY_MODEL, encoded, picture, tar_members, write_tar

SEEDS = {"a": [0, 1, 2, 3, 1], "b": [4, 0, 5, 6], "c": [6, 7, 8, 2, 9, 9]}
"""Which picture each sample shows; ids repeat in the tars."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for shard, seeds in SEEDS.items():
        samples = [
            (
                f"{number:04d}",
                {"jpg": encoded(picture(seed), quality=90), "txt": f"{shard}{number} shows {seed}".encode()},
            )
            for number, seed in enumerate(seeds)
        ]
        write_tar(folder / f"{shard}.tar", samples)
    return folder


def read(source: Path) -> list[Any]:
    return [FilePartitioningStage(str(source)), ImageReaderStage(batch_size=2, verbose=False)]


def removed(source: Path, found: Path, target: Path, executor: DaskExecutor) -> PipelineResults:
    stages = [
        *read(source),
        ImageDuplicatesRemovalStage(removal_parquets_dir=str(found), duplicate_id_field="id"),
        ImageWriterStage(output_dir=str(target), images_per_tar=4),
    ]
    return Pipeline("remove", stages=stages).run(executor)


def shown(folder: Path) -> list[int]:
    """Return which pictures the captions in the tars say."""
    members = [data for tar in folder.glob("*.tar") for name, data in tar_members(tar).items() if name.endswith("txt")]
    return sorted(int(text.decode().rpartition(" ")[2]) for text in members)


@pytest.mark.parametrize("n_clusters", [1, 3])
def test_embed_find_remove_write(source: Path, tmp_path: Path, n_clusters: int, scheduler: Any) -> None:
    executor = DaskExecutor(scheduler) if scheduler is not None else DaskExecutor(processes=False)
    embed = [
        *read(source),
        ImageEmbeddingStage(model_name=TINY_MODEL, random_weights=True, autocast=False),
        ConvertImageBatchToDocumentBatchStage(fields=["image_id", "embedding"]),
        ParquetWriter(path=str(tmp_path / "embeddings")),
    ]
    Pipeline("embed", stages=embed).run(executor)
    # A network with random weights finds all pictures alike: the threshold lies between copies and the most alike.
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "embeddings").glob("*.parquet"))]
    vectors = np.stack([vector for table in tables for vector in table["embedding"]]).astype(np.float64)
    seeds = [seed for some in SEEDS.values() for seed in some]
    alike = [vectors[one] @ vectors[two] for one in range(15) for two in range(one) if seeds[one] != seeds[two]]
    eps = (1 - max(alike)) / 2
    assert eps > 1e-6
    workflow = SemanticDeduplicationWorkflow(
        input_path=str(tmp_path / "embeddings"),
        output_path=str(tmp_path / "removal"),
        n_clusters=n_clusters,
        id_field="image_id",
        embedding_field="embedding",
        eps=eps,
        verbose=False,
    )
    found = workflow.run(executor)
    assert found.num_duplicates == 5
    results = removed(source, tmp_path / "removal" / "duplicates", tmp_path / "out", executor)
    assert shown(tmp_path / "out") == list(range(10))
    assert results.stage("image_dedup_filter").metrics == {"removed": 5}


def test_exact_copies_need_no_embeddings(source: Path, tmp_path: Path) -> None:
    executor = DaskExecutor(processes=False)
    found = ExactDeduplicationWorkflow(str(source), str(tmp_path / "removal"), verbose=False).run(executor)
    assert found.num_duplicates == 5
    removed(source, tmp_path / "removal" / "duplicates", tmp_path / "out", executor)
    assert shown(tmp_path / "out") == list(range(10))
