"""``nemo-image embed``: tars in, enriched Parquet out."""

from __future__ import annotations

import time
from typing import Any

import click

from nemo_image.cli.models import make_embedder, model_options
from nemo_image.cli.options import (
    cluster,
    cluster_options,
    id_option,
    json_option,
    parse_part,
    print_json,
    print_table,
)
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError

EXAMPLE = """
Examples:

\b
  nemo-image embed /data/pairs --model vit_large_patch14_clip_quickgelu_224.openai --pretrained
  nemo-image embed /data/pairs --model open_clip:ViT-B-32 --pretrained laion2b_s34b_b79k
  nemo-image embed /data/pairs --output /data/scores --columns clip_score,image_error \\
      --model open_clip:ViT-L-14 --pretrained openai --weights ViT-L-14.safetensors
"""

SHOWN = (
    "rows_in",
    "samples",
    "results",
    "failures",
    "rows_without_sample",
    "samples_without_row",
    "repeated_members",
)


@click.command(epilog=EXAMPLE)
@click.argument("input_path", metavar="INPUT")
@model_options(required=True)
@click.option(
    "--captions",
    multiple=True,
    metavar="SOURCE",
    help="Where an open_clip model's captions are: txt, json:FIELD or column:NAME; several are tried in this order. "
    "[column:caption, txt, json:caption]",
)
@click.option("--output", "output_path", help="Folder for the Parquet files. [INPUT's own are enriched in place]")
@click.option(
    "--columns", multiple=True, help="Columns to write beside shard and id, with commas. With --output. [all]"
)
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@click.option("--on-mismatch", type=click.Choice(["null", "drop", "raise"]), default="null", show_default=True)
@click.option("--max-failure-ratio", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Take over what an earlier run finished.")
@click.option("--retry-failed", is_flag=True, help="Compute only what failed before: shards, and quarantined images.")
@click.option("--quarantine-bytes", is_flag=True, help="Keep bad images' bytes in the quarantine too.")
@click.option("--part", callback=parse_part, help="Do one share of the shards: 3/16 is the third of sixteen.")
@id_option
@cluster_options
@json_option
def embed(input_path: str, output_path: str | None, as_json: bool, **options: Any) -> None:
    """Embed the pictures of INPUT; with an open_clip model also their captions, and score each pair.

    INPUT is a folder of tars, a glob or a brace pattern. Its metadata gets the columns image_embedding, image_error,
    width and height, and with an open_clip model text_embedding, clip_score and clip_caption; no row is removed.
    A run that was stopped is taken up by the same command.
    """
    started = time.monotonic()
    columns = [name for text in options["columns"] for name in text.split(",") if name]
    if columns and output_path is None:
        raise ArgumentError("--columns goes with --output: in place, all columns stay")
    embedder = make_embedder(options, captions=options["captions"])
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        dataset = ImageTextPairDataset.from_webdataset(
            input_path, id_col=options["id_col"], sidecars=options["sidecars"], on_mismatch=options["on_mismatch"]
        )
        saved = embedder(dataset).save_metadata(
            output_path,
            columns=columns or None,
            resume=options["resume"],
            max_failure_ratio=options["max_failure_ratio"],
            part=options["part"],
            retry_failed=options["retry_failed"],
            quarantine_bytes=options["quarantine_bytes"],
        )
    result = _result(saved.run_totals or {}, input_path, output_path or saved.path, time.monotonic() - started)
    print_json(result) if as_json else print_table("embed", _rows(result))


def _result(totals: dict[str, Any], input_path: str, output_path: str, seconds: float) -> dict[str, Any]:
    return {
        "input": input_path,
        "output": output_path,
        "shards": totals["shards"],
        **{name: totals[name] for name in SHOWN},
        "seconds": round(seconds, 2),
        "rows_per_second": round(totals["rows_in"] / seconds, 1),
        "ledger": totals["ledger"],
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    labels = {"results": "computed", "failures": "images without result, by reason"}
    rows: list[tuple[str, Any]] = []
    for name, value in result.items():
        shown = (
            ", ".join(f"{key}: {one:,}" for key, one in value.items()) or "none" if isinstance(value, dict) else value
        )
        rows.append((labels.get(name, name.replace("_", " ")), shown))
    return rows
