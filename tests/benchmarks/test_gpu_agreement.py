"""The CPU's results beside the GPU's; without a GPU the CPU's beside themselves, which shows that the script looks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_agreement import compare, measure
from tests.makers import TINY_MODEL, make_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")


@pytest.mark.parametrize("other", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_agreement(other: str, tmp_path: Path) -> None:
    tars = str(make_dataset(tmp_path / "in", {"a": 20, "b": 20}))
    asked: dict[str, Any] = {"model": TINY_MODEL, "pretrained": False, "weights": None, "autocast": False}
    options = Namespace(**asked, aesthetic_weights=None, nsfw_weights=None, id_col="key", n_clusters=3, eps=0.05)
    first, centroids = measure("cpu", tars, tmp_path / "first", options, None)
    second, _ = measure(other, tars, tmp_path / "second", options, centroids)
    found = compare(first, second, "key")
    assert found["embeddings"] == 40
    assert found["cosine, least"] >= 0.999
    assert found["rows in the same cluster"] >= 0.95
    assert found["rows with the same verdict"] >= 0.95
    # It looks: a row that is another's is seen.
    swapped = second.copy()
    swapped["image_embedding"] = second["image_embedding"].iloc[::-1].to_numpy()
    swapped["cluster"] = second["cluster"] + 1
    assert compare(first, swapped, "key")["cosine, least"] < 0.999
    assert compare(first, swapped, "key")["rows in the same cluster"] == 0
