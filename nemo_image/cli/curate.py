"""``nemo-image curate``: tars in, an enriched and filtered dataset out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from nemo_image import schema
from nemo_image.cli.keeping import Conditions, choose_rows, dedup_options, export_options, write_rows
from nemo_image.cli.models import OPEN_CLIP, make_embedder, model_options
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
from nemo_image.filters import Blocklist, add_columns
from nemo_image.filters.blocklist import BLOCKED
from nemo_image.filters.choose import MADE_BY_FILTERS, OF_ALL_ROWS
from nemo_image.shards import files

PARTS_WAIT_S = 600
"""Seconds that the last part waits for the others to let go of the output."""

LEFT_NAMED = 5

CONTENT_HASHES = {"content-sha256": "sha256", "content-xxh3": "xxh3_128"}
"""What ``--blocklist`` calls hashes of the images' bytes."""

EXAMPLE = """
Examples:

\b
  nemo-image curate /data/laion /data/curated \\
      --model vit_large_patch14_clip_quickgelu_224.openai --pretrained \\
      --keep "aesthetic_score > 5 and nsfw_score < 0.5"
  nemo-image curate /data/laion /data/curated --keep "width >= 200 and aspect_ratio <= 3" \\
      --keep "caption_words >= 3 and caption_language == 'en'" --blocklist url=bad_urls.txt --dedup exact
"""


