"""``nemo-image curate``: tars in, an enriched and filtered dataset out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import click

from nemo_image import schema
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
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, OutputBusyError
from nemo_image.filters import KeepExpression, keep
from nemo_image.shards import files

PARTS_WAIT_S = 600
"""Seconds that the last part waits for the others to let go of the output."""

LEFT_NAMED = 5

EXAMPLE = """
Example:

\b
  nemo-image curate /data/laion /data/curated \\
      --model vit_large_patch14_clip_quickgelu_224.openai --pretrained \\
      --keep "aesthetic_score > 5 and nsfw_score < 0.5"
"""


@click.command(epilog=EXAMPLE)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="OUTPUT")
@click.option("--model", required=True, help="timm model that makes the embeddings.")
@click.option("--pretrained", is_flag=True, help="Take the model's weights from the hub or its local cache.")
@click.option("--weights", type=click.Path(), help="Local file of the model's weights (.safetensors, .pt, .pth).")
@click.option(
    "--keep", "keeps", multiple=True, help="Rows to keep, as 'aesthetic_score > 5'; several are joined by and."
)
@click.option("--aesthetic/--no-aesthetic", default=None, help="Score aesthetics; by default if --keep names it.")
@click.option("--aesthetic-weights", type=click.Path(), help="Local file of the aesthetic head's weights.")
@click.option("--nsfw/--no-nsfw", default=None, help="Score safety; by default if --keep names it.")
@click.option("--nsfw-weights", type=click.Path(), help="Local file of the NSFW head's weights.")
@click.option("--batch-size", type=click.IntRange(1), help="Images at once. [default: by the device]")
@click.option("--decode-threads", type=click.IntRange(1), default=4, show_default=True, help="Decoding threads a task.")
@click.option("--autocast/--no-autocast", default=True, show_default=True, help="Reduced precision where harmless.")
@click.option("--embedding-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@click.option("--on-mismatch", type=click.Choice(["null", "drop", "raise"]), default="null", show_default=True)
@click.option("--samples-per-shard", type=click.IntRange(1), default=10000, show_default=True)
@click.option("--max-shards", type=click.IntRange(1), default=5, show_default=True, help="Digits of a shard's number.")
@click.option("--old-id-col", help="Column and JSON field that keep the old ids.")
@click.option("--keep-ids", is_flag=True, help="Keep ids and member names as they are.")
@click.option("--shuffle-seed", type=int, help="Shuffle the output by this seed.")
@click.option("--max-failure-ratio", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Take over what an earlier run finished.")
@click.option("--retry-failed", is_flag=True, help="Compute only what failed before: shards, and quarantined images.")
@click.option("--quarantine-bytes", is_flag=True, help="Keep bad images' bytes in the quarantine too.")
@click.option("--part", callback=parse_part, help="Do one share of the shards: 3/16 is the third of sixteen.")
@click.option("--replace", is_flag=True, help="Replace an earlier export of other rows or settings in OUTPUT.")
@id_option
@cluster_options
@json_option
def curate(input_path: str, output_path: str, as_json: bool, **options: Any) -> None:
    """Embed, score and filter the shards of INPUT; write the rows that pass to OUTPUT.

    INPUT is a folder of tars, a glob or a brace pattern, and is left as it is. OUTPUT gets full tars with Parquet
    metadata; the enriched metadata of all rows, also of those that do not pass, is in OUTPUT/_nemo_image/enriched.
    A run that was stopped is taken up by the same command.

    With --part, each of n jobs (a Slurm array, say) computes its share of the shards; the one that finishes last
    writes the output.
    """
    started = time.monotonic()
    expression = " and ".join(f"({text})" for text in options["keeps"])
    for text in options["keeps"]:
        KeepExpression(text)
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        found = _curate(input_path, output_path, expression, options)
    result = _result(found, input_path, output_path, time.monotonic() - started)
    print_json(result) if as_json else print_table("curate", _rows(result))


@dataclass
class _Found:
    """Totals of the two runs, and what keeps the second from being done."""

    enriched: dict[str, Any]
    exported: dict[str, Any] | None = None
    left: list[str] = field(default_factory=list)
    busy: str | None = None


def _curate(input_path: str, output_path: str, expression: str, options: dict[str, Any]) -> _Found:
    part = options["part"]
    with run_lock(output_path, "curate", part=part):
        lazy = _lazy(input_path, expression, options)
        enriched = _enrich(lazy, output_path, options)
        found = _Found(enriched.run_totals or {})
        if part is not None or options["retry_failed"]:
            found.left = lazy.pending_shards(_enriched_path(output_path))
        if part is None and not found.left:
            found.exported = _export(enriched, output_path, expression, options)
    if part is not None and not found.left:
        try:
            # All parts are done. Their locks are free once they have looked; the last one to look comes here alone.
            with run_lock(output_path, "curate", wait_s=PARTS_WAIT_S):
                whole = ImageTextPairDataset.from_webdataset(
                    _enriched_path(output_path), id_col=options["id_col"], on_mismatch=options["on_mismatch"]
                )
                found.exported = _export(whole, output_path, expression, options)
        except OutputBusyError as error:
            found.busy = str(error)
    return found


def _lazy(input_path: str, expression: str, options: dict[str, Any]) -> ImageTextPairDataset:
    from nemo_image.embedders import TimmImageEmbedder

    dataset = ImageTextPairDataset.from_webdataset(
        input_path, id_col=options["id_col"], sidecars=options["sidecars"], on_mismatch=options["on_mismatch"]
    )
    named = KeepExpression(expression).columns if expression else []
    embedder = TimmImageEmbedder(
        options["model"],
        pretrained=options["pretrained"],
        weights=options["weights"],
        batch_size=options["batch_size"] or "auto",
        num_threads_per_worker=options["decode_threads"],
        autocast=options["autocast"],
        embedding_dtype=options["embedding_dtype"],
        classifiers=_classifiers(named, list(dataset.metadata.columns), options),
    )
    lazy = embedder(dataset)
    # Before hours of work: are the columns there that the filter needs?
    if expression:
        KeepExpression(expression).require_columns(list(lazy.metadata.columns))
    return lazy


def _enriched_path(output_path: str) -> str:
    return files.join(output_path.rstrip("/"), FOLDER, "enriched")


def _enrich(lazy: ImageTextPairDataset, output_path: str, options: dict[str, Any]) -> ImageTextPairDataset:
    return lazy.save_metadata(
        _enriched_path(output_path),
        resume=options["resume"],
        max_failure_ratio=options["max_failure_ratio"],
        part=options["part"],
        retry_failed=options["retry_failed"],
        quarantine_bytes=options["quarantine_bytes"],
    )


def _classifiers(named: list[str], present: list[str], options: dict[str, Any]) -> list[Any]:
    from nemo_image.classifiers import AestheticClassifier, NsfwClassifier

    made: list[Any] = []
    for column, switch, weights, make in (
        (schema.AESTHETIC_SCORE, "aesthetic", "aesthetic_weights", AestheticClassifier),
        (schema.NSFW_SCORE, "nsfw", "nsfw_weights", NsfwClassifier),
    ):
        wanted = options[switch]
        if wanted is None:
            wanted = options[weights] is not None or (column in named and column not in present)
        elif not wanted and options[weights] is not None:
            raise ArgumentError(f"--no-{switch} and --{switch}-weights contradict each other")
        if wanted:
            made.append(make(model_path=options[weights]))
    return made


def _export(
    enriched: ImageTextPairDataset, output_path: str, expression: str, options: dict[str, Any]
) -> dict[str, Any]:
    chosen = keep(enriched, expression or f"{enriched.id_col} is not None")
    exported = chosen.to_webdataset(
        output_path,
        filter_column=schema.KEPT,
        samples_per_shard=options["samples_per_shard"],
        max_shards=options["max_shards"],
        old_id_col=options["old_id_col"],
        keep_ids=options["keep_ids"],
        shuffle_seed=options["shuffle_seed"],
        replace=options["replace"],
    )
    return {**(exported.run_totals or {}), "shards_out": len(exported.shards)}


def _result(found: _Found, input_path: str, output_path: str, seconds: float) -> dict[str, Any]:
    made = found.enriched
    result = {
        "input": input_path,
        "output": output_path,
        "shards_in": sum(made["shards"].values()),
        "rows_in": made["rows_in"],
        "samples": made["samples"],
        "results": made["results"],
        "image_errors": made["failures"],
        "rows_without_sample": made["rows_without_sample"],
        "samples_without_row": made["samples_without_row"],
        "repeated_members": made["repeated_members"],
        "seconds": round(seconds, 2),
        "rows_per_second": round(made["rows_in"] / seconds, 1),
    }
    kept = found.exported
    if kept is None:
        waits = {"shards_left": len(found.left), "shards_left_first": ", ".join(found.left[:LEFT_NAMED])}
        return {**result, **({"export": found.busy} if found.busy else waits), "ledgers": [made["ledger"]]}
    names = ("rows_filtered", "losses", "rows_out", "shards_out")
    return {**result, **{name: kept[name] for name in names}, "ledgers": [made["ledger"], kept["ledger"]]}


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    labels = {"results": "computed", "image_errors": "images without result, by reason", "rows_out": "rows kept"}
    rows: list[tuple[str, Any]] = []
    for name, value in result.items():
        shown = (
            ", ".join(f"{key}: {one:,}" for key, one in value.items()) or "none" if isinstance(value, dict) else value
        )
        shown = "\n".join(shown) if isinstance(shown, list) else shown
        rows.append((labels.get(name, name.replace("_", " ")), shown))
    return rows
