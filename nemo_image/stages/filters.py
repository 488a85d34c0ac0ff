"""Stages that keep some images and drop the others: the base of your own, those by caption, size and expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import schema
from nemo_image.errors import ArgumentError, ImageError
from nemo_image.filters import KeepExpression
from nemo_image.filters.caption_stats import LANGUAGES, caption_language, caption_lengths, require_detector
from nemo_image.stages.base import Fields, ProcessingStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.measures import MEASURES, measure, needs
from nemo_image.stages.tasks import ImageBatch

ATTRIBUTES = {
    schema.KEY: pa.string(),
    "image_id": pa.string(),
    schema.SHARD: pa.string(),
    schema.CAPTION: pa.string(),
    schema.WIDTH: pa.int32(),
    schema.HEIGHT: pa.int32(),
    schema.AESTHETIC_SCORE: pa.float32(),
    schema.NSFW_SCORE: pa.float32(),
    schema.IMAGE_ERROR: pa.string(),
}
"""What an expression may say of an image besides its metadata."""

SCORES = (schema.AESTHETIC_SCORE, schema.NSFW_SCORE)


class ImageFilterStage(ProcessingStage[ImageBatch, ImageBatch]):
    """Keeps images. A filter of your own overrides :meth:`keep`, and nothing else.

    Images that could not be decoded (with an ``image_error``) are dropped unless `keeps_bad_images`; they are not shown
    to :meth:`keep`.

    Attributes
    ----------
    keeps_bad_images : bool
        Whether images that could not be decoded stay.
    """

    keeps_bad_images: bool = False

    def keep(self, image: ImageObject) -> bool:
        """Tell whether an image stays."""
        raise NotImplementedError(f"{type(self).__name__} must override keep(image)")

    def process(self, task: ImageBatch) -> ImageBatch:
        """Return the batch with the images that stay."""
        return task.with_images([image for image in task.data if self._keeps(image)])

    def _keeps(self, image: ImageObject) -> bool:
        if image.image_error is None:
            try:
                return bool(self.keep(image))
            except ImageError:  # decoded for the first time: `image_error` now says so
                self.log_metric("bad images found")
        return self.keeps_bad_images


@dataclass
class CaptionFilterStage(ImageFilterStage):
    """Keeps images by the length of their caption.

    Parameters
    ----------
    min_length, max_length : int, optional
        In characters, without white space at the ends.
    min_words, max_words : int, optional
        In words, separated by white space.
    min_alphanumeric : float, default 0
        Least share of letters and digits, of any script, among the characters: 0 to 1.
    languages : sequence of str, optional
        ISO 639 codes, such as ``["en", "de"]``: captions in other languages are dropped. Needs py3langid.
    min_language_score : float, default 0
        Least probability of the language, 0 to 1.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    """

    min_length: int = 1
    max_length: int | None = None
    min_words: int = 0
    max_words: int | None = None
    min_alphanumeric: float = 0.0
    languages: Sequence[str] | None = None
    min_language_score: float = 0.0
    name: str = "caption_filter"
    remove_image_data: bool = False

    thread_safe = True

    def __post_init__(self) -> None:
        _require_range("length", self.min_length, self.max_length)
        _require_range("words", self.min_words, self.max_words)
        for name in ("min_alphanumeric", "min_language_score"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ArgumentError(f"{name} must lie from 0 to 1, not {value!r}")
        if self.languages is not None:
            if isinstance(self.languages, str) or not self.languages:
                raise ArgumentError(f"languages must be a list of codes, such as ['en'], not {self.languages!r}")
            require_detector()
        elif self.min_language_score:
            raise ArgumentError("min_language_score says nothing without languages")

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["caption"]

    def keep(self, image: ImageObject) -> bool:
        """Tell whether an image's caption is long enough, and not too long; no caption counts as an empty one."""
        length, words, alphanumeric = caption_lengths(image.caption or "")
        if not (_within(length, self.min_length, self.max_length) and _within(words, self.min_words, self.max_words)):
            return False
        if alphanumeric < self.min_alphanumeric:
            return False
        if self.languages is None:
            return True
        language, score = caption_language(image.caption or "")
        return language in self.languages and score >= self.min_language_score


@dataclass
class ImageSizeFilterStage(ImageFilterStage):
    """Keeps images by the size of the stored picture, in pixels. Nothing is decoded for it.

    Parameters
    ----------
    min_width, min_height : int, default 0
    max_width, max_height : int, optional
    max_aspect_ratio : float, optional
        Of the longer side to the shorter one, at least 1.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    """

    min_width: int = 0
    min_height: int = 0
    max_width: int | None = None
    max_height: int | None = None
    max_aspect_ratio: float | None = None
    name: str = "image_size_filter"
    remove_image_data: bool = False

    thread_safe = True

    def __post_init__(self) -> None:
        _require_range("width", self.min_width, self.max_width)
        _require_range("height", self.min_height, self.max_height)
        ratio = self.max_aspect_ratio
        if ratio is not None and not (isinstance(ratio, int | float) and ratio >= 1):
            raise ArgumentError(f"max_aspect_ratio must be at least 1, not {ratio!r}")

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["width", "height"]

    def keep(self, image: ImageObject) -> bool:
        """Tell whether an image is large enough, and not too large or too long."""
        size = image.stored_size()
        if size is None:
            return False
        width, height = size
        if not (_within(width, self.min_width, self.max_width) and _within(height, self.min_height, self.max_height)):
            return False
        return self.max_aspect_ratio is None or max(size) <= self.max_aspect_ratio * min(size)


