"""Stages of a pipeline: read, embed, score and filter, remove duplicates, write."""

from nemo_image import errors as _errors

try:
    from nemo_image.stages.base import CompositeStage, ProcessingStage, Resources
    from nemo_image.stages.cheap_filters import BlocklistFilterStage, ImageQualityFilterStage, ImageStatsStage
    from nemo_image.stages.clip_score import ClipScoreStage
    from nemo_image.stages.documents import ConvertImageBatchToDocumentBatchStage, ParquetWriter
    from nemo_image.stages.embedder import ImageEmbeddingStage
    from nemo_image.stages.filters import (
        CaptionFilterStage,
        ExpressionFilterStage,
        ImageFilterStage,
        ImageSizeFilterStage,
    )
    from nemo_image.stages.image_object import ImageObject
    from nemo_image.stages.partition import FilePartitioningStage
    from nemo_image.stages.reader import ImageReaderStage
    from nemo_image.stages.removal import ImageDuplicatesRemovalStage
    from nemo_image.stages.score_filters import ImageAestheticFilterStage, ImageNSFWFilterStage
    from nemo_image.stages.tasks import DocumentBatch, EmptyTask, FileGroup, ImageBatch, Task
    from nemo_image.stages.writer import ImageWriterStage
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise _errors.MissingDependencyError(
        "stages need torch: pip install 'nemo-image[image_cpu]', or [image_cuda12] on a GPU machine"
    ) from error

__all__ = [
    "BlocklistFilterStage",
    "CaptionFilterStage",
    "ClipScoreStage",
    "CompositeStage",
    "ConvertImageBatchToDocumentBatchStage",
    "DocumentBatch",
    "EmptyTask",
    "ExpressionFilterStage",
    "FileGroup",
    "FilePartitioningStage",
    "ImageAestheticFilterStage",
    "ImageBatch",
    "ImageDuplicatesRemovalStage",
    "ImageEmbeddingStage",
    "ImageFilterStage",
    "ImageNSFWFilterStage",
    "ImageObject",
    "ImageQualityFilterStage",
    "ImageReaderStage",
    "ImageSizeFilterStage",
    "ImageStatsStage",
    "ImageWriterStage",
    "ParquetWriter",
    "ProcessingStage",
    "Resources",
    "Task",
]
