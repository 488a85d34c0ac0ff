"""How likely a picture is not safe for work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from nemo_image import schema
from nemo_image.classifiers.clip_l14 import ClipL14Classifier
from nemo_image.engine.weights import WeightsSource

if TYPE_CHECKING:
    import torch


class NsfwClassifier(ClipL14Classifier):
    """Adds LAION's NSFW score: 0 to 1, higher is less safe.

    Parameters
    ----------
    embedding_column : str, default "image_embedding"
        L2-normalised CLIP ViT-L/14 embeddings of 768 numbers.
    pred_column : str, default "nsfw_score"
        The column to add, float32.
    batch_size : int, default -1
        Embeddings at once; -1 for a whole partition.
    model_path : str or path, optional
        A local file of the weights; without it the published one is taken from ``NEMO_IMAGE_HOME``, and is downloaded
        into it first if it is not there.
    """

    source: ClassVar[WeightsSource] = WeightsSource(
        url="https://github.com/LAION-AI/CLIP-based-NSFW-Detector/files/10250461/clip_autokeras_binary_nsfw.zip",
        filename="clip_autokeras_binary_nsfw.pth",
        member="clip_autokeras_binary_nsfw.pth",
    )

    def __init__(
        self,
        embedding_column: str = schema.IMAGE_EMBEDDING,
        pred_column: str = schema.NSFW_SCORE,
        batch_size: int = -1,
        model_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__("clip_autokeras_binary_nsfw", embedding_column, pred_column, batch_size, model_path)

    @staticmethod
    def build(state: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
        """Return the NSFW network."""
        from nemo_image.classifiers.heads import NsfwHead, load_head

        return load_head(NsfwHead, state, where)
