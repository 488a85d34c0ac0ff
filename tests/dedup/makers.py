"""Datasets of embeddings: tars that nobody reads, and metadata."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_image.datasets import ImageTextPairDataset

Matrix = npt.NDArray[np.float32]


def clustered_vectors(count: int, size: int, centres: int, spread: float, seed: int = 0) -> Matrix:
    """Return vectors around random centres: a third near copies of others, some exact copies, some scaled."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(centres, size))
    vectors = base[rng.integers(0, centres, count)] + spread * rng.normal(size=(count, size))
    copies = rng.choice(count, count // 3, replace=False)
    vectors[copies] = vectors[rng.integers(0, count, len(copies))] + 0.02 * rng.normal(size=(len(copies), size))
    exact = rng.choice(count, count // 10, replace=False)
    vectors[exact] = vectors[rng.integers(0, count, len(exact))]
    scaled = rng.choice(count, count // 20, replace=False)
    vectors = vectors.astype(np.float32)
    vectors[scaled] = vectors[rng.integers(0, count, len(scaled))] * np.float32(3)
    return vectors


def write_embeddings(
    folder: Path,
    vectors: Sequence[Any],
    shards: int = 3,
    ids: Sequence[Any] | None = None,
    order: Sequence[int] | None = None,
    first: int = 0,
    **columns: Sequence[Any],
) -> ImageTextPairDataset:
    """Write vectors (None for no embedding) as a dataset of `shards` shards, and open it.

    `order` lays the rows out in another order; a row's id stays its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{row:06d}" for row in range(len(vectors))] if ids is None else list(ids)
    rows = np.arange(len(vectors)) if order is None else np.asarray(order)
    for number, part in enumerate(np.array_split(rows, shards)):
        name = f"{first + number:05d}"
        with tarfile.open(folder / f"{name}.tar", "w"):
            pass
        embeddings = [None if vectors[row] is None else np.asarray(vectors[row], np.float32) for row in part]
        table = {
            "key": pa.array([names[row] for row in part]),
            "image_embedding": pa.array(embeddings, pa.list_(pa.float32())),
            **{name: pa.array([values[row] for row in part]) for name, values in columns.items()},
        }
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return ImageTextPairDataset.from_webdataset(str(folder))


def computed(dataset: ImageTextPairDataset) -> pd.DataFrame:
    """Return a dataset's rows by id, with plain Python values."""
    frame = dataset.metadata.compute()
    return frame.assign(shard=frame["shard"].astype(str)).sort_values(["key", "shard"]).reset_index(drop=True)
