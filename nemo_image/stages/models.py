"""The folder of models that stages share: what lies there, and how what is missing gets there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from nemo_image.embedders import timm_models
from nemo_image.engine.weights import WeightsSource
from nemo_image.errors import ArgumentError, WeightsError
from nemo_image.shards import files

MODEL_NAMES = {
    "openai/clip-vit-large-patch14": "vit_large_patch14_clip_quickgelu_224.openai",
    "openai/clip-vit-large-patch14-336": "vit_large_patch14_clip_quickgelu_336.openai",
    "openai/clip-vit-base-patch16": "vit_base_patch16_clip_quickgelu_224.openai",
    "openai/clip-vit-base-patch32": "vit_base_patch32_clip_quickgelu_224.openai",
}
"""The hub's names of models, and timm's names of the same."""

SUFFIXES = (".safetensors", ".pt", ".pth")


def timm_name(model_name: str) -> str:
    """Return timm's name of a model that may be given by the hub's."""
    return MODEL_NAMES.get(model_name, model_name)


def find_weights(model_dir: str, model_name: str) -> str | None:
    """Return the file of a model's weights in a folder; None where it is not there.

    It is ``<model name>.safetensors``, ``.pt`` or ``.pth``, by timm's name or by the one given.

    Raises
    ------
    WeightsError
        If several files could be meant.
    """
    names = dict.fromkeys([timm_name(model_name), model_name.rpartition("/")[2]])
    paths = [Path(model_dir, name + suffix) for name in names for suffix in SUFFIXES]
    found = [path for path in paths if path.is_file()]
    if len(found) > 1:
        raise WeightsError(f"model_dir={model_dir!r} holds {found[0].name} and {found[1].name}: keep one of them")
    return str(found[0]) if found else None


def provide_weights(model_dir: str, model_name: str) -> str:
    """Return the file of a model's weights in a folder, bringing it there from the hub if need be.

    Raises
    ------
    UnknownModelError
        If timm has no such model.
    WeightsError
        If the weights are not there and cannot be had.
    """
    found = find_weights(model_dir, model_name)
    if found is not None:
        return found
    name = timm_name(model_name)
    timm_models.check_name(name)
    target = Path(model_dir, name + SUFFIXES[0])
    try:
        model = timm_models.create_model(name, pretrained=True, weights=None)
    except WeightsError as error:
        raise WeightsError(
            f"model_dir={model_dir!r} holds no {target.name}, and {error}; or put it at {target}"
        ) from error
    _save(model, target)
    return str(target)


def _save(model: Any, target: Path) -> None:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as work:
        made = os.path.join(work, "weights")
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, made)
        with open(made, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(made, target)


def provide_head(model_dir: str | None, source: WeightsSource) -> str:
    """Return the published file of a head in a folder, downloading it into it if need be.

    Raises
    ------
    WeightsError
        If it is not there and cannot be had.
    """
    return str(source.fetch(model_dir))


def check_model_dir(model_dir: Any) -> str | None:
    """Return a `model_dir` argument as text.

    Raises
    ------
    ArgumentError
        If it is no path.
    """
    if model_dir is None:
        return None
    if not isinstance(model_dir, str | os.PathLike) or not os.fspath(model_dir):
        raise ArgumentError(f"model_dir must be a folder's path, not {model_dir!r}")
    return files.absolute(model_dir)
