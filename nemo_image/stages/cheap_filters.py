"""Stages that measure images and captions without a model, and those that keep images by it or by a list."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from nemo_image.errors import ArgumentError, ImageError
from nemo_image.filters import Blocklist
from nemo_image.filters.blocklist import HASHES
from nemo_image.filters.caption_stats import LANGUAGES, require_detector
from nemo_image.filters.entries import HashFile, hash_texts
from nemo_image.stages.base import Fields, ProcessingStage, RunContext
from nemo_image.stages.filters import ImageFilterStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.measures import MEASURES, measure, needs
from nemo_image.stages.tasks import ImageBatch


@dataclass
class ImageStatsStage(ProcessingStage[ImageBatch, ImageBatch]):
    """Adds measures of the image and its caption to the metadata, which is written; no image is dropped.

    Parameters
    ----------
    columns : list of str
        Of ``width``, ``height``, ``aspect_ratio``, ``blur``, ``brightness`` (these two decode the picture),
        ``caption_length``, ``caption_words``, ``caption_alphanumeric``, ``caption_language`` and
        ``caption_language_score``: what the operators of `nemo_image.filters` of the same columns say.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    """

    columns: Sequence[str]
    name: str = "image_stats"
    remove_image_data: bool = False

    thread_safe = True

    def __post_init__(self) -> None:
        names = [self.columns] if isinstance(self.columns, str) else list(self.columns)
        unknown = [name for name in names if name not in MEASURES]
        if unknown or not names:
            raise ArgumentError(f"columns: {unknown or 'nothing'} is no measure; there are {', '.join(MEASURES)}")
        self.columns = names
        if set(names) & LANGUAGES.keys():
            require_detector()

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], needs(self.columns)

    def process(self, task: ImageBatch) -> ImageBatch:
        """Return the batch with the measures in its images' metadata; null where a picture is bad."""
        ours = [name for name in self.columns if name not in ("width", "height")]  # images have these themselves
        for image in task.data:
            image.metadata |= dict.fromkeys(ours)
            if image.image_error is None:
                try:
                    found = measure(image, self.columns)
                except ImageError:  # `image_error` now says so
                    self.log_metric("bad images found")
                    continue
                image.metadata |= {name: found[name] for name in ours}
        made = task.with_images(task.data)
        others = [one for one in task.fields if one.name not in ours]
        made.fields = pa.schema([*others, *(pa.field(name, MEASURES[name]) for name in ours)])
        return made


@dataclass
class ImageQualityFilterStage(ImageFilterStage):
    """Keeps pictures that are sharp enough, and neither too dark nor too bright. They are decoded for it.

    Parameters
    ----------
    min_blur : float, default 0
        Least variance of the Laplacian of the luma: blurred pictures have little. 100 is a usual first try.
    min_brightness, max_brightness : float, default 0 and 255
        Of the mean luma.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    """

    min_blur: float = 0.0
    min_brightness: float = 0.0
    max_brightness: float = 255.0
    name: str = "image_quality_filter"
    remove_image_data: bool = False

    thread_safe = True

    def __post_init__(self) -> None:
        for name in ("min_blur", "min_brightness", "max_brightness"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ArgumentError(f"{name} must be a number, at least 0, not {value!r}")
        if self.max_brightness < self.min_brightness or self.min_brightness > 255:
            raise ArgumentError(
                f"min_brightness={self.min_brightness:g} and max_brightness={self.max_brightness:g} keep nothing: "
                "brightness lies from 0 to 255"
            )

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["image_data"]

    def keep(self, image: ImageObject) -> bool:
        """Tell whether a picture is sharp and bright enough."""
        found = measure(image, ("blur", "brightness"))
        if found["blur"] is None:
            return False
        return bool(
            found["blur"] >= self.min_blur and self.min_brightness <= found["brightness"] <= self.max_brightness
        )


@dataclass
class BlocklistFilterStage(ImageFilterStage):
    """Drops images that a list names: by id, by URL or another field, or by the image's stored bytes.

    Parameters
    ----------
    entries : str
        The list's file, as :class:`~nemo_image.filters.Blocklist` takes it. Or a list of the entries themselves.
    list_dir : str
        A folder that all workers see: the list's sorted hashes are put there.
    column : str, default "key"
        The field of the metadata to look up; ``key`` is the sample's key.
    content_hash : {"sha256", "xxh3_128"}, optional
        Look up the hash of the image's bytes instead.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    """

    entries: str | Sequence[str | int]
    list_dir: str
    column: str | None = None
    content_hash: str | None = None
    name: str = "blocklist_filter"
    remove_image_data: bool = False
    _hashes: HashFile | None = field(default=None, init=False, repr=False)

    thread_safe = True
    keeps_bad_images = True

    def __post_init__(self) -> None:
        self._list()

    def _list(self) -> Blocklist:
        return Blocklist(
            self.entries,
            self.column,
            content_hash=self.content_hash,  # type: ignore[arg-type]  # checked there
            output_dir=self.list_dir,
        )

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["image_id"]

    def prepare(self, context: RunContext) -> BlocklistFilterStage:
        """Read the list.

        Raises
        ------
        ArgumentError, MissingColumnError
            If it cannot be read.
        """
        prepared = copy.copy(self)
        prepared._hashes = self._list().write(self.list_dir, self.column or "key", {})
        return prepared

    def made_of(self) -> Any:
        """Return what tells the list from others."""
        return None if self._hashes is None else self._hashes.digest

    def process(self, task: ImageBatch) -> ImageBatch:
        """Return the batch without the images that the list names."""
        if self._hashes is None:
            self._hashes = self._list().write(self.list_dir, self.column or "key", {})
        texts = [self._text(image) for image in task.data]
        blocked = self._hashes.contains(hash_texts(texts)) & np.array([bool(text) for text in texts], bool)
        self.log_metric("removed", int(blocked.sum()))
        return task.with_images([image for image, goes in zip(task.data, blocked, strict=True) if not goes])

    def _text(self, image: ImageObject) -> str:
        if self.content_hash is not None:
            data = image.image_bytes
            return "" if data is None else HASHES[self.content_hash][0](data)
        column = self.column or "key"
        value = image.metadata.get(column, image.image_id if column == "key" else None)
        return "" if value is None else str(value)
