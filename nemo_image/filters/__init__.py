"""Filters: expressions over a dataset's columns."""

from nemo_image.filters.expression import KeepExpression, keep

__all__ = ["KeepExpression", "keep"]
