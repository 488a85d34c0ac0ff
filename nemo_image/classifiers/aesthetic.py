"""How good a picture looks, as people rated it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from nemo_image import schema
from nemo_image.classifiers.clip_l14 import ClipL14Classifier
from nemo_image.engine.weights import WeightsSource

if TYPE_CHECKING:
    import torch


class AestheticClassifier(ClipL14Classifier):
    """Adds LAION's aesthetic score: about 1 to 10, unbounded, higher is better; 5 to 6.5 are usual thresholds.

    Parameters
    ----------
    embedding_column : str, default "image_embedding"
        L2-normalised CLIP ViT-L/14 embeddings of 768 numbers.
    pred_column : str, default "aesthetic_score"
        The column to add, float32.
    batch_size : int, default -1
        Embeddings at once; -1 for a whole partition.
    model_path : str or path, optional
        A local file of the weights; without it the published one is taken from ``NEMO_IMAGE_HOME``, and is downloaded
        into it first if it is not there.
    """

    source: ClassVar[WeightsSource] = WeightsSource(
        url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        filename="sac+logos+ava1-l14-linearMSE.pth",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    )

    def __init__(
        self,
        embedding_column: str = schema.IMAGE_EMBEDDING,
        pred_column: str = schema.AESTHETIC_SCORE,
        batch_size: int = -1,
        model_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__("sac+logos+ava1-l14-linearMSE", embedding_column, pred_column, batch_size, model_path)

    @staticmethod
    def build(state: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
        """Return the aesthetic network."""
        from nemo_image.classifiers.heads import AestheticHead, load_head

        return load_head(AestheticHead, state, where)
