"""Blur and brightness of images, from their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.decoding.each import value_of_each
from nemo_image.errors import ArgumentError
from nemo_image.filters.image_columns import ImageColumns, Measured, Values, add_image_columns
from nemo_image.filters.image_size import SIZES, with_ratio
from nemo_image.filters.luma import laplacian_variance, luma_of, mean_luma
from nemo_image.shards.decode import decode_pillow
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader

BLUR = "blur"
"""Variance of the Laplacian of the luma (float32): the lower, the more blurred."""

BRIGHTNESS = "brightness"
"""Mean luma (float32), from 0, black, to 255, white."""

QUALITIES = {BLUR: "float32", BRIGHTNESS: "float32"}


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
        """Return the values of each picture, or why it cannot be decoded."""
        return value_of_each(reader.read_many(members), _Measurer(len(self.names)), self.num_threads)


@dataclass(frozen=True)
class _Measurer:
    """Measures a picture: blur and brightness, and its size if `values` is more than 2."""

    values: int

    def __call__(self, blob: bytes) -> Values:
        header, picture = decode_pillow(blob)
        luma = luma_of(picture)
        made = laplacian_variance(luma), mean_luma(luma), *with_ratio(header.width, header.height)
        return made[: self.values]
