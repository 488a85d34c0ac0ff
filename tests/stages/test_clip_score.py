"""Images and captions scored in a pipeline: the operator's values, in the images and in what is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import Client

from nemo_image.backend import to_matrix
from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import OpenClipImageEmbedder
from nemo_image.errors import RunError
from nemo_image.pipeline import Pipeline
from nemo_image.stages import (
    ClipScoreStage,
    ExpressionFilterStage,
    FilePartitioningStage,
    ImageBatch,
    ImageObject,
    ImageReaderStage,
    ImageWriterStage,
)
from tests.embedders.open_clip_models import write_model
from tests.makers import encoded, make_dataset, picture, sample, write_rows, write_tar

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _client() -> Iterator[None]:
    """Without one, a pipeline would start processes."""
    with Client(processes=False, dashboard_address=None, n_workers=1, threads_per_worker=1):
        yield


def stage(name: str, **options: Any) -> ClipScoreStage:
    return ClipScoreStage(model_name=name, pretrained=None, num_gpus_per_worker=0, autocast=False, **options)


def run(folder: Path, out: Path, *stages: Any) -> Any:
    """Run stages between a reader and a writer; return the frame of what they wrote."""
    pipeline = Pipeline(name="scores")
    pipeline.add_stage(FilePartitioningStage(file_paths=str(folder), file_extensions=[".tar"]))
    pipeline.add_stage(ImageReaderStage(batch_size=3, num_gpus_per_worker=0))
    for one in (*stages, ImageWriterStage(output_dir=str(out), images_per_tar=100)):
        pipeline.add_stage(one)
    pipeline.run()
    return ImageTextPairDataset.from_webdataset(out).metadata.compute()


def test_a_pipeline_writes_what_the_operator_makes(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "in", {"a": 5, "b": 3})
    key, members = sample(90, "000090")
    write_tar(tmp_path / "in" / "c.tar", [(key, members)])
    write_rows(tmp_path / "in" / "c.parquet", {"key": [key]})
    made = run(tmp_path / "in", tmp_path / "out", stage(name)).set_index("original_key")
    operator = OpenClipImageEmbedder(name, autocast=False)(ImageTextPairDataset.from_webdataset(tmp_path / "in"))
    wanted = operator.metadata.compute().set_index("key").loc[made.index]
    assert made["clip_score"].isna().tolist() == wanted["clip_score"].isna().tolist() == [False] * 8 + [True]
    assert np.allclose(made["clip_score"].iloc[:8], wanted["clip_score"].iloc[:8], atol=1e-5)
    assert made["clip_score"].dtype == wanted["clip_score"].dtype
    for column in ("image_embedding", "text_embedding"):
        assert np.allclose(to_matrix(made[column])[0], to_matrix(wanted[column])[0], atol=1e-5)
    assert made["clip_score"].iloc[:8].nunique() == 8


def test_a_filter_chooses_by_the_score(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "in", {"a": 6})
    scores = run(tmp_path / "in", tmp_path / "all", stage(name)).set_index("original_key")["clip_score"]
    middle = float(scores.median())
    few = run(tmp_path / "in", tmp_path / "few", stage(name), ExpressionFilterStage(f"clip_score > {middle}"))
    assert few["original_key"].tolist() == scores.index[scores > middle].tolist()
    assert len(few) == 3
    with pytest.raises(RunError, match="names column 'clip_score', which is not there"):
        run(tmp_path / "in", tmp_path / "no", ExpressionFilterStage("clip_score > 0"))


def test_of_several_captions_the_best_counts(name: str) -> None:
    texts = ["a dog", "", "a cat on a mat"]
    images = [
        ImageObject(image_bytes=encoded(picture(1)), metadata={"alt": texts}, caption="unused"),
        ImageObject(image_bytes=encoded(picture(2)), metadata={"alt": " "}),
        ImageObject(image_bytes=b"no picture", metadata={"alt": texts}),
    ]
    made = stage(name, caption_field="alt").process(ImageBatch(images)).data
    embedder = OpenClipImageEmbedder(name)
    scores = embedder.embed_text([texts[0], texts[2]]) @ embedder.embed_pictures([encoded(picture(1))])[0]
    assert made[0].clip_score == pytest.approx(scores.max(), abs=1e-5)
    assert np.allclose(made[0].text_embedding, embedder.embed_text([texts[2 * int(scores.argmax())]])[0], atol=1e-6)
    assert made[1].embedding is not None
    assert [image.clip_score for image in made[1:]] == [None, None]
    assert made[2].image_error is not None


def test_the_stage_in_a_configuration(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "in", {"a": 3})
    (tmp_path / "workflow.yaml").write_text(
        f"""
stages:
  - _target_: nemo_image.stages.FilePartitioningStage
    file_paths: {tmp_path / "in"}
    file_extensions: [.tar]
  - _target_: nemo_image.stages.ImageReaderStage
    num_gpus_per_worker: 0
  - _target_: nemo_image.stages.ClipScoreStage
    model_name: "{name}"
    pretrained: null
    num_gpus_per_worker: 0
    autocast: false
  - _target_: nemo_image.stages.ExpressionFilterStage
    expression: clip_score > -1
  - _target_: nemo_image.stages.ImageWriterStage
    output_dir: {tmp_path / "out"}
"""
    )
    done = CliRunner().invoke(main, ["run", str(tmp_path / "workflow.yaml")])
    assert done.exit_code == 0, done.output
    frame = ImageTextPairDataset.from_webdataset(tmp_path / "out").metadata.compute()
    assert frame["clip_score"].notna().tolist() == [True] * 3
