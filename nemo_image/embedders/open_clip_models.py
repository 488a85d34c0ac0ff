"""open_clip models: what there is, how pictures are prepared for each, where the weights and tokenizers come from."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_image.embedders import timm_models
from nemo_image.embedders.network import NetworkDescription
from nemo_image.embedders.network_weights import RANDOM_WEIGHTS, hub_cache, seeded, state_sha256
from nemo_image.engine.weights import load_state_dict, sha256_file
from nemo_image.errors import ArgumentError, MissingDependencyError, ModelError, UnknownModelError, WeightsError

logger = logging.getLogger("nemo_image")

SCHEMAS = ("hf-hub:", "local-dir:")
"""Names that begin so say where the model's configuration and its weights lie."""


@dataclass(frozen=True)
class OpenClipModel:
    """Which model, and what is changed of it.

    Attributes
    ----------
    name : str
        open_clip's name, or one that begins with ``hf-hub:`` or ``local-dir:``.
    pretrained : str or None
        The tag of its published weights.
    weights : str or None
        A file of weights.
    force_quick_gelu : bool
        Whether the activation is QuickGELU, whatever the configuration and the tag say.
    preprocessing : tuple of (str, object)
        What is said otherwise of how pictures are prepared: ``mean``, ``std``, ``interpolation``, ``resize_mode``.
    tokenizer : str or None
        A folder (or the hub's name) of a tokenizer to take instead of the model's own.
    """

    name: str
    pretrained: str | None = None
    weights: str | None = None
    force_quick_gelu: bool = False
    preprocessing: tuple[tuple[str, Any], ...] = ()
    tokenizer: str | None = None

    @property
    def brings_weights(self) -> bool:
        """Whether the name itself says where the weights lie."""
        return self.name.startswith(SCHEMAS)


def import_open_clip() -> Any:
    """Return the open_clip module.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            f"open_clip cannot be imported ({error}): pip install 'nemo-image[image_cpu]', or [image_cuda12] on a GPU "
            "machine (the package is open_clip_torch)"
        ) from error
    return open_clip


# What there is -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def full_config(name: str) -> dict[str, Any]:
    """Return a model's configuration: ``model_cfg``, and ``preprocess_cfg`` where its folder or the hub says one.

    Raises
    ------
    UnknownModelError
        If open_clip has no such model.
    WeightsError
        If the hub or the folder does not give it.
    ModelError
        If it has no text tower.
    """
    open_clip = import_open_clip()
    if not isinstance(name, str) or not name:
        raise UnknownModelError(f"model_name must be an open_clip model's name, not {name!r}")
    if name.startswith(SCHEMAS):
        config = _config_elsewhere(name)
    else:
        found = open_clip.get_model_config(name.replace("/", "-"))
        if found is None:
            raise UnknownModelError(_no_such_model(open_clip, name))
        config = {"model_cfg": found}
    if "text_cfg" not in config.get("model_cfg", {}):
        raise ModelError(f"{name} has no text tower: TimmImageEmbedder embeds pictures alone")
    return config


def _config_elsewhere(name: str) -> dict[str, Any]:
    _, _, where = name.partition(":")
    try:
        if name.startswith("local-dir:"):
            path = Path(where, "open_clip_config.json")
        else:
            path = Path(_module("pretrained").download_pretrained_from_hf(where, filename="open_clip_config.json"))
        config = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # hub clients raise errors of many libraries
        raise WeightsError(
            f"{name} gives no open_clip_config.json ({_first_line(error)}). Without a network, bring the hub's cache "
            f"to {hub_cache()}, or give the name of a built-in model and weights=<a local file>"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{name}: its open_clip_config.json holds {type(config).__name__}, not an object")
    return config


def _no_such_model(open_clip: Any, name: str) -> str:
    if timm_models.import_timm().is_model(name.partition(".")[0]):
        return f"open_clip has no model {name!r}, but timm has: TimmImageEmbedder({name!r}) (pictures alone, no text)"
    near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(near)}?" if near else ": open_clip.list_models() lists what there is"
    return f"open_clip has no model {name!r}{hint}"


def check(model: OpenClipModel) -> None:
    """Raise if there is no such model or tag.

    Raises
    ------
    ArgumentError, UnknownModelError, WeightsError, ModelError
    """
    full_config(model.name)
    tag: Any = model.pretrained
    if model.brings_weights:
        if tag is not None or model.weights is not None:
            raise ArgumentError(f"{model.name} brings its own weights: give neither pretrained= nor weights=")
        return
    if tag is None:
        return
    known = tags(model.name)
    if not isinstance(tag, str):
        said = " or ".join(map(repr, known[:3])) or "a tag, of which it has none"
        raise ArgumentError(f"pretrained must say which weights of {model.name}, as {said}, not {tag!r}")
    if not _tag_config(model):
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.4) or known[:8]
        raise UnknownModelError(
            f"open_clip's {model.name} has no tag {tag!r}: it has {', '.join(near) or 'none'}. A file is weights="
        )


def tags(name: str) -> list[str]:
    """Return the tags of a model's published weights."""
    return list(import_open_clip().list_pretrained_tags_by_model(name.replace("/", "-")))


