"""``nemo-image inspect``: what is in a dataset."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.core import ParameterSource

from nemo_image.cli.options import cluster, cluster_options, id_option, json_option, print_json, print_table
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.reports.ledger import inspect_ledgers
from nemo_image.reports.summary import summarize

EXAMPLE = """
Example:

\b
  nemo-image inspect /data/curated
  nemo-image inspect /data/curated --ledger
"""

BAR_WIDTH = 30


@click.command(epilog=EXAMPLE)
@click.argument("path")
@click.option("--ledger", is_flag=True, help="Show and verify the accounts of the runs that wrote PATH, row by row.")
@id_option
@cluster_options
@json_option
@click.pass_context
def inspect(
    context: click.Context,
    path: str,
    ledger: bool,
    id_col: str,
    as_json: bool,
    workers: int | None,
    scheduler_address: str | None,
    scheduler_file: str | None,
) -> None:
    """Tell what is in the dataset at PATH: counts, sizes, formats, errors, and histograms of its scores.

    With --ledger: what became of every row in the runs that wrote PATH. Each account is verified anew: that rows in +
    joined = rows out + filtered + losses, for each shard and run, and that the files that lie there now hold these
    rows. The exit status is 1 if anything does not balance.
    """
    if ledger:
        if context.get_parameter_source("id_col") is not ParameterSource.DEFAULT:
            raise click.UsageError("--id-col says nothing to --ledger, which reads no samples: leave it out")
        with cluster(workers, scheduler_address, scheduler_file):
            accounts = inspect_ledgers(path)
        print_json(accounts) if as_json else _print_accounts(accounts)
        sys.exit(1 if accounts["problems"] else 0)
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


# The ledger -----------------------------------------------------------------------------------------------------------

FAILURES_SHOWN = 20


def _print_accounts(accounts: dict[str, Any]) -> None:
    for folder in accounts["folders"]:
        for run in folder["runs"]:
            when = f" at {run['time']}" if run["time"] else ""
            print_table(f"{folder['path']}: {run['kind']}{when}", _run_rows(run))
        disk = [(name.replace("_", " "), _lines(value)) for name, value in folder["on_disk"].items()]
        print_table(f"{folder['path']}: its Parquet files now", disk)
    print_table("verdict", [("problems", "\n".join(accounts["problems"]) or "none: every row is accounted for")])


def _lines(value: Any) -> Any:
    return ("\n".join(value) or "none") if isinstance(value, list) else value


def _run_rows(run: dict[str, Any]) -> list[tuple[str, Any]]:
    lost = sum(run["losses"].values())
    equation = (
        f"{run['rows_in']:,} in + {run['rows_joined']:,} joined = "
        f"{run['rows_out']:,} out + {run['rows_filtered']:,} filtered + {lost:,} lost"
    )
    failed = [f"{shard}: {cause}" for shard, cause in run["failed_shards"].items()]
    more = [f"and {len(failed) - FAILURES_SHOWN:,} more"] if len(failed) > FAILURES_SHOWN else []
    rows: list[tuple[str, Any]] = [
        ("ledger", run["ledger"] or "none is left"),
        ("shards", _counts(run["shards"])),
        ("rows", equation),
        ("losses", _counts(run["losses"])),
        ("samples", run["samples"]),
        ("computed", _counts(run["results"])),
        ("images without result, by reason", _counts(run["failures"])),
        ("failed shards", "\n".join([*failed[:FAILURES_SHOWN], *more]) or "none"),
    ]
    rows += [(name.replace("_", " "), run[name]) for name in ("rows_without_sample", "samples_without_row")]
    rows += [(name, "\n".join(run[name])) for name in ("notes", "problems") if run[name]]
    return rows
