"""Blur and brightness of images, from their pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine import threads
from nemo_image.engine.decoding.isolated import Guarded, Isolated, Parts
from nemo_image.engine.decoding.pool import for_each_row
from nemo_image.engine.prefetch import prefetch
from nemo_image.errors import ArgumentError, ImageError
from nemo_image.filters.image_columns import ImageColumns, Measured, Values, add_image_columns
from nemo_image.filters.image_size import SIZES, with_ratio
from nemo_image.filters.luma import laplacian_variance, luma_of, mean_luma
from nemo_image.shards.decode import decode_pillow
from nemo_image.shards.failures import as_image_errors
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader

BLUR = "blur"
"""Variance of the Laplacian of the luma (float32): the lower, the more blurred."""

BRIGHTNESS = "brightness"
"""Mean luma (float32), from 0, black, to 255, white."""

QUALITIES = {BLUR: "float32", BRIGHTNESS: "float32"}

_BATCH = 64
"""Pictures that are decoded together."""


class ImageQualityStats:
    """Adds how sharp and how bright each picture is. The pictures are decoded for it, at their full size.

    Adds ``blur`` (float32: variance of the Laplacian of the 8-bit luma, low for blurred pictures; Pech-Pacheco and
    others, ICPR 2000), ``brightness`` (float32: mean luma, 0 to 255) and ``image_error``. Blur depends on a picture's
    size and content: look at some pictures before choosing a threshold; 100 is a usual first try.

    Parameters
    ----------
    sizes : bool, default False
        Add what :class:`ImageSizeStats` adds, too, in the same reading of the tars.
    num_threads : int, default 4
        Pictures that are decoded at the same time, if the task may use so many cores.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    """

    def __init__(self, sizes: bool = False, num_threads: int = 4) -> None:
        if num_threads < 1:
            raise ArgumentError(f"num_threads must be at least 1, not {num_threads}")
        self.sizes = sizes
        self.num_threads = num_threads

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the columns added, lazily."""
        kinds = QUALITIES | (SIZES if self.sizes else {})
        return add_image_columns(
            dataset,
            lambda source, outputs: QualityColumns(source, outputs, tuple(kinds), self.num_threads),
            kinds,
            {"operator": "ImageQualityStats"},
        )

    def __repr__(self) -> str:
        return f"ImageQualityStats(sizes={self.sizes}, num_threads={self.num_threads})"


class QualityColumns(ImageColumns):
    """Decodes and measures a partition's pictures."""

    def __init__(
        self, source: DatasetSource, outputs: Mapping[str, Any], names: tuple[str, ...], num_threads: int
    ) -> None:
        super().__init__(source, outputs)
        self.names = names
        self.num_threads = num_threads

    def measure(self, reader: ShardReader, members: Sequence[Member]) -> Measured:
        """Yield the values of each picture, or why it cannot be decoded."""
        measurer = Measurer(len(self.names), min(self.num_threads, threads.task_share()))
        with (
            Guarded(measurer, lambda: Isolated(measurer, _merged)) as guarded,
            closing(prefetch(_batches(reader.read_many(members)))) as ready,
        ):
            for some in ready:
                yield from guarded(some).outcomes


@dataclass(frozen=True)
class MeasuredBatch:
    """The values of each of several pictures, or why there are none."""

    outcomes: list[Values | ImageError]

    @property
    def errors(self) -> list[str | None]:
        """The reason of each picture that has no values."""
        return [outcome.reason if isinstance(outcome, ImageError) else None for outcome in self.outcomes]


@dataclass(frozen=True)
class Measurer:
    """Decodes and measures pictures, in threads: blur and brightness, and their size if `values` is more than 2."""

    values: int
    num_threads: int

    def __call__(self, blobs: Sequence[bytes | None]) -> MeasuredBatch:
        """Return the values of each picture.

        Raises
        ------
        DecoderStalledError
            If a picture takes longer than its time limit.
        """
        outcomes: list[Values | ImageError] = [()] * len(blobs)

        def one(row: int) -> None:
            blob = blobs[row] or b""
            try:
                with as_image_errors(blob):
                    header, picture = decode_pillow(blob)
                    luma = luma_of(picture)
                    made = laplacian_variance(luma), mean_luma(luma), *with_ratio(header.width, header.height)
                    outcomes[row] = made[: self.values]
            except ImageError as error:
                outcomes[row] = error.with_traceback(None)  # its frames would keep the picture alive

        for_each_row(one, len(blobs), self.num_threads)
        return MeasuredBatch(outcomes)


def _merged(count: int, parts: Parts[MeasuredBatch]) -> MeasuredBatch:
    outcomes: list[Values | ImageError] = [()] * count
    for rows, part in parts:
        made = [_as_error(part)] if isinstance(part, str) else part.outcomes
        for row, outcome in zip(rows, made, strict=True):
            outcomes[row] = outcome
    return MeasuredBatch(outcomes)


def _as_error(reason: str) -> ImageError:
    category, _, detail = reason.partition(": ")
    return ImageError(category, detail)


def _batches(blobs: Iterable[bytes]) -> Iterator[list[bytes]]:
    waiting = iter(blobs)
    while some := list(islice(waiting, _BATCH)):
        yield some
