"""The main job on a small dataset of real photographs: tars in; embeddings, scores and a filtered dataset out.

Run it as ``make demo`` or ``python scripts/demo/run.py --folder demo``. A second run takes over what the first has
finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from classifiers import ImageNetConfidence, ImageNetLabel
from make_dataset import ALL_SAMPLES, make_dataset
from rich.console import Console
from rich.table import Table
from weights import write_weights

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import DedupResult, SemanticDedup
from nemo_image.embedders import TimmImageEmbedder

LEAST_CONFIDENCE = 0.5
EPS = 0.15
"""Pictures whose embeddings have a cosine of at least 0.85 show the same: a scale that suits this network."""

SAMPLES_PER_SHARD = 50
DETAILS = ["shard", "key", "source", "confidence", "label", "is_duplicate", "image_error"]


def curate(
    tars: Path, weights: Path, enriched_folder: Path, curated_folder: Path
) -> tuple[ImageTextPairDataset, DedupResult]:
    """Embed, score, save, deduplicate, filter and export; return the enriched dataset, and what was a copy."""
    dataset = ImageTextPairDataset.from_webdataset(tars, id_col="key")
    embedder = TimmImageEmbedder(
        "tf_efficientnet_lite0",
        weights=weights,
        normalize_embeddings=False,  # the network's own last layer wants them as they are
        classifiers=[ImageNetConfidence(weights), ImageNetLabel(weights)],
    )
    # Of pictures that show the same, the one that the network is surest of stays.
    dedup = SemanticDedup(eps=EPS, which_to_keep=("confidence", False), output_dir=f"{enriched_folder}-copies")
    enriched = dedup(embedder(dataset).save_metadata(enriched_folder))
    assert dedup.result_ is not None

    rows = enriched.metadata
    enriched.metadata["keep"] = (rows["confidence"] > LEAST_CONFIDENCE) & ~rows["is_duplicate"]
    enriched.to_webdataset(
        curated_folder, filter_column="keep", samples_per_shard=SAMPLES_PER_SHARD, old_id_col="original_key"
    )
    return enriched, dedup.result_


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where all files go (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=ALL_SAMPLES, help="how many pictures (default: %(default)s)")
    given = parser.parse_args(arguments)
    tars, enriched_folder, curated_folder = (given.folder / name for name in ("input", "enriched", "curated"))

    console = Console()
    if not tars.exists():
        console.print(f"Making a dataset of {given.samples} pictures in {tars} ...")
        unfinished = given.folder / "input.unfinished"
        make_dataset(unfinished, samples=given.samples, samples_per_shard=SAMPLES_PER_SHARD)
        unfinished.rename(tars)
    weights = write_weights(given.folder / "weights" / "tf_efficientnet_lite0.safetensors")

    started = time.perf_counter()
    enriched, copies = curate(tars, weights, enriched_folder, curated_folder)
    seconds = time.perf_counter() - started

    curated = ImageTextPairDataset.from_webdataset(curated_folder)
    rows = enriched.metadata[DETAILS].compute()
    console.print(_photographs(rows), _bad_images(rows), _summary(enriched, curated, copies, rows, seconds))
    kept = int(_is_kept(rows).sum())
    if len(curated) != kept:
        console.print(f"{kept} rows passed the filter, but the exported dataset has {len(curated)}", style="bold red")
        return 1
    return 0


def _is_kept(rows: pd.DataFrame) -> pd.Series:
    return (rows["confidence"] > LEAST_CONFIDENCE).fillna(False) & ~rows["is_duplicate"].fillna(True)


def _photographs(rows: pd.DataFrame) -> Table:
    """Tell what the network saw in the variations of each photograph."""
    table = Table(title="What the network sees", title_justify="left")
    for heading in ("photograph", "likeliest class", "median confidence", "copies", "kept"):
        table.add_column(heading, justify="left" if heading in ("photograph", "likeliest class") else "right")
    embedded = rows[rows["label"].notna()]
    for source, group in embedded.groupby(embedded["source"].str.rpartition("/")[2]):
        kept = int(_is_kept(group).sum())
        labels = group["label"].value_counts()
        median = float(group["confidence"].median())
        copies = int(group["is_duplicate"].sum())
        table.add_row(str(source), str(labels.index[0]), f"{median:.2f}", str(copies), f"{kept} of {len(group)}")
    return table


def _bad_images(rows: pd.DataFrame) -> Table:
    table = Table(title="Rows without embedding", title_justify="left")
    for heading in ("shard", "key", "image_error"):
        table.add_column(heading, overflow="fold")
    for row in rows[rows["image_error"].notna()].itertuples():
        table.add_row(str(row.shard), str(row.key), str(row.image_error))
    return table


def _summary(
    enriched: ImageTextPairDataset,
    curated: ImageTextPairDataset,
    copies: DedupResult,
    rows: pd.DataFrame,
    seconds: float,
) -> Table:
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("shards in", str(len(enriched.shards)))
    table.add_row("rows in", str(len(rows)))
    table.add_row("embedded and scored", str(int(rows["confidence"].notna().sum())))
    table.add_row("without embedding", str(int(rows["image_error"].notna().sum())))
    table.add_row(f"copies (cosine >= {1 - EPS})", f"{copies.removed} of {copies.rows}; {copies.missed}")
    table.add_row(f"kept (confidence > {LEAST_CONFIDENCE}, no copies)", str(len(curated)))
    table.add_row("shards out", str(len(curated.shards)))
    table.add_row("time", f"{seconds:.1f} s from tars to tars, model loading included")
    table.add_row("speed", f"{len(rows) / seconds:.0f} rows/s")
    table.add_row("enriched metadata", f"{enriched.path}/*.parquet")
    table.add_row("copies", f"{copies.duplicate_ids}/*.parquet")
    table.add_row("curated dataset", f"{curated.path}/*.tar, *.parquet, *.idx")
    table.add_row("ledgers", f"{enriched.path}/_nemo_image/*.jsonl\n{curated.path}/_nemo_image/*.jsonl")
    return table


if __name__ == "__main__":
    sys.exit(main())
