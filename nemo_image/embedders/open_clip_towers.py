"""The two halves of an open_clip model, each a callable that gives vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_image.embedders.text.tokens import CaptionTokenizer


class _ImageTower(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.network.encode_image(pixels, normalize=False)
        return made


class _TextTower(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.network.encode_text(tokens, normalize=False)
        return made


@dataclass
class Towers:
    """The towers of one model, and its tokenizer once it is asked for.

    Attributes
    ----------
    image : callable
        From normalised pixels (n, 3, height, width) to vectors (n, size), not normalised.
    text : callable
        From tokens (n, context length) to vectors (n, size), not normalised.
    """

    image: Any
    text: Any
    _tokenizer: CaptionTokenizer | None = None
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, network: Any, *, compiled: bool = False) -> Towers:
        """Return the towers of a model that is on its device."""
        image, text = _ImageTower(network).eval(), _TextTower(network).eval()
        return cls(torch.compile(image), torch.compile(text)) if compiled else cls(image, text)

    def tokenizer(self, load: Callable[[], CaptionTokenizer]) -> CaptionTokenizer:
        """Return the model's tokenizer, loaded on first use."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load()
            return self._tokenizer
