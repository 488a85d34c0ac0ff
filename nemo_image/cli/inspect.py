"""``nemo-image inspect``: what is in a dataset."""

from __future__ import annotations

import sys
from typing import Any

import click

from nemo_image.cli.options import cluster, cluster_options, id_option, json_option, print_json, print_table
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.reports.summary import summarize

EXAMPLE = """
Example:

\b
  nemo-image inspect /data/curated
"""

BAR_WIDTH = 30


@click.command(epilog=EXAMPLE)
@click.argument("path")
@id_option
@cluster_options
@json_option
def inspect(
    path: str,
    id_col: str,
    as_json: bool,
    workers: int | None,
    scheduler_address: str | None,
    scheduler_file: str | None,
) -> None:
    """Tell what is in the dataset at PATH: counts, sizes, formats, errors, and histograms of its scores."""
    dataset = ImageTextPairDataset.from_webdataset(path, id_col=id_col)
    with cluster(workers, scheduler_address, scheduler_file):
        found = summarize(dataset)
    if as_json:
        print_json(found)
    else:
        print_table(f"{found['path']}", _rows(found))
    sys.exit(1 if found["unreadable"] else 0)


def _rows(found: dict[str, Any]) -> list[tuple[str, Any]]:
    counts = ("shards", "rows", "samples", "captioned", "rows_without_sample", "samples_without_row")
    rows: list[tuple[str, Any]] = [(name.replace("_", " "), found[name]) for name in counts]
    rows += [(name.replace("_", " "), found[name]) for name in ("samples_without_image", "repeated_members")]
    rows += [(name.replace("_", " "), _bytes(found[name])) for name in ("tar_bytes", "image_bytes")]
    rows.append(("members", _counts(found["members"])))
    rows.append(("image errors", _counts(found["image_errors"])))
    rows.append(("columns", "\n".join(f"{name}: {kind}" for name, kind in found["columns"].items())))
    rows += [(name, _bars(histogram)) for name, histogram in found["histograms"].items()]
    rows.append(("unreadable", "\n".join(found["unreadable"].values()) or "none"))
    return rows


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _bars(histogram: dict[str, Any]) -> str:
    most = max(histogram["counts"])
    lines = []
    for low, high, count in zip(histogram["edges"], histogram["edges"][1:], histogram["counts"], strict=False):
        lines.append(f"{low:9.3f} to {high:9.3f} {'█' * round(BAR_WIDTH * count / max(most, 1))} {count:,}")
    return "\n".join([*lines, f"null: {histogram['nulls']:,}"])
