"""What tells one pipeline from another: its stages, their arguments, and what they are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_image.engine.tokens import behaviour_token
from nemo_image.pipeline.fit import Stage

HARMLESS = frozenset(
    {
        "model_dir",  # its weights count by what they are
        "name",
        "num_gpus_per_worker",
        "num_threads",
        "output_dir",
        "path",
        "remove_image_data",
        "removal_parquets_dir",
        "replace",
        "resources",
        "storage_options",
        "verbose",
    }
)
"""Attributes of our own stages that change how a run goes, not what comes out."""


def pipeline_token(prepared: Sequence[Stage], last: Stage) -> str:
    """Name a pipeline by its stages and what they are made of; where it writes to is no part of it."""
    parts: list[Any] = [
        (_stage_token(stage), _without_dtype(stage.column_fingerprints()), stage.made_of()) for stage in prepared
    ]
    parts.append(_stage_token(last))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _stage_token(stage: Stage) -> str:
    if type(stage).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return behaviour_token(stage)
    told = {name: value for name, value in vars(stage).items() if name not in HARMLESS and not name.startswith("_")}
    return f"{type(stage).__qualname__}({sorted((name, repr(value)) for name, value in told.items())})"


def _without_dtype(made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Leave out the number type, which a probe of speed chooses; a checkpoint remembers it apart."""
    return {
        column: {name: value for name, value in one.items() if name not in ("dtype", "parents")}
        for column, one in made.items()
    }
