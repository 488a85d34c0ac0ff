"""The model that makes embeddings: its options, and the embedder that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from nemo_image.errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])

OPEN_CLIP = "open_clip:"
"""Begins the names of open_clip's models; others are timm's."""

HUB = ""
"""The value of ``--pretrained`` without a tag."""


def model_options(*, required: bool) -> Callable[[F], F]:
    """Add the options that say which model makes embeddings, and how.

    Parameters
    ----------
    required : bool
        Whether there must be one.
    """
    wanted = "" if required else " Without one, no embeddings are made."
    options = (
        click.option(
            "--model",
            required=required,
            help=f"timm model that makes the embeddings; open_clip:NAME embeds captions too.{wanted}",
        ),
        click.option(
            "--pretrained",
            is_flag=False,
            flag_value=HUB,
            metavar="[TAG]",
            help="Take the weights from the hub or its local cache; of an open_clip model, those of TAG.",
        ),
        click.option(
            "--weights", type=click.Path(), help="Local file of the model's weights (.safetensors, .pt, .pth)."
        ),
        click.option("--batch-size", type=click.IntRange(1), help="Images at once. [default: by the device]"),
        click.option(
            "--decode-threads",
            type=click.IntRange(1),
            default=4,
            show_default=True,
            help="Decoding threads of a task.",
        ),
        click.option(
            "--autocast/--no-autocast", default=True, show_default=True, help="Reduced precision where harmless."
        ),
        click.option(
            "--embedding-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True
        ),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def make_embedder(options: Mapping[str, Any], classifiers: Sequence[Any] = (), captions: Sequence[str] = ()) -> Any:
    """Return the embedder that the options of :func:`model_options` describe.

    Parameters
    ----------
    options : dict
        A command's.
    classifiers : sequence of ImageClassifier
        Score the embeddings in the same pass.
    captions : sequence of str
        Where an open_clip model's captions are looked for; by default, where its embedder looks.

    Raises
    ------
    ArgumentError
        If they contradict each other.
    """
    settings = {
        "weights": options["weights"],
        "batch_size": options["batch_size"] or "auto",
        "num_threads_per_worker": options["decode_threads"],
        "autocast": options["autocast"],
        "embedding_dtype": options["embedding_dtype"],
        "classifiers": classifiers,
    }
    model, pretrained = options["model"], options["pretrained"]
    if model.startswith(OPEN_CLIP):
        return _open_clip(model.removeprefix(OPEN_CLIP), pretrained, captions, settings)
    from nemo_image.embedders import TimmImageEmbedder

    if pretrained not in (None, HUB):
        raise ArgumentError(
            f"--pretrained {pretrained!r}: timm's names carry their tag (--model {model}.TAG --pretrained). If "
            f"{pretrained!r} is meant to be something else, put it before --pretrained"
        )
    if captions:
        raise ArgumentError(f"--captions is for open_clip models: {model} is timm's and embeds pictures alone")
    return TimmImageEmbedder(model, pretrained=pretrained == HUB, **settings)


def _open_clip(name: str, pretrained: str | None, captions: Sequence[str], settings: Mapping[str, Any]) -> Any:
    from nemo_image.embedders import OpenClipImageEmbedder, open_clip_models

    if pretrained == HUB and not name.startswith(open_clip_models.SCHEMAS):
        tags = ", ".join(open_clip_models.tags(name)[:6])
        raise ArgumentError(f"--pretrained must say which weights of {name}: {tags or 'it has none'}")
    return OpenClipImageEmbedder(name, pretrained or None, captions=captions or None, **settings)
