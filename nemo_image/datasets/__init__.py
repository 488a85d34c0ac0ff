"""Image-text datasets: a lazy frame of metadata, and where its samples lie."""

from nemo_image.datasets.image_text_pair import ImageTextPairDataset

__all__ = ["ImageTextPairDataset"]
