"""The tutorial's pipeline in YAML, with NeMo Curator's names and older arguments, against the same in Python."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.pipeline import DaskExecutor, Pipeline
from nemo_image.pipeline.configuration.build import build_pipeline
from nemo_image.pipeline.configuration.config import load_config
from nemo_image.stages import (
    FilePartitioningStage,
    ImageAestheticFilterStage,
    ImageBatch,
    ImageEmbeddingStage,
    ImageNSFWFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    ProcessingStage,
)
from tests.classifiers.makers import aesthetic_state, nsfw_state
from tests.makers import TINY_MODEL, make_dataset

THREADS = DaskExecutor(processes=False)

TUTORIAL = """
defaults:
  - _self_
  - override hydra/job_logging: none
input_tar_dir: ???
output_dir: ???
model_dir: ???
batch: 4

ray_client:
  _target_: nemo_curator.core.client.RayClient
  num_gpus: 4

stages:
  - _target_: nemo_curator.stages.file_partitioning.FilePartitioningStage
    file_paths: ${input_tar_dir}
    files_per_partition: 1
    file_extensions: [".tar"]
  - _target_: nemo_curator.stages.image.io.image_reader.ImageReaderStage
    task_batch_size: ${batch}
    verbose: true
    num_threads: 2
    num_gpus_per_worker: 0
EMBEDDING
  - _target_: nemo_curator.stages.image.filters.aesthetic_filter.ImageAestheticFilterStage
    model_dir: ${model_dir}
    num_gpus_per_worker: 0
    min_aesthetic_score: 2.0
  - _target_: nemo_curator.stages.image.filters.nsfw_filter.ImageNSFWFilterStage
    model_dir: ${model_dir}
    resources:
      _target_: nemo_curator.stages.resources.Resources
      gpus: 0
    threshold: 0.9
  - _target_: nemo_curator.stages.image.io.image_writer.ImageWriterStage
    output_dir: ${output_dir}
    images_per_tar: 5
    deterministic_name: true
    remove_image_data: true
"""

OWN = f"  - _target_: {__name__}.SeededEmbedding\n"
TINY = f"""
  - _target_: nemo_curator.stages.image.embedders.clip_embedder.ImageEmbeddingStage
    model_name: {TINY_MODEL}
    random_weights: true
    batch_size: 5
    autocast: false
    num_gpus_per_worker: 0
"""


@dataclass
class SeededEmbedding(ProcessingStage[ImageBatch, ImageBatch]):
    """Gives an embedding of CLIP's size that depends on the image's bytes alone: the heads need one."""

    scale: float = 1.0

    def outputs(self) -> Any:
        return ["data"], ["embedding"]

    def process(self, task: ImageBatch) -> ImageBatch:
        for image in task.data:
            seed = hashlib.sha256(image.image_bytes or b"").digest()
            vector = np.random.default_rng(list(seed)).standard_normal(768)
            image.embedding = (self.scale * vector / np.linalg.norm(vector)).astype(np.float32)
        return task


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("source"), {"00000": 11, "00001": 7, "00002": 13})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.save(aesthetic_state(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(nsfw_state(), folder / "clip_autokeras_binary_nsfw.pth")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return an output's files by name, without the records of runs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "_nemo_image" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def overrides(source: Path, target: Path, models: Path) -> list[str]:
    return [f"input_tar_dir={source}", f"output_dir={target}", f"model_dir={models}"]


def test_the_tutorial_in_yaml_and_in_python_write_the_same_bytes(
    source: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head in (AestheticClassifier, NsfwClassifier):  # heads of the test's own are not the published ones
        monkeypatch.setattr(head, "source", replace(head.source, sha256=None))
    config = load_config(TUTORIAL.replace("EMBEDDING", OWN), overrides(source, tmp_path / "yaml", models))
    build_pipeline(config, ["nemo_image", __name__]).run(THREADS)

    pipeline = Pipeline(name="image_curation")
    pipeline.add_stage(FilePartitioningStage(str(source), files_per_partition=1, file_extensions=[".tar"]))
    pipeline.add_stage(ImageReaderStage(batch_size=4, num_threads=2, num_gpus_per_worker=0))
    pipeline.add_stage(SeededEmbedding())
    pipeline.add_stage(ImageAestheticFilterStage(str(models), num_gpus_per_worker=0, score_threshold=2.0))
    pipeline.add_stage(ImageNSFWFilterStage(str(models), num_gpus_per_worker=0, score_threshold=0.9))
    pipeline.add_stage(ImageWriterStage(str(tmp_path / "python"), images_per_tar=5, remove_image_data=True))
    pipeline.run(THREADS)

    made = contents(tmp_path / "yaml")
    assert made == contents(tmp_path / "python")
    rows = pd.concat([pd.read_parquet(tmp_path / "yaml" / name) for name in made if name.endswith(".parquet")])
    assert 0 < len(rows) < 31
    assert (rows["aesthetic_score"] >= 2).all()
    assert (rows["nsfw_score"] < 0.9).all()


def test_the_embedding_stage_by_its_old_name_and_arguments(source: Path, tmp_path: Path) -> None:
    text = TUTORIAL.replace("EMBEDDING", TINY)
    without_heads = text[: text.index("  - _target_: nemo_curator.stages.image.filters")]
    text = (
        without_heads.replace("model_dir: ???\n", "")
        + text[text.index("  - _target_: nemo_curator.stages.image.io.image_writer") :]
    )
    build_pipeline(load_config(text, overrides(source, tmp_path / "yaml", tmp_path)[:2])).run(THREADS)

    embedding = ImageEmbeddingStage(
        model_name=TINY_MODEL,
        random_weights=True,
        model_inference_batch_size=5,
        autocast=False,
        num_gpus_per_worker=0,
    )
    stages = [
        FilePartitioningStage(str(source)),
        ImageReaderStage(batch_size=4, num_gpus_per_worker=0),
        embedding,
        ImageWriterStage(str(tmp_path / "python"), images_per_tar=5),
    ]
    Pipeline("embed", stages=stages).run(THREADS)
    assert contents(tmp_path / "yaml") == contents(tmp_path / "python")
    assert len(contents(tmp_path / "yaml")) == 3 * 7