@dataclass
class ExpressionFilterStage(ImageFilterStage):
    """Keeps images by an expression over their scores, sizes and metadata: ``aesthetic_score > 5 and width >= 256``.

    Parameters
    ----------
    expression : str
        As ``nemo-image curate --keep`` takes it. Names are those of an image's attributes, of its metadata, or else of
        what can be measured without a model: ``aspect_ratio``, ``blur``, ``caption_words`` … (see
        :class:`~nemo_image.stages.ImageStatsStage`). Not a quantile, such as ``clip_score in top 30%``: a pipeline sees
        some images at a time, and which they are depends on all.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.

    Raises
    ------
    ArgumentError
        If it is no such expression.
    """

    expression: str
    name: str = "expression_filter"
    remove_image_data: bool = False

    thread_safe = True

    def __post_init__(self) -> None:
        self._parsed = KeepExpression(self.expression)
        if self._parsed.quantiles:
            raise ArgumentError(
                f"{self.expression!r}: which rows are {self._parsed.quantiles[0]} depends on all rows, and a stage "
                "sees some at a time. Let the pipeline score and write all images (filter: false), then choose among "
                "them: with the workflow nemo_image.pipeline.KeepWorkflow in YAML, nemo-image curate --keep, or "
                "nemo_image.filters.keep(dataset, ...) in Python"
            )
        if any(name in LANGUAGES for name in self._parsed.columns):
            require_detector()

    def inputs(self) -> Fields:
        """Return what the stage needs: those names that only a stage gives, and what measures are made of."""
        names = self._parsed.columns
        return ["data"], list(dict.fromkeys([*(name for name in names if name in SCORES), *needs(names)]))

    def keep(self, image: ImageObject) -> bool:
        """Tell whether the expression is true of an image."""
        return bool(self.process(ImageBatch([image])).data)

    def process(self, task: ImageBatch) -> ImageBatch:
        """Return the batch with the images of which the expression is true.

        Raises
        ------
        MissingColumnError
            If it names something that no image of the batch has.
        """
        good = [image for image in task.data if image.image_error is None or self.keeps_bad_images]
        given = {*task.fields.names}.union(*(image.metadata for image in good))
        wanted = [name for name in self._parsed.columns if name in MEASURES and name not in given]
        measures = {id(image): self._measured(image, wanted) for image in good}
        good = [image for image in good if image.image_error is None or self.keeps_bad_images]
        if not good:
            return task.with_images([])
        kept = self._parsed(self._frame(task, good, wanted, measures)).tolist()
        return task.with_images([image for image, keeps in zip(good, kept, strict=True) if keeps])

    def _measured(self, image: ImageObject, names: list[str]) -> dict[str, Any]:
        if image.image_error is not None:
            return {}
        try:
            return measure(image, names)
        except ImageError:  # decoded for the first time: `image_error` now says so
            self.log_metric("bad images found")
            return {}

    def _frame(
        self, task: ImageBatch, images: list[ImageObject], measured: list[str], measures: dict[int, dict[str, Any]]
    ) -> pd.DataFrame:
        present = {*ATTRIBUTES, *MEASURES, *task.fields.names}.union(*(image.metadata for image in images))
        if any(image.embedding is not None for image in images):
            present.add(schema.CLIP_SCORE)  # null where no image of the batch has a caption
        self._parsed.require_columns(sorted(present))
        columns = {}
        for name in self._parsed.columns:
            if name in measured:
                array = pa.array([measures[id(image)].get(name) for image in images], MEASURES[name])
            else:
                array = pa.array([_value(image, name) for image in images], ATTRIBUTES.get(name))
            if pa.types.is_null(array.type) and name == schema.CLIP_SCORE:
                array = array.cast(pa.float32())
            if pa.types.is_null(array.type) and name in task.fields.names:
                array = array.cast(task.fields.field(name).type)
            columns[name] = pd.Series(pd.arrays.ArrowExtensionArray(array))
        return pd.DataFrame(columns)


def _value(image: ImageObject, name: str) -> Any:
    if name in (schema.WIDTH, schema.HEIGHT):
        size = image.stored_size()
        return None if size is None else size[name == schema.HEIGHT]
    if name == schema.KEY:
        return image.image_id
    if name == schema.CLIP_SCORE and image.clip_score is not None:
        return image.clip_score
    return getattr(image, name) if name in ATTRIBUTES else image.metadata.get(name)


def _require_range(what: str, low: Any, high: Any) -> None:
    for name, value in ((f"min_{what}", low), (f"max_{what}", high)):
        if value is not None and not (isinstance(value, int) and value >= 0):
            raise ArgumentError(f"{name} must be a whole number, at least 0, not {value!r}")
    if high is not None and high < low:
        raise ArgumentError(f"min_{what}={low} is more than max_{what}={high}: nothing would be kept")


def _within(value: int, low: int, high: int | None) -> bool:
    return low <= value and (high is None or value <= high)