@click.command(epilog=EXAMPLE)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="OUTPUT")
@model_options(required=False)
@click.option(
    "--keep",
    "keeps",
    multiple=True,
    help="Rows to keep, as 'aesthetic_score > 5' or 'clip_score in top 30%'; several are joined by and.",
)
@click.option(
    "--blocklist",
    "blocklists",
    multiple=True,
    metavar="[WHAT=]FILE",
    help="Leave out what FILE lists: ids, or values of the column WHAT (url=bad.txt), or hashes of the images' bytes "
    "(content-sha256=bad.parquet, content-xxh3=bad.csv).",
)
@dedup_options
@click.option("--caption-column", help="Column of the captions. [caption, or else the tars' captions]")
@click.option("--aesthetic/--no-aesthetic", default=None, help="Score aesthetics; by default if --keep names it.")
@click.option("--aesthetic-weights", type=click.Path(), help="Local file of the aesthetic head's weights.")
@click.option("--nsfw/--no-nsfw", default=None, help="Score safety; by default if --keep names it.")
@click.option("--nsfw-weights", type=click.Path(), help="Local file of the NSFW head's weights.")
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@click.option("--on-mismatch", type=click.Choice(["null", "drop", "raise"]), default="null", show_default=True)
@export_options
@click.option("--max-failure-ratio", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Take over what an earlier run finished.")
@click.option("--retry-failed", is_flag=True, help="Compute only what failed before: shards, and quarantined images.")
@click.option("--quarantine-bytes", is_flag=True, help="Keep bad images' bytes in the quarantine too.")
@click.option("--part", callback=parse_part, help="Do one share of the shards: 3/16 is the third of sixteen.")
@id_option
@cluster_options
@json_option
def curate(input_path: str, output_path: str, as_json: bool, **options: Any) -> None:
    """Embed, score, measure and filter the shards of INPUT; write the rows that pass to OUTPUT.

    INPUT is a folder of tars, a glob or a brace pattern, and is left as it is. OUTPUT gets full tars with Parquet
    metadata; the enriched metadata of all rows, also of those that do not pass, is in OUTPUT/_nemo_image/enriched.
    A run that was stopped is taken up by the same command.

    Columns that --keep names and INPUT lacks are made: aesthetic_score, nsfw_score; width, height, aspect_ratio, blur,
    brightness; caption_length, caption_words, caption_alphanumeric, caption_language, caption_language_score,
    caption_count, caption_is_duplicate. A quantile (in top 30%, in bottom 5%, in top 1000) is of all rows that have a
    value. Copies are looked for among the rows that pass everything else.

    With --part, each of n jobs (a Slurm array, say) computes its share of the shards; the one that finishes last
    writes the output.
    """
    started = time.monotonic()
    conditions = Conditions.of([*options["keeps"], *_not_blocked(options["blocklists"])], options)
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        found = _curate(input_path, output_path, conditions, options)
    result = _result(found, input_path, output_path, time.monotonic() - started)
    print_json(result) if as_json else print_table("curate", _rows(result))


@dataclass
class _Found:
    """Totals of the two runs, and what keeps the second from being done."""

    enriched: dict[str, Any]
    exported: dict[str, Any] | None = None
    left: list[str] = field(default_factory=list)
    busy: str | None = None


def _curate(input_path: str, output_path: str, conditions: Conditions, options: dict[str, Any]) -> _Found:
    part = options["part"]
    with run_lock(output_path, "curate", part=part):
        lazy = _lazy(input_path, output_path, conditions, options)
        enriched = _enrich(lazy, output_path, options)
        found = _Found(enriched.run_totals or {})
        if part is not None or options["retry_failed"]:
            found.left = lazy.pending_shards(_enriched_path(output_path))
        if part is None and not found.left:
            found.exported = _export(enriched, output_path, conditions, options)
    if part is not None and not found.left:
        try:
            # All parts are done. Their locks are free once they have looked; the last one to look comes here alone.
            with run_lock(output_path, "curate", wait_s=PARTS_WAIT_S):
                found.exported = _export(lazy.reopened(_enriched_path(output_path)), output_path, conditions, options)
        except OutputBusyError as error:
            found.busy = str(error)
    return found


def _lazy(input_path: str, output_path: str, conditions: Conditions, options: dict[str, Any]) -> ImageTextPairDataset:
    dataset = ImageTextPairDataset.from_webdataset(
        input_path, id_col=options["id_col"], sidecars=options["sidecars"], on_mismatch=options["on_mismatch"]
    )
    named = conditions.columns
    classifiers = _classifiers(named, list(dataset.metadata.columns), options)
    # A misspelt name is said before a model is built; what can be made still may not be, and is looked at again below.
    conditions.require_names([*dataset.metadata.columns, *_made(classifiers, options)])
    if options["model"] is None:
        lazy = _without_model(dataset, classifiers, options)
    else:
        lazy = _embedder(classifiers, options)(dataset)
    # After the embedder, which makes the sizes by the way; what needs all rows waits until all parts are done.
    lazy = add_columns(lazy, [name for name in named if name not in OF_ALL_ROWS], options["caption_column"])
    lazy = _marked(lazy, output_path, options["blocklists"])
    # Before hours of work: are the columns there that the filter needs?
    conditions.require_columns(lazy)
    return lazy


def _made(classifiers: list[Any], options: dict[str, Any]) -> list[str]:
    """Return the columns that the options can add to those of the input."""
    made = [*MADE_BY_FILTERS, schema.IMAGE_ERROR, *(one.pred_column for one in classifiers)]
    made += [column for column, _, _ in _parsed(options["blocklists"])]
    if options["model"] is not None:
        made += [schema.IMAGE_EMBEDDING, schema.WIDTH, schema.HEIGHT]
        if options["model"].startswith(OPEN_CLIP):
            made += [schema.TEXT_EMBEDDING, schema.CLIP_SCORE, schema.CLIP_CAPTION]
    return list(dict.fromkeys(made))


def _embedder(classifiers: list[Any], options: dict[str, Any]) -> Any:
    column = options["caption_column"]
    read = options["model"].startswith(OPEN_CLIP) and column is not None
    return make_embedder(options, classifiers, [f"column:{column}"] if read else [])


def _without_model(
    dataset: ImageTextPairDataset, classifiers: list[Any], options: dict[str, Any]
) -> ImageTextPairDataset:
    """Score the embeddings that are there.

    Raises
    ------
    ArgumentError
        If something was asked for that needs a model.
    """
    given = [name for name in ("pretrained", "weights", "batch_size") if options[name] is not None]
    if given:
        raise ArgumentError(f"--{given[0].replace('_', '-')} is for --model, which was not given")
    for classifier in classifiers:
        if classifier.embedding_column not in dataset.metadata.columns:
            raise ArgumentError(f"{classifier.pred_column} is made of embeddings, and there are none: give --model")
        dataset = classifier(dataset)
    return dataset


def _parsed(blocklists: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return, of each ``--blocklist``, the column to add, what is looked up ("" for ids), and the file."""
    made = []
    for number, text in enumerate(blocklists):
        what, equals, url = text.partition("=")
        if not equals or "/" in what:
            what, url = "", text
        made.append((BLOCKED if number == 0 else f"{BLOCKED}_{number + 1}", what, url))
    return made


def _not_blocked(blocklists: Sequence[str]) -> list[str]:
    return [f"not {column}" for column, _, _ in _parsed(blocklists)]


def _marked(dataset: ImageTextPairDataset, output_path: str, blocklists: Sequence[str]) -> ImageTextPairDataset:
    """Add a column for each blocklist. The lists' hashes lie in the output: the input stays as it is."""
    folder = files.join(output_path.rstrip("/"), FOLDER, "blocklists")
    for column, what, url in _parsed(blocklists):
        settings: dict[str, Any] = {"blocked_column": column, "output_dir": folder}
        if what in CONTENT_HASHES:
            settings["content_hash"] = CONTENT_HASHES[what]
        elif what:
            settings["column"] = what
        dataset = Blocklist(url, **settings)(dataset)
    return dataset


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
    enriched: ImageTextPairDataset, output_path: str, conditions: Conditions, options: dict[str, Any]
) -> dict[str, Any]:
    chosen = choose_rows(enriched, conditions, output_path, options["caption_column"])
    totals = write_rows(chosen.dataset, output_path, options)
    return {
        **totals,
        "thresholds": chosen.thresholds,
        "duplicates": chosen.duplicates,
        "ledgers": [*chosen.ledgers, totals["ledger"]],
    }


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
    more = {name: kept[name] for name in ("thresholds", "duplicates") if kept[name]}
    names = ("rows_filtered", "losses", "rows_out", "shards_out")
    return {**result, **more, **{name: kept[name] for name in names}, "ledgers": [made["ledger"], *kept["ledgers"]]}


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    labels = {"results": "computed", "image_errors": "images without result, by reason", "rows_out": "rows kept"}
    rows: list[tuple[str, Any]] = []
    for name, found in result.items():
        value = found
        if name == "duplicates":
            value = [f"{one['tier']}: {one['removed']:,} of {one['kept'] + one['removed']:,} judged" for one in value]
        elif isinstance(value, dict):
            value = ", ".join(f"{key}: {_number(one)}" for key, one in value.items()) or "none"
        shown = "\n".join(value) if isinstance(value, list) else value
        rows.append((labels.get(name, name.replace("_", " ")), shown))
    return rows


def _number(value: int | float | None) -> str:
    return "none" if value is None else f"{value:,}"
