"""Weights that the tests make, and a dataset stand-in that maps columns over a plain Dask frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import torch

from nemo_image import backend, schema
from nemo_image.errors import MissingColumnError

AESTHETIC_SIZES = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
NSFW_SIZES = {1: (64, 768), 2: (512, 64), 3: (256, 512), 4: (1, 256)}


def unit_vectors(rows: int, size: int = 768, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def aesthetic_state(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    state = {}
    for number, (out, into) in AESTHETIC_SIZES.items():
        state[f"layers.{number}.weight"] = rng.standard_normal((out, into)) * 1.5 / np.sqrt(into)
        state[f"layers.{number}.bias"] = rng.standard_normal(out)
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}


def nsfw_state(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    state = {"norm.mean": rng.standard_normal(768) * 0.02, "norm.variance": rng.uniform(0.0004, 0.003, 768)}
    for number, (out, into) in NSFW_SIZES.items():
        state[f"linear_{number}.weight"] = rng.standard_normal((out, into)) * 1.5 / np.sqrt(into)
        state[f"linear_{number}.bias"] = rng.standard_normal(out) * 0.3
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}


def _doubles(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy().astype(np.float64) for name, value in state.items()}


def numpy_aesthetic(state: Mapping[str, torch.Tensor], vectors: np.ndarray) -> np.ndarray:
    """SPEC section 4, in float64."""
    weights, values = _doubles(state), vectors.astype(np.float64)
    for number in (0, 2, 4, 6, 7):
        values = values @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    return values[:, 0]


def numpy_nsfw(state: Mapping[str, torch.Tensor], vectors: np.ndarray) -> np.ndarray:
    """SPEC section 4, in float64."""
    weights = _doubles(state)
    values = (vectors.astype(np.float64) - weights["norm.mean"]) / np.sqrt(weights["norm.variance"])
    for number in (1, 2, 3):
        values = np.maximum(values @ weights[f"linear_{number}.weight"].T + weights[f"linear_{number}.bias"], 0)
    return 1 / (1 + np.exp(-(values @ weights["linear_4.weight"].T + weights["linear_4.bias"])[:, 0]))


class StandIn:
    """What a classifier sees of a dataset, without tars."""

    def __init__(self, metadata: Any, provenance: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.metadata = metadata
        self.provenance = dict(provenance or {})

    def require_columns(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.metadata.columns]
        if missing:
            raise MissingColumnError(f"the metadata has no column {missing}")

    def map_columns(
        self,
        function: Callable[[pd.DataFrame], pd.DataFrame],
        *,
        inputs: Sequence[str],
        outputs: Mapping[str, Any],
        fingerprints: Mapping[str, Mapping[str, Any]],
    ) -> StandIn:
        meta = schema.empty_frame(outputs.items())
        made = self.metadata[list(inputs)].map_partitions(function, meta=meta)
        frame = self.metadata.assign(**{name: made[name] for name in outputs})
        return StandIn(frame, {**self.provenance, **fingerprints})


def make_dataset(
    vectors: np.ndarray,
    rows: Sequence[int] | None = None,
    length: int | None = None,
    made_by: Mapping[str, Any] | None = None,
    npartitions: int = 1,
    dtype: str = "float32",
) -> StandIn:
    """Return a dataset of embeddings, at the positions `rows` of `length` rows, that `made_by` made."""
    count = len(vectors) if length is None else length
    index = pd.RangeIndex(100, 100 + count)
    positions = None if rows is None else np.array(rows, np.int64)
    column = backend.to_column(vectors, index, positions, dtype)
    keys = pd.Series([f"k{number}" for number in range(count)], index, "string[pyarrow]")
    frame = pd.DataFrame({"key": keys, "image_embedding": column})
    return StandIn(
        dd.from_pandas(frame, npartitions=npartitions, sort=False), {"image_embedding": made_by} if made_by else None
    )
