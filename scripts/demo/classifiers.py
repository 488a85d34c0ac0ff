"""Two classifiers of one's own, on the embeddings of EfficientNet-Lite0: how sure is the network, and of what?

An embedding is what the network's last layer gets, 1280 numbers. That layer turns it into the 1000 classes of ImageNet;
its weights lie in the same file as the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from nemo_image.classifiers import ImageClassifier


class ImageNetConfidence(ImageClassifier):
    """Adds the probability that the network gives to the class that it thinks likeliest: 0.001 to 1, float32."""

    def __init__(self, weights: Path) -> None:
        super().__init__(
            model_name="tf_efficientnet_lite0 classifier",
            embedding_column="image_embedding",
            pred_column="confidence",
            pred_type="float32",
            batch_size=-1,
            embedding_size=1280,
        )
        self.weights = weights

    def load_model(self, device: str) -> Callable[[Tensor], Tensor]:
        """Return a callable from embeddings, (n, 1280), to probabilities, (n,)."""
        layer = last_layer(self.weights, device)
        return lambda embeddings: layer(embeddings).softmax(dim=1).amax(dim=1)


class ImageNetLabel(ImageClassifier):
    """Adds the name of that class."""

    def __init__(self, weights: Path) -> None:
        super().__init__(
            model_name="tf_efficientnet_lite0 classifier",
            embedding_column="image_embedding",
            pred_column="label",
            pred_type="string",
            batch_size=-1,
            embedding_size=1280,
        )
        self.weights = weights

    def load_model(self, device: str) -> Callable[[Tensor], Tensor]:
        """Return a callable from embeddings, (n, 1280), to class numbers, (n,)."""
        layer = last_layer(self.weights, device)
        return lambda embeddings: layer(embeddings).argmax(dim=1)

    def postprocess(self, series: pd.Series) -> pd.Series:
        """Turn class numbers into names."""
        name_of = ImageNetInfo().index_to_description
        return series.map(lambda number: name_of(int(number)))


def last_layer(weights: Path, device: str) -> torch.nn.Linear:
    """Load the network's classifier: 1280 numbers to 1000."""
    state = load_file(weights, device=device)
    layer = torch.nn.Linear(1280, 1000, device=device)
    layer.load_state_dict({"weight": state["classifier.weight"], "bias": state["classifier.bias"]})
    return layer
