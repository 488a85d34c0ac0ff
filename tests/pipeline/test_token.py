"""What makes two pipelines the same to a checkpoint and an output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.pipeline.token import pipeline_token
from nemo_image.stages import (
    CaptionFilterStage,
    ImageDuplicatesRemovalStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
)
from nemo_image.stages.base import ProcessingStage, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from tests.makers import TINY_MODEL

WRITER = ImageWriterStage("out")
CONTEXT = RunContext("test")


def token(*stages: ProcessingStage[Any, Any], last: ProcessingStage[Any, Any] = WRITER) -> str:
    return pipeline_token([stage.prepare(CONTEXT) for stage in stages], last)


def embedding(**options: Any) -> ImageEmbeddingStage:
    return ImageEmbeddingStage(**{"model_name": TINY_MODEL, "random_weights": True, "autocast": False, **options})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (ImageReaderStage(), ImageReaderStage(verbose=False, num_threads=2, num_gpus_per_worker=0)),
        (embedding(), embedding(verbose=True, remove_image_data=True)),
        (CaptionFilterStage(), CaptionFilterStage(name="other")),
    ],
)
def test_how_a_run_goes_is_no_part_of_it(one: Any, two: Any) -> None:
    assert token(one) == token(two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (ImageReaderStage(), ImageReaderStage(on_error="keep")),
        (embedding(), embedding(model_inference_batch_size=8)),
        (embedding(), embedding(model_name="test_resnet")),
        (CaptionFilterStage(), CaptionFilterStage(min_words=2)),
        (CaptionFilterStage(), embedding()),
    ],
)
def test_what_comes_out_is(one: Any, two: Any) -> None:
    assert token(one) != token(two)


def test_where_it_writes_to_is_no_part_of_it_and_how_is() -> None:
    assert token(last=ImageWriterStage("a")) == token(last=ImageWriterStage("b"))
    assert token(last=ImageWriterStage("a")) != token(last=ImageWriterStage("a", images_per_tar=7))


def test_the_order_of_stages() -> None:
    assert token(CaptionFilterStage(), embedding()) != token(embedding(), CaptionFilterStage())


def test_a_probed_number_type_is_no_part_of_it() -> None:
    one, two = embedding().prepare(CONTEXT), embedding().prepare(CONTEXT)
    assert two._embedder is not None
    two._embedder.dtype = "bfloat16"
    assert pipeline_token([one], WRITER) == pipeline_token([two], WRITER)


def test_the_content_of_a_removal_list_and_not_its_place(tmp_path: Path) -> None:
    made = []
    for name, ids in (("a", ["1"]), ("b", ["1", "2"])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"id": ids}), tmp_path / name / "x.parquet")
        made.append(token(ImageDuplicatesRemovalStage(str(tmp_path / name))))
    assert made[0] != made[1]
    assert made[0] == token(ImageDuplicatesRemovalStage(str(tmp_path / "a")))


def test_the_code_of_a_users_own_stage() -> None:
    def stage(limit: int) -> ProcessingStage[Any, Any]:
        class Own(ProcessingStage[ImageBatch, ImageBatch]):
            def process(self, task: ImageBatch) -> ImageBatch:
                return task.with_images([image for image in task.data if self.keeps(image)])

            if limit == 1:

                def keeps(self, image: ImageObject) -> bool:
                    return len(image.image_id) > 1

            else:

                def keeps(self, image: ImageObject) -> bool:
                    return len(image.image_id) > 2

        return Own()

    assert token(stage(1)) == token(stage(1))
    assert token(stage(1)) != token(stage(2))
