"""timm models as embedding models: which head stays, where the weights come from."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from nemo_image.embedders.network import NetworkDescription
from nemo_image.embedders.network_weights import RANDOM_WEIGHTS, hub_cache, seeded, state_sha256
from nemo_image.engine.weights import load_state_dict, sha256_file
from nemo_image.errors import MissingDependencyError, UnknownModelError, WeightsError

PATCH_CONVOLUTIONS = 8
"""The most that a vision transformer has: hybrids' stems are larger, and convolutional networks have dozens."""


def import_timm() -> Any:
    """Return the timm module.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            f"timm cannot be imported ({error}): pip install 'nemo-image[image_cpu]', or [image_cuda12] on a GPU "
            "machine"
        ) from error
    return timm


def check_name(name: str) -> None:
    """Raise if timm knows no model of that name.

    Raises
    ------
    UnknownModelError
        With names that are like it.
    """
    timm = import_timm()
    if not isinstance(name, str) or not name:
        raise UnknownModelError(f"model_name must be a timm model's name, not {name!r}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else ": timm.list_models('*clip*') lists what there is"
        raise UnknownModelError(f"timm has no model {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownModelError(
            f"timm's {architecture} has no tag {tag!r}: {', '.join(_tags(architecture))}"
        ) from error


def _tags(architecture: str) -> list[str]:
    timm = import_timm()
    names = timm.list_models(architecture + ".*", pretrained=True)
    return [name.partition(".")[2] for name in names] or ["it has none"]


def keeps_head(name: str) -> bool:
    """Tell whether a model is a CLIP image tower, whose projection head belongs to the embedding.

    CLIP towers that were fine-tuned on labels (tags with ``_ft_``) have a classifier there instead.
    """
    timm = import_timm()
    cfg = timm.get_pretrained_cfg(name)
    tag = (getattr(cfg, "tag", "") or "") if cfg is not None else ""
    architecture = name.partition(".")[0]
    return "clip" in f"{architecture}.{tag}" and "_ft_" not in f"{tag}_" and bool(getattr(cfg, "num_classes", 0))


def identified_model(name: str, pretrained: bool, weights: str | None) -> tuple[Any, str]:
    """Build a model, and return it with the identity of its weights, the same on every machine that has them.

    Returns
    -------
    model : torch.nn.Module
        See :func:`create_model`.
    identity : str
        SHA-256 of the file; of the tensors themselves where they come from the hub; `RANDOM_WEIGHTS`.

    Raises
    ------
    WeightsError
        If the weights cannot be had, or are another model's.
    """
    model = create_model(name, pretrained, weights)
    if weights is not None:
        return model, sha256_file(weights)
    return model, state_sha256(model.state_dict()) if pretrained else RANDOM_WEIGHTS


def create_model(name: str, pretrained: bool, weights: str | None) -> Any:
    """Build a model that gives embeddings, in evaluation mode, on the CPU in float32.

    Raises
    ------
    WeightsError
        If the weights cannot be had, or are another model's.
    """
    timm = import_timm()
    head: dict[str, Any] = {} if keeps_head(name) else {"num_classes": 0}
    if weights is not None:
        return _from_file(timm, name, weights, head).eval()
    if pretrained:
        return _from_hub(timm, name, head).eval()
    with seeded():
        return timm.create_model(name, pretrained=False, **head).eval()


def _from_file(timm: Any, name: str, weights: str, head: Mapping[str, Any]) -> Any:
    # Read by us (never unpickled), then through timm's own path: it converts OpenAI's and open_clip's layouts.
    state = load_state_dict(weights)
    overlay = {"state_dict": state, "source": "timm", "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **head)
    except (RuntimeError, KeyError, AssertionError, ValueError) as error:
        text = " ".join(str(error).split())
        raise WeightsError(f"{weights} does not hold weights of {name}: {text[:400]}") from error


def _from_hub(timm: Any, name: str, head: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=True, **head)
    except Exception as error:
        # Hub clients raise errors of many libraries when there is no network.
        first = (str(error).splitlines() or [""])[0]
        raise WeightsError(
            f"the pretrained weights of {name} cannot be had ({type(error).__name__}: {first}). Without a network, "
            "give "
            f"weights=<a local file>, or bring the hub's cache to {hub_cache()}"
        ) from error


def evaluation_transform(model: Any) -> Any:
    """Return the transform that timm's own evaluation uses for a model (a torchvision Compose)."""
    timm = import_timm()
    config = timm.data.resolve_model_data_config(model)
    return timm.data.create_transform(**config, is_training=False)


def input_size(model: Any) -> tuple[int, int, int]:
    """Return the channels, height and width of a model's input."""
    channels, height, width = import_timm().data.resolve_model_data_config(model)["input_size"]
    return channels, height, width


@functools.lru_cache(maxsize=32)
def _outline(name: str) -> Any:
    """Return a model without weights, on torch's meta device."""
    import torch

    head: dict[str, Any] = {} if keeps_head(name) else {"num_classes": 0}
    with torch.device("meta"):
        return import_timm().create_model(name, pretrained=False, **head).eval()


@functools.lru_cache(maxsize=32)
def is_convolutional(name: str) -> bool:
    """Tell whether a model has more convolutions than the few that cut a picture into a transformer's patches."""
    import torch

    return sum(isinstance(module, torch.nn.Conv2d) for module in _outline(name).modules()) > PATCH_CONVOLUTIONS


@functools.lru_cache(maxsize=32)
def describe(name: str) -> tuple[int, Any]:
    """Return a model's embedding size in numbers and its evaluation transform, without its weights."""
    import torch

    model = _outline(name)
    with torch.inference_mode():
        size = int(model(torch.empty(1, *input_size(model), device="meta")).shape[-1])
    return size, evaluation_transform(model)


@functools.lru_cache(maxsize=32)
def description(name: str) -> NetworkDescription:
    """Return what is known of a model without its weights."""
    size, transform = describe(name)
    return NetworkDescription(size, transform, input_size(_outline(name)), is_convolutional(name))
