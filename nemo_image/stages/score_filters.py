"""Stages that score images from their embeddings, and keep those on the right side of a threshold."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from nemo_image import schema
from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.classifiers.clip_l14 import ClipL14Classifier
from nemo_image.engine import threads
from nemo_image.errors import ArgumentError
from nemo_image.stages.base import Fields, ProcessingStage, Resources, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.models import check_model_dir, provide_head
from nemo_image.stages.tasks import FileGroup, ImageBatch

logger = logging.getLogger("nemo_image")


@dataclass
class ScoreFilterStage(ProcessingStage[ImageBatch, ImageBatch]):
    """What the filters by a published head have in common.

    Parameters
    ----------
    model_dir : str, optional
        The folder of the head's published file, which is downloaded into it if it is not there; by default
        ``NEMO_IMAGE_HOME``. All workers must see it.
    num_gpus_per_worker : float, default 0.25
        The share of a GPU; 0 is the CPU.
    model_inference_batch_size : int, default 32
        Embeddings that the head sees at once.
    score_threshold : float
    verbose : bool, default False
        Log a line for each file group.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    filter : bool, default True
        With False, images are scored and all of them stay.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    model_dir: str | None = None
    num_gpus_per_worker: float = 0.25
    model_inference_batch_size: int = 32
    score_threshold: float = 0.5
    verbose: bool = False
    remove_image_data: bool = False
    filter: bool = True
    name: str = ""
    _classifier: ClipL14Classifier | None = field(default=None, init=False, repr=False)
    _device: str = field(default="cpu", init=False, repr=False)

    thread_safe = True
    score: ClassVar[str]
    classifier_type: ClassVar[type[ClipL14Classifier]]

    def __post_init__(self) -> None:
        self.model_dir = check_model_dir(self.model_dir)
        size = self.model_inference_batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ArgumentError(f"model_inference_batch_size must be a whole number, at least 1, not {size!r}")
        threshold = self.score_threshold
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not math.isfinite(threshold):
            raise ArgumentError(f"score_threshold must be a number, not {threshold!r}")
        self.resources = Resources(gpus=self.num_gpus_per_worker)
        self.check_scale()

    def check_scale(self) -> None:
        """Warn of a threshold that is off the score's scale, or raise if it can only be a mistake."""

    def passes(self, value: float) -> bool:
        """Tell whether a score is on the right side of the threshold."""
        raise NotImplementedError

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["embedding"]

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], [self.score]

    def prepare(self, context: RunContext) -> ScoreFilterStage:
        """Find the head's weights, or bring them here.

        Raises
        ------
        WeightsError
            Before any task starts.
        """
        prepared = copy.copy(self)
        prepared._classifier = self._load()
        prepared._device = context.device(self.resources.gpus)
        return prepared

    def connect(self, earlier: Sequence[ProcessingStage[Any, Any]], later: Sequence[ProcessingStage[Any, Any]]) -> None:
        """Check that the embeddings are those that the head takes.

        Raises
        ------
        EmbeddingError
            If a stage before makes others.
        """
        assert self._classifier is not None
        made_by = {name: made for stage in earlier for name, made in stage.column_fingerprints().items()}
        self._embedded_by = made_by.get(schema.IMAGE_EMBEDDING)
        if self._embedded_by is not None:
            self._classifier.check_origin(self._embedded_by)

    def column_fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what makes the scores, as the operator says it."""
        if self._classifier is None:
            return {}
        return {self.score: self._classifier.fingerprint(getattr(self, "_embedded_by", None))}

    def stream(self, tasks: Iterator[ImageBatch], group: FileGroup) -> Iterator[ImageBatch]:
        """Work on all batches of a file group."""
        seen = kept = 0
        for task in tasks:
            seen += len(task.data)
            made = self.process(task)
            kept += len(made.data)
            yield made
        if self.verbose:
            logger.info("%s: %s: %d of %d images kept", self.name, group.name, kept, seen)

    def process(self, task: ImageBatch) -> ImageBatch:
        """Score the images of a batch; return it with those that stay."""
        if self._classifier is None:
            self._classifier = self._load()
        self._score(task.data)
        if self.remove_image_data:
            for image in task.data:
                image.drop_pixels()
        if not self.filter:
            return task
        return task.with_images([image for image in task.data if self._keeps(image)])

    def _load(self) -> ClipL14Classifier:
        path = provide_head(self.model_dir, self.classifier_type.source)
        classifier = self.classifier_type(batch_size=self.model_inference_batch_size, model_path=path)  # type: ignore[call-arg]
        classifier.prepare()
        return classifier

    def _score(self, images: Sequence[ImageObject]) -> None:
        import torch

        assert self._classifier is not None
        embedded = [image for image in images if image.embedding is not None]
        if not embedded:
            return
        vectors = torch.from_numpy(np.stack([np.asarray(image.embedding, np.float32) for image in embedded]))
        with threads.torch_threads(1):
            values = self._classifier.score(vectors, self._device)
        for image, value in zip(embedded, values.tolist(), strict=True):
            setattr(image, self.score, None if value is None or math.isnan(value) else value)

    def _keeps(self, image: ImageObject) -> bool:
        value = getattr(image, self.score)
        if value is None:
            self.log_metric("dropped without score")
            return False
        return self.passes(value)


@dataclass
class ImageAestheticFilterStage(ScoreFilterStage):
    """Scores how good images look, and keeps those with ``aesthetic_score >= score_threshold``.

    The scale is about 1 to 10; 5 to 6.5 are usual thresholds. The default is 5.
    """

    score_threshold: float = 5.0
    name: str = "image_aesthetic_filter"

    score = schema.AESTHETIC_SCORE
    classifier_type = AestheticClassifier

    def check_scale(self) -> None:
        """Warn of a threshold that keeps nearly all or nothing."""
        if self.filter and not 1 <= self.score_threshold <= 10:
            keeps = "nearly all images" if self.score_threshold < 1 else "none"
            logger.warning(
                "%s: score_threshold=%g keeps %s: aesthetic scores go from about 1 to 10, and 5 to 6.5 are usual",
                self.name,
                self.score_threshold,
                keeps,
            )

    def passes(self, value: float) -> bool:
        """Tell whether a score is high enough."""
        return value >= self.score_threshold


@dataclass
class ImageNSFWFilterStage(ScoreFilterStage):
    """Scores how likely images are not safe for work, and keeps those with ``nsfw_score < score_threshold``.

    The scale is 0 to 1; higher is less safe.
    """

    name: str = "image_nsfw_filter"

    score = schema.NSFW_SCORE
    classifier_type = NsfwClassifier

    def check_scale(self) -> None:
        """Refuse a threshold that is no probability; warn of those that keep nothing.

        Raises
        ------
        ArgumentError
            If it is not in [0, 1].
        """
        if not 0 <= self.score_threshold <= 1:
            raise ArgumentError(
                f"score_threshold={self.score_threshold:g}: NSFW scores lie from 0 to 1, and images below the "
                "threshold stay"
            )
        if self.filter and self.score_threshold == 0:
            logger.warning("%s: score_threshold=0 keeps no image: scores are 0 or more", self.name)

    def passes(self, value: float) -> bool:
        """Tell whether a score is low enough."""
        return value < self.score_threshold
