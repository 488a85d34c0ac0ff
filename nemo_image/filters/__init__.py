"""Filters: columns that need no model, and expressions over columns that say which rows to keep."""

from nemo_image.filters.blocklist import Blocklist
from nemo_image.filters.caption_duplicates import CaptionDuplicates
from nemo_image.filters.caption_stats import CaptionLanguage, CaptionStats
from nemo_image.filters.choose import add_columns
from nemo_image.filters.expression import KeepExpression
from nemo_image.filters.image_quality import ImageQualityStats
from nemo_image.filters.image_size import ImageSizeStats
from nemo_image.filters.keeping import keep, keep_with_thresholds

__all__ = [
    "Blocklist",
    "CaptionDuplicates",
    "CaptionLanguage",
    "CaptionStats",
    "ImageQualityStats",
    "ImageSizeStats",
    "KeepExpression",
    "add_columns",
    "keep",
    "keep_with_thresholds",
]
