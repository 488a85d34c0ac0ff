"""The two published networks, with the names that their state dicts use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from nemo_image.errors import WeightsError

Head = TypeVar("Head", bound=nn.Module)


class AestheticHead(nn.Module):
    """LAION's improved aesthetic predictor: linear layers without activations, 768 to 1024, 128, 64, 16 and 1.

    The dropout layers do nothing in evaluation mode; they hold the numbers of the layers in place. Source:
    https://github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (n, 768), L2-normalised, to ratings (n, 1), about 1 to 10."""
        ratings: Tensor = self.layers(embeddings)
        return ratings


class Standardize(nn.Module):
    """Subtracts a stored mean and divides by the square root of a stored variance, number by number."""

    mean: Tensor
    variance: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, values: Tensor) -> Tensor:
        """Map values (n, size) to values of the same shape."""
        return (values - self.mean) / self.variance.sqrt()


class NsfwHead(nn.Module):
    """LAION's CLIP-based NSFW detector: standardised, then 768 to 64, 512, 256 and 1, ReLU between, sigmoid.

    Source: https://github.com/LAION-AI/CLIP-based-NSFW-Detector.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = Standardize(768)
        self.linear_1 = nn.Linear(768, 64)
        self.linear_2 = nn.Linear(64, 512)
        self.linear_3 = nn.Linear(512, 256)
        self.linear_4 = nn.Linear(256, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (n, 768), L2-normalised, to probabilities (n, 1)."""
        hidden = self.norm(embeddings)
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            hidden = layer(hidden).relu()
        logits: Tensor = self.linear_4(hidden)
        return logits.sigmoid()


def load_head(head_class: type[Head], state: Mapping[str, Tensor], where: str) -> Head:
    """Build a head in evaluation mode from a state dict that fits it exactly.

    Parameters
    ----------
    head_class : type
        :class:`AestheticHead` or :class:`NsfwHead`.
    state : dict of str to Tensor
        Its weights; copied as float32.
    where : str
        The file that they came from, for errors.

    Raises
    ------
    WeightsError
        If names or sizes differ, or a number is not finite.
    """
    # No memory and no random numbers for weights that are replaced at once.
    with torch.device("meta"):
        head = head_class()
    wanted = head.state_dict()
    sizes = [
        f"{name} is {_size(state[name])}, not {_size(wanted[name])}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    found = {
        "lacks": [name for name in wanted if name not in state],
        "has": [name for name in state if name not in wanted],
        "differs in size:": sizes,
        "holds numbers that are not finite in": [name for name in state if not state[name].isfinite().all()],
    }
    faults = [f"{what} {_some(names)}" for what, names in found.items() if names]
    if faults:
        raise WeightsError(f"{where} does not hold weights of {head_class.__name__}: it {'; it '.join(faults)}")
    copies = {name: state[name].detach().to("cpu", torch.float32, copy=True) for name in wanted}
    head.load_state_dict(copies, assign=True)
    return head.requires_grad_(False).eval()


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
