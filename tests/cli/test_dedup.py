"""``nemo-image dedup`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
from click.testing import CliRunner

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import SemanticDedup
from tests.dedup.makers import clustered_vectors, computed, write_embeddings
from tests.makers import make_dataset


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["dedup", *map(str, arguments)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_embeddings(tmp_path / "pairs", clustered_vectors(120, 8, 10, 0.5), 2)
    return tmp_path / "pairs"


def test_enriches_in_place_and_says_what_it_found(pairs: Path) -> None:
    wanted = computed(
        SemanticDedup(n_clusters=3, eps=0.05, n_probe=2)(ImageTextPairDataset.from_webdataset(str(pairs)))
    )

    result = run(pairs, "--n-clusters", 3, "--eps", 0.05, "--n-probe", 2, "--json")

    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    tier = said["tiers"][0]
    assert (tier["tier"], tier["removed"], tier["eps"]) == ("semantic", wanted["is_duplicate"].sum(), 0.05)
    assert tier["missed"]["sampled"] == 120
    saved = computed(ImageTextPairDataset.from_webdataset(str(pairs)))
    assert saved["is_duplicate"].tolist() == wanted["is_duplicate"].tolist()
    assert pyarrow.dataset.dataset(tier["duplicate_ids"]).count_rows() == tier["removed"] > 0


def test_tiers_follow_each_other_into_another_folder(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "pairs", {"00000": 4, "00001": 3})

    result = run(
        folder,
        tmp_path / "out",
        "--tier",
        "perceptual",
        "--tier",
        "exact",
        "--which-to-keep",
        "seed:descending",
        "--json",
    )

    assert result.exit_code == 0, result.output
    assert [one["tier"] for one in json.loads(result.stdout)["tiers"]] == ["exact", "perceptual"]
    saved = computed(ImageTextPairDataset.from_webdataset(str(tmp_path / "out")))
    assert {"image_hash", "image_phash"} <= set(saved.columns)
    assert "image_hash" not in ImageTextPairDataset.from_webdataset(str(folder)).metadata.columns


def test_tells_people(pairs: Path, tmp_path: Path) -> None:
    result = run(pairs, tmp_path / "out", "--target-keep", 0.8, "--chains")
    assert result.exit_code == 0, result.output
    assert "semantic: removed" in result.stdout
    assert "estimate of what was missed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tier", "exact", "--eps", 0.1], "--eps is for --tier semantic"),
        (["--max-distance", 3], "--max-distance is for --tier perceptual"),
        (["--which-to-keep", "score"], "--which-to-keep 'score' is none of"),
        (["--which-to-keep", "beauty:descending"], "no column 'beauty'"),
        (["--n-clusters", 121], "n_clusters=121 is more than the 120 rows"),
        (["--embedding-column", "clip"], "no column 'clip'"),
        (["--against", "/no/such/result"], "no finished deduplication"),
    ],
)
def test_errors_are_one_line(pairs: Path, arguments: list[Any], said: str) -> None:
    result = run(pairs, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_removed_rows_are_left_out_by_curate(pairs: Path) -> None:
    from nemo_image.filters import keep

    assert run(pairs, "--eps", 0.05).exit_code == 0
    dataset = ImageTextPairDataset.from_webdataset(str(pairs))
    kept = keep(dataset, "not is_duplicate").metadata.compute()
    assert (kept["nemo_image_kept"] == ~kept["is_duplicate"]).all()
    assert 0 < kept["nemo_image_kept"].sum() < 120