def _tag_config(model: OpenClipModel) -> dict[str, Any]:
    if model.pretrained is None:
        return {}
    return dict(import_open_clip().get_pretrained_cfg(model.name.replace("/", "-"), model.pretrained))


def quick_gelu(model: OpenClipModel) -> bool:
    """Tell whether a model is run with QuickGELU: where it or the user says so, or the tag's weights were trained so.

    Where only the tag says so (``ViT-B-32``, ``openai``), open_clip itself warns, and computes other embeddings.
    """
    configured = full_config(model.name)["model_cfg"].get("quick_gelu", False)
    return bool(model.force_quick_gelu or configured or _tag_config(model).get("quick_gelu", False))


# How pictures are prepared -------------------------------------------------------------------------------------------


def preprocess_config(model: OpenClipModel) -> dict[str, Any]:
    """Return how a model's pictures are prepared, as open_clip's own factory settles it.

    The tag's (or the hub's) settings over open_clip's defaults, the model's image size, and what the user says.
    """
    transform = _module("transform")
    config = full_config(model.name)
    settings = asdict(transform.PreprocessCfg())
    for overlay in (config.get("preprocess_cfg", {}), _tag_config(model)):
        settings = transform.merge_preprocess_dict(settings, overlay)
    settings["size"] = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    merged: dict[str, Any] = transform.merge_preprocess_dict(settings, dict(model.preprocessing))
    return merged


@functools.lru_cache(maxsize=32)
def describe(model: OpenClipModel) -> NetworkDescription:
    """Return what is known of a model without its weights."""
    transform = _module("transform")
    settings = transform.PreprocessCfg(**preprocess_config(model))
    config = full_config(model.name)["model_cfg"]
    size = settings.size if isinstance(settings.size, int) else tuple(settings.size)
    height, width = (size, size) if isinstance(size, int) else size
    return NetworkDescription(
        size=int(config["embed_dim"]),
        transform=transform.image_transform_v2(settings, is_train=False),
        input_size=(3, height, width),
        convolutional=_is_convolutional(config["vision_cfg"]),
    )


def _is_convolutional(vision: Mapping[str, Any]) -> bool:
    if "timm_model_name" in vision:
        return timm_models.is_convolutional(vision["timm_model_name"])
    return isinstance(vision.get("layers"), list)  # of a ResNet's stages; transformers have one number


def warn_of_other_preprocessing(model: OpenClipModel) -> None:
    """Say so where a file's weights may want other pictures than open_clip prepares for a model without a tag."""
    if model.weights is None or model.pretrained is not None or model.preprocessing:
        return
    ours = preprocess_config(model)
    others = {
        tag
        for tag in tags(model.name)
        if preprocess_config(OpenClipModel(model.name, pretrained=tag)) != ours
        or quick_gelu(OpenClipModel(model.name, pretrained=tag)) != quick_gelu(model)
    }
    if others:
        logger.warning(
            "%s: pictures are prepared as open_clip does where no tag is given; weights of %s want something else: say "
            "pretrained=<the tag> beside weights=",
            model.name,
            ", ".join(sorted(others)[:4]),
        )


