"""What tests of the reader share: groups of tars, stages that want something of pictures, a read with its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_image.embedders.preprocess import Preprocessor, PreprocessSpec, TorchvisionPreprocessor
from nemo_image.stages.base import Fields, ProcessingStage, RunContext, collecting_metrics
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.reader import ImageReaderStage
from nemo_image.stages.tasks import FileGroup, ImageBatch

HALF = (0.5, 0.5, 0.5)
SPEC = PreprocessSpec("shortest", (36, 36), (32, 32), HALF, HALF)


class WantsPixels(ProcessingStage[ImageBatch, ImageBatch]):
    """A stage that looks at pixels."""

    def inputs(self) -> Fields:
        return ["data"], ["image_data"]


class WantsCaptions(ProcessingStage[ImageBatch, ImageBatch]):
    """A stage that does not."""

    def inputs(self) -> Fields:
        return ["data"], ["caption"]


class Input:
    """A model's input."""

    def __init__(self, key: str, spec: PreprocessSpec = SPEC) -> None:
        self.key = key
        self.spec = spec

    def preprocessor(self, num_threads: int) -> Preprocessor:
        return TorchvisionPreprocessor(self.spec, num_threads)


class HasModel(WantsPixels):
    """A stage with a model."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def model_input(self) -> Any:
        return self.made


def group_of(root: Path | str, *tars: str, **more: Any) -> FileGroup:
    """Return a group of tars below a folder."""
    urls = [f"{root}/{tar}" for tar in tars]
    return FileGroup(urls, "file_group_0", "photos", {"from": "a test"}, name="g-0", root=str(root).rstrip("/"), **more)


def connected(stage: ImageReaderStage, *later: ProcessingStage[Any, Any]) -> ImageReaderStage:
    """Return a reader that knows the stages behind it."""
    prepared = stage.prepare(RunContext("test"))
    prepared.connect([], later)
    return prepared


def read(stage: ImageReaderStage, group: FileGroup) -> tuple[list[ImageBatch], dict[str, float]]:
    """Return all batches of a group, and what the stage counted."""
    with collecting_metrics() as metrics:
        batches = list(stage.stream(iter([group]), group))
    return batches, dict(metrics.get(stage.name, Counter()))


def images_of(batches: Sequence[ImageBatch]) -> list[ImageObject]:
    """Return the images of batches, in order."""
    return [image for batch in batches for image in batch.data]
