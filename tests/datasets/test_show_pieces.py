"""What a dataset shows of itself in a notebook, and in a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, MissingColumnError, RunError
from tests.makers import make_dataset, write_rows


@pytest.fixture
def dataset(tmp_path: Path) -> ImageTextPairDataset:
    """Scores 0, 0.1, …, 2.9; every third row a copy of the one before."""
    make_dataset(tmp_path, {"a": 20, "b": 10})
    for name in "ab":
        rows = pd.read_parquet(tmp_path / f"{name}.parquet")
        copy = rows["seed"] % 3 == 2
        rows["is_duplicate"] = copy
        rows["duplicate_of"] = np.where(copy, (rows["seed"] - 1).map(lambda seed: f"{seed:06d}"), None)
        first = "a" if name == "a" else "b"
        rows["duplicate_of_shard"] = np.where(copy, np.where(rows["seed"] - 1 < 20, "a", first), None)
        write_rows(tmp_path / f"{name}.parquet", pa.Table.from_pandas(rows, preserve_index=False))
    return ImageTextPairDataset.from_webdataset(tmp_path)


def test_scores(dataset: ImageTextPairDataset) -> None:
    shown = dataset.show_scores(thresholds=[1.0])
    assert [chart.title for chart in shown.charts] == ["score"]
    text = shown._repr_html_()
    assert 'aria-label="Histogram of score: rows 30, lowest 0,' in text
    assert text.count("<rect ") == sum(1 for bar in shown.charts[0].bars if bar.count)
    assert [text for _, text in shown.charts[0].marks] == ["1"]
    assert "█" in repr(shown)
    assert [chart.title for chart in dataset.show_scores("seed", "score").charts] == ["seed", "score"]


def test_around_a_threshold(dataset: ImageTextPairDataset) -> None:
    shown = dataset.show_around("score", 1.5, n=3)
    below, above = shown.parts.values()
    assert [card.values["score"] for card in below] == ["1.4", "1.3", "1.2"]
    assert [card.values["score"] for card in above] == ["1.5", "1.6", "1.7"]
    assert list(shown.parts) == ["Just below 1.5 (15 rows are below)", "1.5 and just above (15 rows are not below)"]
    assert shown._repr_html_().count("<img ") == 6
    assert "a/000014" in repr(shown)


def test_extremes(dataset: ImageTextPairDataset) -> None:
    highest, lowest = dataset.show_extremes("score", n=2).parts.values()
    assert [card.title for card in highest] == ["b/000029", "b/000028"]
    assert [card.title for card in lowest] == ["a/000000", "a/000001"]
    assert highest[0].caption == "picture number 29"


def test_duplicates(dataset: ImageTextPairDataset) -> None:
    shown = dataset.show_duplicates(4)
    assert len(shown.groups) == 4
    for group in shown.groups:
        assert group.kept is not None
        (copy,) = group.copies
        assert int(copy.title[-2:]) == int(group.kept.title[-2:]) + 1
    assert shown._repr_html_().count("<img ") == 8
    assert "2 pictures, 1 of them a copy" in repr(shown)


def test_the_frame_of_the_user_counts(dataset: ImageTextPairDataset) -> None:
    dataset.metadata = dataset.metadata[dataset.metadata["score"] > 1]
    dataset.metadata["double"] = dataset.metadata["score"] * 2
    below, above = dataset.show_around("double", 4.0, n=2).parts.values()
    assert [card.values["double"] for card in below] == ["3.8", "3.6"]
    assert [card.values["double"] for card in above] == ["4", "4.2"]
    _, lowest = dataset.show_extremes("score", n=1).parts.values()
    assert lowest[0].values["score"] == "1.1"


def test_pictures_have_names_and_no_page_is_needed(dataset: ImageTextPairDataset) -> None:
    text = dataset.show(3)._repr_html_()
    assert re.findall('alt="(.*?)"', text) == [f"Picture a/00000{n}: picture number {n}" for n in range(3)]
    assert "http" not in text


def test_what_cannot_be_shown_is_said(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    with pytest.raises(MissingColumnError, match="nowhere"):
        dataset.show_scores("nowhere")
    with pytest.raises(ArgumentError, match="caption"):
        dataset.show_around("caption", 1)
    with pytest.raises(ArgumentError, match="n must"):
        dataset.show_extremes("score", 0)
    with pytest.raises(ArgumentError, match="copies must"):
        dataset.show_duplicates(copies=0)
    bare = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "bare", {"a": 2}))
    with pytest.raises(MissingColumnError, match="duplicate_of"):
        bare.show_duplicates()
    (tmp_path / "b.parquet").write_bytes(b"no Parquet")
    with pytest.raises(RunError, match="1 of the shards cannot be read, b for one"):
        dataset.show_scores()
