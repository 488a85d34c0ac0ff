"""Which filter makes a column: so that an expression that names one brings it along."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.filters.caption_duplicates import CAPTION_COUNT, CAPTION_IS_DUPLICATE, CaptionDuplicates
from nemo_image.filters.caption_stats import LANGUAGES, LENGTHS, CaptionLanguage, CaptionStats
from nemo_image.filters.image_quality import QUALITIES, ImageQualityStats
from nemo_image.filters.image_size import SIZES, ImageSizeStats

OF_ALL_ROWS = (CAPTION_COUNT, CAPTION_IS_DUPLICATE)
"""Columns for which the whole dataset is gone through when their filter is called."""

MADE_BY_FILTERS = (*SIZES, *QUALITIES, *LENGTHS, *LANGUAGES, *OF_ALL_ROWS)
"""The columns that the filters of this package make by themselves."""


def add_columns(
    dataset: ImageTextPairDataset, names: Iterable[str], caption_column: str | None = None
) -> ImageTextPairDataset:
    """Add those of the columns named that a filter makes and the dataset lacks, with as few readings as can be.

    Parameters
    ----------
    dataset : ImageTextPairDataset
        With an embedder, apply that first: it makes the sizes by the way.
    names : iterable of str
        Any names; those that no filter makes are passed over. All columns are lazy but ``caption_count`` and
        ``caption_is_duplicate``, for which the dataset is gone through now.
    caption_column : str, optional
        As for :class:`CaptionStats`.

    Raises
    ------
    MissingColumnError, ArgumentError
        If `caption_column` is not there, or holds no text.
    MissingDependencyError
        If a language is asked for and py3langid is not installed.
    """
    lacking = set(names) - set(dataset.metadata.columns)
    if lacking & QUALITIES.keys():
        dataset = ImageQualityStats(sizes=bool(lacking & SIZES.keys()))(dataset)
    elif lacking & SIZES.keys():
        dataset = ImageSizeStats()(dataset)
    if lacking & LENGTHS.keys():
        dataset = CaptionStats(caption_column)(dataset)
    if lacking & LANGUAGES.keys():
        dataset = CaptionLanguage(caption_column)(dataset)
    if lacking & {*OF_ALL_ROWS}:
        dataset = CaptionDuplicates(caption_column)(dataset)
    return dataset
