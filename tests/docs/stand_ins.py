"""What the pages take from the internet, in small: the weights of CLIP and those of the published heads.

A network keeps its name, its input and its 768 (or 512) numbers; inside is one seeded layer over the picture in 8 × 8
pixels.
The heads are the real ones, with seeded weights. As a preload
(:data:`PRELOAD`) this module puts them into Dask's workers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.embedders import open_clip_models, timm_models
from tests.classifiers.makers import aesthetic_state, nsfw_state

PRELOAD = {"distributed.worker.preload": ["tests.docs.stand_ins"]}
CLIP = "vit_large_patch14_clip"
SIZE = 768

PUBLISHED = AestheticClassifier.source

_create = timm_models.create_model
_identified = open_clip_models.identified_model


class SmallTower(nn.Module):
    """A picture of 224 × 224 to 768 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(3 * 8 * 8, SIZE)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(self.pool(pixels).flatten(1))
        return made


def create_model(name: str, pretrained: bool, weights: str | None) -> Any:
    """Stand in for timm's CLIP ViT-L/14, whatever file or hub its weights should come from; others are timm's own."""
    return SmallTower().eval() if name.startswith(CLIP) else _create(name, pretrained, weights)


class SmallPair(nn.Module):
    """A picture of 224 × 224, or 77 tokens, to 512 numbers: open_clip's ViT-B-32."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.words = nn.Linear(3 * 8 * 8, 512), nn.EmbeddingBag(49408, 512)

    def encode_image(self, pixels: torch.Tensor, normalize: bool) -> torch.Tensor:
        made: torch.Tensor = self.layer(self.pool(pixels).flatten(1))
        return made

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        made: torch.Tensor = self.words(tokens)
        return made


def identified_model(model: open_clip_models.OpenClipModel) -> tuple[Any, str]:
    """Stand in for open_clip's ViT-B-32, whatever its weights; others are open_clip's own."""
    return (SmallPair().eval(), "a stand-in") if model.name == "ViT-B-32" else _identified(model)


def write_heads(folder: Path) -> Path:
    """Write the heads' files, by their published names: all pictures look good (about 6) and safe (about 0.1)."""
    folder.mkdir(parents=True, exist_ok=True)
    aesthetic = aesthetic_state()
    aesthetic["layers.7.weight"] *= 0.01
    aesthetic["layers.7.bias"].fill_(6)
    torch.save(aesthetic, folder / AestheticClassifier.source.filename)
    nsfw = nsfw_state()
    nsfw["linear_4.weight"] *= 0.01
    nsfw["linear_4.bias"].fill_(-2)
    torch.save(nsfw, folder / NsfwClassifier.source.filename)
    return folder


def install() -> None:
    """Put the stand-ins in place."""
    timm_models.create_model = create_model
    open_clip_models.identified_model = identified_model
    # Seeded weights have not the published file's SHA-256.
    AestheticClassifier.source = dataclasses.replace(PUBLISHED, sha256=None)


def remove() -> None:
    """Put back what is there for users."""
    timm_models.create_model = _create
    open_clip_models.identified_model = _identified
    AestheticClassifier.source = PUBLISHED


def dask_setup(worker: Any) -> None:
    """Do so in a worker that starts: Dask calls this of a preload."""
    install()
