"""``nemo-image index``: write the ``.idx`` file beside each tar."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import click

from nemo_image.cli.options import cluster, cluster_options, json_option, print_json, print_table
from nemo_image.datasets.discover import discover
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import ArgumentError, NemoImageError, one_line
from nemo_image.shards import files
from nemo_image.shards.idx_file import write_idx
from nemo_image.shards.index import index_tar

logger = logging.getLogger("nemo_image")

EXAMPLE = """
Example:

\b
  nemo-image index /data/laion
"""


@dataclass
class Indexed:
    """What became of one tar."""

    tar: str
    samples: int = 0
    skipped: str | None = None
    error: str | None = None


def write_beside(tar: str) -> Indexed:
    """Write a tar's ``.idx``."""
    found = Indexed(tar)
    try:
        index = index_tar(tar)
        found.samples = len(index)
        write_idx(index, tar.removesuffix(".tar") + ".idx")
    except ArgumentError as error:
        found.skipped = str(error)
    except NemoImageError as error:
        found.error = str(error)
    return found


@click.command(epilog=EXAMPLE)
@click.argument("path")
@cluster_options
@json_option
def index(
    path: str, as_json: bool, workers: int | None, scheduler_address: str | None, scheduler_file: str | None
) -> None:
    """Write DALI's index (NAME.idx, format v1.2) beside each tar of PATH.

    PATH is a folder, a glob or a brace pattern. Tars whose member names the format cannot hold (spaces) get none, and
    are named.
    """
    found = discover(path)
    tars = [files.join(found.root, shard + ".tar") for shard in found.shards]
    made: list[Indexed] = []
    with cluster(workers, scheduler_address, scheduler_file), Progress("index", len(tars)) as progress:
        for one in run_tasks(
            write_beside, tars, on_error=lambda tar, error: Indexed(tar, error=one_line(error)), count=len(tars)
        ):
            made.append(one)
            progress.advance(one.samples)
    made.sort(key=lambda one: one.tar)
    failed = {one.tar: one.error for one in made if one.error}
    result: dict[str, Any] = {
        "tars": len(made),
        "samples": sum(one.samples for one in made),
        "written": sum(not one.skipped and not one.error for one in made),
        "skipped": {one.tar: one.skipped for one in made if one.skipped},
        "failed": failed,
    }
    if as_json:
        print_json(result)
    else:
        names = {name: "\n".join(map(str, result[name].values())) or "none" for name in ("skipped", "failed")}
        print_table("index", list({**result, **names}.items()))
    sys.exit(1 if failed else 0)
