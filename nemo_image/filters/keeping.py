"""Mark the rows of a dataset that an expression keeps."""

from __future__ import annotations

import logging

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import MissingColumnError
from nemo_image.filters.choose import MADE_BY_FILTERS
from nemo_image.filters.expression import KeepExpression
from nemo_image.filters.quantiles import Quantile
from nemo_image.filters.thresholds import find_thresholds

logger = logging.getLogger("nemo_image")

Thresholds = dict[Quantile, int | float | None]


def keep(dataset: ImageTextPairDataset, text: str, column: str = schema.KEPT) -> ImageTextPairDataset:
    """Add a boolean column that tells which rows an expression keeps.

    A quantile, as in ``clip_score in top 30% and width >= 200``, is of all rows of `dataset` that have a value,
    whatever the rest of the expression says; nulls and NaNs never count. It is exact: of n values, the ``ceil(0.3 n)``
    largest are kept, and all that equal the smallest of these, so that the result does not depend on the rows' order.
    For the top of a part of the rows, filter ``dataset.metadata`` first.

    Parameters
    ----------
    dataset : ImageTextPairDataset
        Columns that a quantile needs and that are still to compute are computed now, once, into files; then the
        quantiles' columns are read a few times, and nothing else is. Without a quantile, all stays lazy.
    text : str
        See :class:`KeepExpression`.
    column : str
        The column to add.

    Raises
    ------
    ArgumentError, MissingColumnError
        If the expression is unusable with this dataset.
    RunError
        If shards cannot be read for a quantile.
    """
    return keep_with_thresholds(dataset, text, column)[0]


def keep_with_thresholds(
    dataset: ImageTextPairDataset, text: str, column: str = schema.KEPT
) -> tuple[ImageTextPairDataset, dict[str, int | float | None]]:
    """Do what :func:`keep` does; return also the threshold of each quantile, by its text (None: no row has a value)."""
    expression = KeepExpression(text)
    present = list(dataset.metadata.columns)
    to_make = [name for name in expression.columns if name in MADE_BY_FILTERS and name not in present]
    if to_make:
        raise MissingColumnError(
            f"{text!r}: nemo_image.filters.add_columns(dataset, {to_make}) makes what is not there"
        )
    expression.require_columns(present)
    some = expression.with_thresholds(dict.fromkeys(expression.quantiles, 0))
    some(dataset.metadata._meta_nonempty[expression.columns])
    thresholds: Thresholds = {}
    if expression.quantiles:
        dataset, thresholds = find_thresholds(dataset, expression.quantiles)
        expression = expression.with_thresholds(thresholds)
        for one, value in thresholds.items():
            bound = ">=" if one.side == "top" else "<="
            logger.info("%s: %s", one, "no row has a value" if value is None else f"{one.column} {bound} {value!r}")
    kept = dataset.metadata[expression.columns].map_partitions(expression, meta=(column, schema.arrow_dtype("bool")))
    return dataset.with_user_columns({column: kept}), {str(one): value for one, value in thresholds.items()}
