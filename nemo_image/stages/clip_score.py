"""Embeds the images of batches and their captions with an open_clip model, and scores each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_image import schema
from nemo_image.embedders import OpenClipImageEmbedder
from nemo_image.embedders.open_clip_prepared import PreparedPairEmbedder
from nemo_image.embedders.prepared import PreparedNetworkEmbedder
from nemo_image.embedders.text.pairs import best_of_each, cosines
from nemo_image.embedders.text.sources import texts_of
from nemo_image.stages.base import Fields
from nemo_image.stages.embedder import Embedding, ImageEmbeddingStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.models import find_weights


@dataclass
class ClipScoreStage(ImageEmbeddingStage):
    """Gives each image its embedding, its caption's, and the cosine of the two.

    They are ``image.embedding`` and ``image.text_embedding``, float32 (size,), L2-normalised, and ``image.clip_score``:
    those that :class:`~nemo_image.embedders.OpenClipImageEmbedder` makes. An image without a caption gets its embedding
    alone. All images are kept; ``ExpressionFilterStage("clip_score > 0.28")`` behind it chooses.

    The parameters that are not here are those of :class:`~nemo_image.stages.ImageEmbeddingStage`.

    Parameters
    ----------
    model_dir : str, optional
        A folder with ``<model name>.safetensors``, ``.pt`` or ``.pth``. Weights that are not there come from the hub.
    model_name : str, default "ViT-L-14"
        open_clip's name.
    pretrained : str or None, default "openai"
        The tag of the weights.
    caption_field : str, optional
        The field of an image's metadata that holds its caption, or a list of them, of which the best counts; by
        default ``image.caption``.
    """

    name: str = "clip_score"
    model_name: str = "ViT-L-14"
    pretrained: str | None = "openai"
    caption_field: str | None = None

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], ["embedding", "text_embedding", "clip_score"]

    def column_fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what makes the embeddings and the score, as the operator says it."""
        embedder = self._embedder
        if embedder is None:
            return {}
        assert isinstance(embedder, PreparedPairEmbedder)
        source = "image.caption" if self.caption_field is None else f"image.metadata:{self.caption_field}"
        text = {**embedder.text_fingerprint(), "captions": [source]}
        return {**super().column_fingerprints(), schema.TEXT_EMBEDDING: text, schema.CLIP_SCORE: text}

    def load_embedder(self, device: str) -> PreparedNetworkEmbedder:
        """Find the weights, and return the embedder on a device."""
        weights = None if self.model_dir is None else find_weights(self.model_dir, self.model_name)
        embedder = OpenClipImageEmbedder(
            self.model_name,
            None if self.random_weights else self.pretrained,
            weights=weights,
            batch_size=self.model_inference_batch_size,
            autocast=self.autocast,
        )
        return embedder.load(device)

    def work(self, embedder: PreparedNetworkEmbedder) -> Embedding:
        """Return what embeds and scores images, as many as the model is to see at once."""
        assert isinstance(embedder, PreparedPairEmbedder)
        return PairEmbedding(embedder, self.caption_field)


class PairEmbedding(Embedding):
    """Embeds images and their captions, and scores the pairs.

    Parameters
    ----------
    embedder : PreparedPairEmbedder
    caption_field : str or None
        The field of an image's metadata that holds its captions; None: its caption.
    """

    def __init__(self, embedder: PreparedPairEmbedder, caption_field: str | None) -> None:
        super().__init__(embedder)
        self.pairs = embedder
        self.caption_field = caption_field

    def __call__(self, images: list[ImageObject]) -> tuple[list[ImageObject], list[Any]]:
        """Return the images with the embedding of each; write those of captions, and the scores, into the images."""
        images, vectors = super().__call__(images)
        owners: list[int] = []
        cleaned: list[str] = []
        for row, image in enumerate(images):
            image.text_embedding = image.clip_score = None
            for text in self._captions(image) if vectors[row] is not None else ():
                owners.append(row)
                cleaned.append(text)
        if cleaned:
            self._score(images, vectors, owners, cleaned)
        return images, vectors

    def _captions(self, image: ImageObject) -> list[str]:
        value = image.caption if self.caption_field is None else image.metadata.get(self.caption_field)
        cleaned = map(self.pairs.tokenizer.clean, texts_of(value))
        return [text for text in cleaned if text]

    def _score(self, images: list[ImageObject], vectors: list[Any], owners: Sequence[int], cleaned: list[str]) -> None:
        texts = self.pairs.embed_cleaned(cleaned)
        scores = cosines(np.stack([vectors[row] for row in owners]), texts)
        norms = np.linalg.norm(texts.astype(np.float64), axis=1)
        for best in best_of_each(owners, scores):
            if np.isfinite(scores[best]):
                image = images[owners[best]]
                image.text_embedding = (texts[best] / norms[best]).astype(np.float32)
                image.clip_score = float(scores[best])
