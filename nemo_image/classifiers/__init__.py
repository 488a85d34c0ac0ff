"""Scores of images, computed from their embeddings."""

from nemo_image.classifiers.aesthetic import AestheticClassifier
from nemo_image.classifiers.base import ImageClassifier
from nemo_image.classifiers.nsfw import NsfwClassifier
from nemo_image.classifiers.zero_shot import ZeroShotTagger

__all__ = ["AestheticClassifier", "ImageClassifier", "NsfwClassifier", "ZeroShotTagger"]
