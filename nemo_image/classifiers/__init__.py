"""Scores of images, computed from their embeddings."""

from nemo_image.classifiers.aesthetic import AestheticClassifier
from nemo_image.classifiers.base import ImageClassifier
from nemo_image.classifiers.nsfw import NsfwClassifier

__all__ = ["AestheticClassifier", "ImageClassifier", "NsfwClassifier"]
