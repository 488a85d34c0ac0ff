"""Embedders: add a vector for each image to a dataset."""

from nemo_image.embedders.base import ImageEmbedder
from nemo_image.embedders.timm import TimmImageEmbedder

__all__ = ["ImageEmbedder", "TimmImageEmbedder"]
