"""Stages that do not fit together are an error before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_image.errors import ArgumentError, PipelineError
from nemo_image.pipeline import Pipeline
from nemo_image.stages.base import CompositeStage, ProcessingStage
from nemo_image.stages.embedder import ImageEmbeddingStage
from nemo_image.stages.filters import CaptionFilterStage, ExpressionFilterStage, ImageFilterStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.partition import FilePartitioningStage
from nemo_image.stages.score_filters import ImageAestheticFilterStage, ImageNSFWFilterStage
from nemo_image.stages.tasks import DocumentBatch, FileGroup, ImageBatch
from tests.pipeline.stages_of_tests import DropOdd, Groups, Images


class ToTable(ProcessingStage[ImageBatch, DocumentBatch]):
    pass


class OfTable(ProcessingStage[DocumentBatch, FileGroup]):
    pass


class Own(ImageFilterStage):
    def keep(self, image: ImageObject) -> bool:
        return True


PARTITION = FilePartitioningStage("/data")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "has no stages"),
        ([Images()], "the first stage, 'images', needs input"),
        ([PARTITION, Images(), Groups(1)], "stage 3, 'groups', takes no input"),
        (
            [PARTITION, DropOdd()],
            "'drop_odd' takes ImageBatch, but 'file_partitioning' before it gives FileGroup: put ImageReaderStage",
        ),
        ([PARTITION, Images(), OfTable()], "put ConvertImageBatchToDocumentBatchStage between"),
        (
            [PARTITION, Images(), ToTable(), DropOdd()],
            "'drop_odd' takes ImageBatch, but 'to_table' before it gives DocumentBatch",
        ),
        (
            [PARTITION, Images(), ImageAestheticFilterStage()],
            "'image_aesthetic_filter' needs 'embedding' of each image, which no stage .*: add ImageEmbeddingStage",
        ),
        ([PARTITION, Images(), ImageNSFWFilterStage(), ImageEmbeddingStage()], "'image_nsfw_filter' needs 'embedding'"),
        (
            [PARTITION, Images(), ImageEmbeddingStage(), ExpressionFilterStage("aesthetic_score > 5")],
            "'expression_filter' needs 'aesthetic_score'.*: add ImageAestheticFilterStage",
        ),
    ],
)
def test_what_does_not_fit(stages: list[Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline("p", stages=stages).build()


def test_what_fits() -> None:
    stages = [
        PARTITION,
        Images(),
        Own(),
        CaptionFilterStage(),
        ImageEmbeddingStage(),
        Own(),
        ImageAestheticFilterStage(),
        ExpressionFilterStage("aesthetic_score > 5 and seen_by_user is None"),
        ToTable(),
        OfTable(),
    ]
    assert len(Pipeline("p", stages=stages).build()) == 10


def test_a_stage_that_says_no_types_fits_anywhere() -> None:
    class Plain(ProcessingStage):  # type: ignore[type-arg]
        def process(self, task: Any) -> Any:
            return task

    assert Plain.task_types() == (None, None)
    Pipeline(
        "p", stages=[PARTITION, Plain(), Images(), Plain(), ImageEmbeddingStage(), Plain(), ImageAestheticFilterStage()]
    ).build()


def test_types_are_those_of_the_class_that_says_them() -> None:
    assert Own.task_types() == (ImageBatch, ImageBatch)
    assert PARTITION.task_types()[1] is FileGroup


def test_a_composite_of_composites_is_refused() -> None:
    class Inner(CompositeStage[FileGroup, ImageBatch]):
        def decompose(self) -> list[Any]:
            return [Images()]

    class Outer(CompositeStage[FileGroup, ImageBatch]):
        def decompose(self) -> list[Any]:
            return [Inner()]

    assert [one.name for one in Pipeline("p", stages=[PARTITION, Inner()]).build()] == ["file_partitioning", "images"]
    with pytest.raises(PipelineError, match=r"'outer' decomposes into \['inner'\]"):
        Pipeline("p", stages=[PARTITION, Outer()]).build()


def test_add_stage_takes_stages_only() -> None:
    with pytest.raises(ArgumentError, match=r"write DropOdd\(\.\.\.\)"):
        Pipeline("p").add_stage(DropOdd)
    with pytest.raises(ArgumentError, match="must be a ProcessingStage"):
        Pipeline("p").add_stage("drop")


def test_add_stage_can_be_chained() -> None:
    pipeline = Pipeline("p").add_stage(PARTITION).add_stage(Images())
    assert [one.name for one in pipeline.stages] == ["file_partitioning", "images"]
    assert repr(pipeline) == "Pipeline('p', [file_partitioning, images])"


def test_describe() -> None:
    text = Pipeline("p", "what it is for", [PARTITION, Images(), ImageEmbeddingStage("/models")]).describe()
    for said in (
        "Pipeline: p",
        "Description: what it is for",
        "Stage 1: file_partitioning (FilePartitioningStage)",
        "file_paths: '/data'",
        "Stage 3: image_embedding (ImageEmbeddingStage)",
        "Resources: 1 CPUs, 0.25 GPUs",
        "Inputs: image_data",
        "Outputs: embedding",
    ):
        assert said in text
    assert "_embedder" not in text