# Weights and tokenizers ----------------------------------------------------------------------------------------------


def identified_model(model: OpenClipModel) -> tuple[Any, str]:
    """Build a model in evaluation mode, on the CPU in float32, and return it with the identity of its weights.

    Returns
    -------
    model : torch.nn.Module
    identity : str
        SHA-256 of the file; of the tensors themselves where they come from the hub; ``random weights, seed …``.

    Raises
    ------
    WeightsError
        If the weights cannot be had, or are another model's.
    """
    if model.weights is not None:
        return _from_file(model, model.weights).eval(), sha256_file(model.weights)
    if model.pretrained is not None or model.brings_weights:
        made = _from_hub(model).eval()
        return made, state_sha256(made.state_dict())
    with seeded():
        try:
            return _create(model, pretrained_text=False).eval(), RANDOM_WEIGHTS
        except Exception as error:  # a text tower of transformers' wants its configuration from the hub
            raise WeightsError(_cannot_build(model, error)) from error


def _create(model: OpenClipModel, **options: Any) -> Any:
    return import_open_clip().create_model(
        model.name, force_quick_gelu=quick_gelu(model), force_preprocess_cfg=preprocess_config(model), **options
    )


def _from_file(model: OpenClipModel, weights: str) -> Any:
    load_state_dict(weights)  # refuses what is no state dict, and says why
    try:
        # By open_clip's own path: it converts OpenAI's and other layouts.
        return _create(model, pretrained=os.path.abspath(weights), weights_only=True, require_pretrained=True)
    except (RuntimeError, KeyError, AttributeError, ValueError, IndexError) as error:
        text = " ".join(str(error).split())
        raise WeightsError(f"{weights} does not hold weights of {model.name}: {text[:400]}") from error
    except Exception as error:
        raise WeightsError(_cannot_build(model, error)) from error


def _from_hub(model: OpenClipModel) -> Any:
    try:
        return _create(model, pretrained=model.pretrained, weights_only=True, require_pretrained=True)
    except Exception as error:  # hub clients raise errors of many libraries when there is no network
        if model.name.startswith("local-dir:"):
            raise WeightsError(f"{model.name} holds no weights that can be loaded: {_first_line(error)}") from error
        raise WeightsError(
            f"the weights {model.pretrained or ''} of {model.name} cannot be had ({_first_line(error)}). Without a "
            f"network, give weights=<a local file> beside pretrained=, or bring the hub's cache to {hub_cache()}"
        ) from error


def _cannot_build(model: OpenClipModel, error: Exception) -> str:
    return (
        f"{model.name} cannot be built ({_first_line(error)}): its text tower comes from transformers (pip install "
        f"transformers) and its configuration from the hub, whose cache is {hub_cache()}"
    )


def load_tokenizer(model: OpenClipModel) -> Any:
    """Return a model's tokenizer.

    Raises
    ------
    ModelError
        If it cannot be had; says what to do.
    """
    open_clip = import_open_clip()
    text = full_config(model.name)["model_cfg"]["text_cfg"]
    try:
        if model.tokenizer is None:
            return open_clip.get_tokenizer(model.name if model.brings_weights else model.name.replace("/", "-"))
        return _module("tokenizer").HFTokenizer(
            model.tokenizer,
            context_length=text.get("context_length", 77),
            tokenizer_mode=text.get("tokenizer_mode"),
            **text.get("tokenizer_kwargs", {}),
        )
    except Exception as error:
        wanted = model.tokenizer or text.get("hf_tokenizer_name") or "its own"
        raise ModelError(
            f"the tokenizer of {model.name} ({wanted}) cannot be had ({_first_line(error)}). It comes from the hub, by "
            "transformers (pip install transformers). Without a network, give tokenizer=<a local folder of its files>, "
            f"or bring the hub's cache to {hub_cache()}"
        ) from error


def _module(name: str) -> Any:
    import_open_clip()
    import importlib

    return importlib.import_module(f"open_clip.{name}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
