"""Small open_clip models in folders of their own, and what open_clip itself makes of a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""A CLIP of two small transformers."""

TINY_COCA = {
    **TINY,
    "vision_cfg": {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},  # type: ignore[dict-item]
    "text_cfg": {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True},  # type: ignore[dict-item]
    "multimodal_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}
"""Its towers return tuples."""


def write_model(
    folder: Path, config: dict[str, Any] | None = None, preprocessing: dict[str, Any] | None = None, seed: int = 3
) -> str:
    """Write a model with seeded random weights to a folder, and return its name for open_clip."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": config or TINY, "preprocess_cfg": preprocessing or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return name
