"""``nemo-image export``: write the rows that pass an expression as a new dataset of full shards."""

from __future__ import annotations

import time
from typing import Any

import click

from nemo_image import schema
from nemo_image.cli.keeping import export_options, write_rows
from nemo_image.cli.options import cluster, cluster_options, id_option, json_option, print_json, print_table
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.filters import KeepExpression, add_columns, keep_with_thresholds

EXAMPLE = """
Examples:

\b
  nemo-image export /data/pairs /data/best --keep "aesthetic_score in top 10%" --keep "not is_duplicate"
  nemo-image export /data/pairs /data/packed --samples-per-shard 5000 --shuffle-seed 1
  nemo-image export /data/pairs /data/wide --keep "aspect_ratio > 1.5 and caption_words >= 3" --keep-ids
"""


@click.command(epilog=EXAMPLE)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="OUTPUT")
@click.option(
    "--keep",
    "keeps",
    multiple=True,
    help="Rows to write, as 'score > 5' or 'score in top 30%'; several are joined by and. All rows by default.",
)
@click.option("--caption-column", help="Column of the captions. [caption, or else the tars' captions]")
@export_options
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@click.option("--on-mismatch", type=click.Choice(["null", "drop", "raise"]), default="null", show_default=True)
@id_option
@cluster_options
@json_option
def export(input_path: str, output_path: str, as_json: bool, **options: Any) -> None:
    """Write the rows of INPUT that pass every --keep to OUTPUT: full tars, byte for byte, with Parquet and .idx.

    The columns that --keep names are those of INPUT and its sidecars; sizes, blur, brightness and what can be said of
    captions are made on the way where INPUT lacks them, and are written too. OUTPUT must hold no other dataset.
    """
    started = time.monotonic()
    text = " and ".join(f"({term.text})" for term in map(KeepExpression, options["keeps"]))
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        dataset = ImageTextPairDataset.from_webdataset(
            input_path, id_col=options["id_col"], sidecars=options["sidecars"], on_mismatch=options["on_mismatch"]
        )
        text = text or f"{schema.SHARD} is not None"
        dataset = add_columns(dataset, KeepExpression(text).columns, options["caption_column"])
        dataset, thresholds = keep_with_thresholds(dataset, text)
        totals = write_rows(dataset, output_path, options)
    names = ("rows_in", "rows_filtered", "losses", "rows_out", "shards_out", "ledger")
    result = {
        "input": input_path,
        "output": output_path,
        **({"thresholds": thresholds} if thresholds else {}),
        **{name: totals[name] for name in names},
        "seconds": round(time.monotonic() - started, 2),
    }
    print_json(result) if as_json else print_table("export", _rows(result))


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return ", ".join(f"{name}: {one}" for name, one in value.items()) or "none"
        return value

    return [(name.replace("_", " "), shown(value)) for name, value in result.items()]
