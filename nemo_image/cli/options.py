"""Options that commands share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import click

from nemo_image.engine.client import get_client

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """Add ``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of a table, also of an error."
    )(command)


def id_option(command: F) -> F:
    """Add ``--id-col``."""
    return click.option(
        "--id-col", default="key", show_default=True, help="Column that names a row's sample: its key, or a JSON field."
    )(command)


_GPU = "nemo_image.gpu"


def _remember_gpu(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.meta[_GPU] = value
    return value


def cluster_options(command: F) -> F:
    """Add the options that choose where the work runs."""
    for option in (
        click.option(
            "--workers",
            type=click.IntRange(1),
            help="Start a local cluster of this many processes; with a scheduler, wait for so many.",
        ),
        click.option(
            "--gpu",
            is_flag=True,
            expose_value=False,
            callback=_remember_gpu,
            help="Start a local cluster of one process a GPU; with a scheduler, make sure that its workers have GPUs.",
        ),
        click.option("--scheduler-address", help="Join a running Dask scheduler, as tcp://node1:8786."),
        click.option("--scheduler-file", type=click.Path(), help="Join the scheduler that wrote this file."),
    ):
        command = option(command)
    return command


def parse_part(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Read ``3/16`` as (3, 16)."""
    if value is None:
        return None
    number, slash, count = value.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{value!r} is no share of the shards: 1/16 to 16/16 are those of sixteen jobs")
    return int(number), int(count)


@contextlib.contextmanager
def cluster(workers: int | None, scheduler_address: str | None, scheduler_file: str | None) -> Iterator[None]:
    """Work on the cluster asked for; in this process's threads where none is."""
    gpu = click.get_current_context().meta.get(_GPU, False)
    if not gpu and workers is None and scheduler_address is None and scheduler_file is None:
        yield
        return
    kind: Literal["cpu", "gpu"] = "gpu" if gpu else "cpu"
    with get_client(kind, scheduler_address=scheduler_address, scheduler_file=scheduler_file, n_workers=workers):
        yield


def print_json(values: Any) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(values, ensure_ascii=False, default=str))


def print_table(title: str, rows: list[tuple[str, Any]]) -> None:
    """Print names and values as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
