"""Image-text datasets: a lazy frame of metadata, and where its samples lie."""

from nemo_image.datasets.clip_retrieval import read_clip_retrieval, write_clip_retrieval
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.datasets.search import SearchResult

__all__ = ["ImageTextPairDataset", "SearchResult", "read_clip_retrieval", "write_clip_retrieval"]
