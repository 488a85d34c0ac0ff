"""``nemo-image run``: run a pipeline of stages, or a workflow, that a YAML file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nemo_image.cli.options import cluster, cluster_options, json_option, print_json

EXAMPLE = """
Examples:

\b
  nemo-image run curate.yaml input_path=/data/pairs output_path=/data/curated
  nemo-image run curate.yaml stages.3.score_threshold=5.5 --describe
  nemo-image run curate.yaml --allow my_filters --checkpoint-path /data/checkpoint --workers 8

\b
The file has a list of stages, and values that they refer to; ??? marks those that must be given:
  input_path: ???
  stages:
    - _target_: nemo_image.stages.FilePartitioningStage
      file_paths: ${input_path}
    - _target_: nemo_image.stages.ImageReaderStage
"""


@click.command(epilog=EXAMPLE)
@click.argument("config_path", metavar="FILE")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--describe", is_flag=True, help="Print the pipeline and check it; run nothing, read no input.")
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="PACKAGE",
    help="Let the file name classes of this package or module of yours: installed, or PACKAGE.py in the current folder "
    "or beside the file. It is imported.",
)
@click.option("--checkpoint-path", help="Folder of notes on finished file groups: the same command then skips them.")
@cluster_options
@json_option
def run(
    config_path: str,
    overrides: tuple[str, ...],
    describe: bool,
    allowed: tuple[str, ...],
    checkpoint_path: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the pipeline of stages, or the workflow, that FILE describes in YAML.

    KEY=VALUE replaces a value of the file, +KEY=VALUE adds one; stages are counted from 0. Configurations of NeMo
    Curator's image stages run too: their names and arguments are read as ours, and the log says so.

    Without --workers or a scheduler, a pipeline starts a local cluster, a workflow works in threads.
    """
    plan = _plan(config_path, overrides, allowed)
    built = plan.build()
    if describe:
        print_json(_described(plan, built)) if as_json else click.echo(_description(plan, built))
        return
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        results = built.run(checkpoint_path=checkpoint_path)
    account = results.to_dict() if hasattr(results, "to_dict") else _account(results)
    if as_json:
        print_json({**account, "notes": plan.notes})
    else:
        click.echo(results.summary() if plan.part == "stages" else str(results))


def _plan(config_path: str, overrides: tuple[str, ...], allowed: tuple[str, ...]) -> Any:
    from nemo_image.pipeline.configuration.build import read_plan
    from nemo_image.pipeline.configuration.config import load_config
    from nemo_image.pipeline.configuration.own_modules import import_own
    from nemo_image.pipeline.configuration.targets import OURS

    config = load_config(config_path, overrides)
    folders = [Path.cwd(), *([] if "://" in config_path else [Path(config_path).parent])]
    for package in allowed:
        import_own(package, folders)
    return read_plan(config, [OURS, *allowed])


def _description(plan: Any, built: Any) -> str:
    if plan.part == "stages":
        return str(built.describe())
    (entry,) = plan.entries
    lines = [f"Workflow: {entry.cls.__name__}"]
    return "\n".join([*lines, *(f"  {name}: {value!r}" for name, value in entry.arguments.items())])


def _account(found: Any) -> dict[str, Any]:
    """Return what a workflow found, as plain values."""
    names = ("rows", "num_duplicates", "duplicates_path")
    account = {name: getattr(found, name) for name in names}
    if found.curve is not None:
        account["curve"] = found.curve.to_dict("records")
    return account


def _described(plan: Any, built: Any) -> dict[str, Any]:
    """Return what was built, as plain values."""
    described = []
    stages = built.stages if plan.part == "stages" else [None]
    for entry, stage in zip(plan.entries, stages, strict=True):
        target = f"{entry.cls.__module__}.{entry.cls.__qualname__}"
        described.append({"target": target, "arguments": entry.arguments})
        if stage is not None:
            described[-1] |= {
                "name": stage.name,
                "resources": {"cpus": stage.resources.cpus, "gpus": stage.resources.gpus},
                "inputs": stage.inputs()[1],
                "outputs": stage.outputs()[1],
            }
    return {"name": plan.name, plan.part: described, "notes": plan.notes}
