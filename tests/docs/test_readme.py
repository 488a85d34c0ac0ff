"""The figures of README.md are those of benchmarks/results/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SPEED = (ROOT / "benchmarks" / "results" / "speed.md").read_text()


def figures() -> dict[str, str]:
    """Return the table of speeds: what the work is beside, and the figure."""
    table = README.partition("## How fast")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[2] for row in rows[2:]}


@pytest.mark.parametrize(
    ("work", "row", "beside"),
    [
        ("tars to preprocessed batches", "decode", "webdataset and Pillow transforms"),
        ("export", "export", "webdataset"),
        ("index of a tar", "index", "tarfile"),
        ("near-duplicates of 20,000 × 512", "pairwise", "full matrix"),
        ("k-means", "kmeans", "faiss-cpu"),
    ],
)
def test_a_ratio_is_the_measured_one(work: str, row: str, beside: str) -> None:
    (measured,) = re.findall(rf"^\| {row} \|[^|]*\| {beside} \| speed ([\d.]+) ", SPEED, re.MULTILINE)
    assert figures()[work].split(",")[0] == measured


def test_the_other_figures_are_in_the_files_named() -> None:
    results = ROOT / "benchmarks" / "results"
    (embedding,) = re.findall(
        r"^\| embed \|[^|]*\| model alone, a batch a core \| speed ([\d.]+) ", SPEED, re.MULTILINE
    )
    assert f"reaches {embedding} of the model's own speed" in README
    seconds = figures()["two million embeddings deduplicated"].removesuffix(" s")
    assert re.search(rf"^\| 2,000,000 \| \d+ \| {seconds} \|", (results / "dedup.md").read_text(), re.MULTILINE)
    kills = (results / "kill_moments.md").read_text()
    tried = len(re.findall(r"\| yes \| yes \| yes \|", kills))
    assert f"tried at {tried} moments" in README
    assert not re.search(r"\| no \|", kills)
    big = (results / "big_shards.md").read_text()
    (memory,) = re.findall(r"^\| embed and save \| 1 \| 1\.5 GB \| ([\d,]+) MiB", big, re.MULTILINE)
    assert f"a million rows in {int(memory.replace(',', '')) / 1024:.1f} GiB" in README


def test_its_picture_is_there() -> None:
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 500_000
