"""``nemo-image report``: one HTML file that shows a dataset."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from nemo_image.cli.options import cluster, cluster_options, id_option, json_option, print_json, print_table
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.reports.report import QUANTILES, THRESHOLDS, write_report

EXAMPLE = """
Examples:

\b
  nemo-image report /data/curated
  nemo-image report /data/curated -o report.html --threshold aesthetic_score=5 --threshold aesthetic_score=6
  nemo-image report /data/curated --sidecar /data/scores --quantile 0.01 --quantile 0.99
"""


def _parse_thresholds(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, list[float]]:
    """Read ``name=number``, each of which may stand several times."""
    found: dict[str, list[float]] = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            found.setdefault(name, []).append(float(text))
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{value!r} is no threshold: write a column and a number, as aesthetic_score=5")
    return found


_DEFAULTS = ", ".join(f"{name}={one:g}" for name, some in THRESHOLDS.items() for one in some)


@click.command(epilog=EXAMPLE)
@click.argument("dataset_path", metavar="DATASET")
@click.option(
    "-o",
    "--output",
    default="report.html",
    show_default=True,
    help="The file, local or a URL; an earlier report is replaced.",
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="COLUMN=NUMBER",
    callback=_parse_thresholds,
    help=f"Show pictures just below and above it, and how many rows pass. [{_DEFAULTS}]",
)
@click.option(
    "--quantile",
    "quantiles",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    help=f"Show pictures of each score there. [{', '.join(f'{one:g}' for one in QUANTILES)}]",
)
@click.option("--pictures", type=click.IntRange(1), default=6, show_default=True, help="Pictures of each gallery.")
@click.option("--groups", type=click.IntRange(0, 40), default=12, show_default=True, help="Groups of copies to show.")
@click.option("--title", help="Heading. [the dataset's path]")
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@id_option
@cluster_options
@json_option
def report(
    dataset_path: str,
    output: str,
    thresholds: dict[str, list[float]],
    quantiles: tuple[float, ...],
    pictures: int,
    groups: int,
    title: str | None,
    sidecars: tuple[str, ...],
    id_col: str,
    as_json: bool,
    workers: int | None,
    scheduler_address: str | None,
    scheduler_file: str | None,
) -> None:
    """Show DATASET in one HTML file: what became of its rows, histograms, pictures at thresholds, copies, errors.

    The file opens in a browser from disk and loads nothing else. Counts and histograms are of all rows; pictures are a
    selection, and only their tars are opened. The exit status is 1 if a shard could not be read, or a ledger does not
    balance.
    """
    dataset = ImageTextPairDataset.from_webdataset(dataset_path, id_col=id_col, sidecars=sidecars)
    with cluster(workers, scheduler_address, scheduler_file):
        done = write_report(
            dataset,
            output,
            title=title,
            thresholds=thresholds,
            quantiles=quantiles or QUANTILES,
            pictures=pictures,
            groups=groups,
        )
    if as_json:
        print_json(asdict(done))
    else:
        rows = [("report", done.path), ("size", f"{done.bytes / 1e6:,.1f} MB"), ("rows", done.rows)]
        rows += [("pictures", done.pictures), ("unreadable", "\n".join(done.unreadable.values()) or "none")]
        print_table("report", [*rows, ("problems", "\n".join(done.problems) or "none")])
    sys.exit(1 if done.unreadable or done.problems else 0)
