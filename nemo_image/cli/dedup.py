"""``nemo-image dedup``: find rows that are copies of others."""

from __future__ import annotations

import time
from typing import Any

import click

from nemo_image import schema
from nemo_image.cli.options import cluster, cluster_options, id_option, json_option, print_json, print_table
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import DedupResult, ExactDedup, PerceptualDedup, SemanticDedup
from nemo_image.errors import ArgumentError

EXAMPLE = """
Examples:

\b
  nemo-image dedup /data/pairs --eps 0.01
  nemo-image dedup /data/pairs /data/pairs-deduped --tier exact --tier perceptual --tier semantic
  nemo-image dedup /data/pairs --target-keep 0.7 --which-to-keep aesthetic_score:descending
"""

TIERS = ("exact", "perceptual", "semantic")
WORDS = ("hard", "easy", "random", "id")


@click.command(epilog=EXAMPLE)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="[OUTPUT]", required=False)
@click.option(
    "--tier", "tiers", type=click.Choice(TIERS), multiple=True, help="What to look for; several in one run. [semantic]"
)
@click.option("--eps", type=click.FloatRange(0, 1), help="Copies have a cosine of at least 1 - eps. [0.01]")
@click.option("--target-keep", type=click.FloatRange(0, 1, min_open=True), help="Share of rows to keep; chooses eps.")
@click.option(
    "--which-to-keep",
    help="Which of similar rows stays: hard, easy, random, id, or COLUMN:ascending, COLUMN:descending. [hard, id]",
)
@click.option("--chains", is_flag=True, help="Compare with removed rows too, as SemDeDup was published.")
@click.option("--n-clusters", type=click.IntRange(1), help="K-means clusters. [one for each 20,000 rows]")
@click.option(
    "--n-probe", type=click.IntRange(1), default=1, show_default=True, help="Nearest clusters to compare with."
)
@click.option("--fit-rows", type=click.IntRange(1), help="Rows that k-means is fitted on. [256 a cluster]")
@click.option("--max-iter", type=click.IntRange(1), default=100, show_default=True, help="Iterations of k-means.")
@click.option("--centroids", type=click.Path(), help="File of centroids (.npy) in place of a fit.")
@click.option("--against", help="Folder of an earlier semantic result: rows that it kept stay.")
@click.option("--embedding-column", default=schema.IMAGE_EMBEDDING, show_default=True)
@click.option("--id-column", help="Column of which duplicate_of names rows. [--id-col]")
@click.option("--hash", "hash_name", type=click.Choice(["phash", "dhash", "ahash"]), default="phash", show_default=True)
@click.option("--max-distance", type=click.IntRange(0, 64), help="Bits in which hashes of copies may differ. [4]")
@click.option("--random-state", type=click.IntRange(0), default=1234, show_default=True)
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@id_option
@cluster_options
@json_option
def dedup(input_path: str, output_path: str | None, as_json: bool, **options: Any) -> None:
    """Find the rows of INPUT that are copies of others, and say so in their metadata.

    Nothing is removed: rows get is_duplicate, duplicate_of and more columns, in INPUT itself or, if it is given, in
    metadata files in OUTPUT. `nemo-image curate --keep "not is_duplicate"` and to_webdataset leave copies out.
    """
    started = time.monotonic()
    operators = make_operators(options)
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        dataset = ImageTextPairDataset.from_webdataset(
            input_path, id_col=options["id_col"], sidecars=options["sidecars"]
        )
        for operator in operators:
            dataset = operator(dataset)
        saved = dataset.save_metadata(output_path)
    found = [account(operator.result_) for operator in operators if operator.result_ is not None]
    result = {
        "input": input_path,
        "output": output_path or input_path,
        "tiers": found,
        "ledger": (saved.run_totals or {}).get("ledger"),
        "seconds": round(time.monotonic() - started, 2),
    }
    print_json(result) if as_json else print_table("dedup", _rows(result))


def make_operators(options: dict[str, Any]) -> list[Any]:
    """Return the operators that the command's options ask for, in the order of their tiers."""
    tiers = [tier for tier in TIERS if tier in (options["tiers"] or ("semantic",))]
    _require_used(tiers, options)
    made: list[Any] = []
    keep = _which_to_keep(options["which_to_keep"])
    shared = {"id_column": options["id_column"], "random_state": options["random_state"]}
    by_hash = {**shared, **({} if keep in (None, "hard", "easy") else {"which_to_keep": keep})}
    if "exact" in tiers:
        made.append(ExactDedup(**by_hash))
    if "perceptual" in tiers:
        distance = {} if options["max_distance"] is None else {"max_distance": options["max_distance"]}
        made.append(PerceptualDedup(options["hash_name"], **distance, **by_hash))
    if "semantic" in tiers:
        given = ("eps", "target_keep", "n_clusters", "fit_rows", "centroids", "against")
        settings = {name: options[name] for name in given if options[name] is not None}
        if keep not in (None, "id"):
            settings["which_to_keep"] = keep
        names = ("n_probe", "max_iter", "embedding_column")
        made.append(
            SemanticDedup(
                representative=not options["chains"], **settings, **{name: options[name] for name in names}, **shared
            )
        )
    return made


def _require_used(tiers: list[str], options: dict[str, Any]) -> None:
    """Raise if an option was given that no tier looks at."""
    semantic = ("eps", "target_keep", "chains", "n_clusters", "fit_rows", "centroids", "against")
    for names, tier in ((semantic, "semantic"), (("max_distance",), "perceptual")):
        unused = [name for name in names if options[name] not in (None, False)]
        if unused and tier not in tiers:
            raise ArgumentError(f"--{unused[0].replace('_', '-')} is for --tier {tier}, which is not among those given")


def _which_to_keep(text: str | None) -> Any:
    if text is None or text in WORDS:
        return text
    column, colon, direction = text.rpartition(":")
    if not (colon and column and direction in ("ascending", "descending")):
        raise ArgumentError(
            f"--which-to-keep {text!r} is none of {', '.join(WORDS)}, and not COLUMN:ascending or COLUMN:descending"
        )
    return column, direction == "ascending"


def account(result: DedupResult) -> dict[str, Any]:
    """Return a result's figures, for people and machines."""
    names = ("tier", "rows", "kept", "removed", "passed_by", "without_value", "bad_value", "folder", "duplicate_ids")
    account = {name: getattr(result, name) for name in names}
    if result.sweep:
        account["eps"] = result.sweep[0].eps
    if result.n_clusters is not None:
        account["n_clusters"] = result.n_clusters
    if result.missed is not None:
        account["missed"] = {
            **{name: getattr(result.missed, name) for name in ("sampled", "pairs", "pairs_compared")},
            "pair_recall": result.missed.pair_recall,
            "said": str(result.missed),
        }
    return account


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("input", result["input"]), ("output", result["output"])]
    for one in result["tiers"]:
        judged = one["kept"] + one["removed"]
        rows.append((f"{one['tier']}: removed", f"{one['removed']:,} of {judged:,} judged, {one['rows']:,} in all"))
        rows += [
            (name.replace("_", " "), one[name]) for name in ("passed_by", "without_value", "bad_value") if one[name]
        ]
        rows += [(name.replace("_", " "), one[name]) for name in ("eps", "n_clusters") if name in one]
        if "missed" in one:
            rows.append(("estimate of what was missed", one["missed"]["said"]))
        rows.append(("duplicate ids", one["duplicate_ids"]))
    return [*rows, ("ledger", result["ledger"]), ("seconds", result["seconds"])]
