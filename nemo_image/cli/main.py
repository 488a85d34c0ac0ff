"""The command group and what every command shares."""

from __future__ import annotations

import codecs
import json
import logging
import os
import sys
from typing import Any

import click

from nemo_image import __version__
from nemo_image.errors import NemoImageError

COMMANDS = {
    "classify": "nemo_image.cli.classify",
    "curate": "nemo_image.cli.curate",
    "dedup": "nemo_image.cli.dedup",
    "embed": "nemo_image.cli.embed",
    "export": "nemo_image.cli.export",
    "index": "nemo_image.cli.index",
    "inspect": "nemo_image.cli.inspect",
    "report": "nemo_image.cli.report",
    "run": "nemo_image.cli.run",
}


class Commands(click.Group):
    """Loads a command's module when it is called, and prints our errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        import importlib

        command: click.Command = getattr(importlib.import_module(COMMANDS[name]), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with 1 and one line, or with ``--json`` also an object, where it fails."""
        as_json = "--json" in [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            return super().invoke(ctx)
        except NemoImageError as error:
            text, failures = str(error), getattr(error, "failures", {})
            said = {"error": text, "type": type(error).__name__, **({"failures": failures} if failures else {})}
        except OSError as error:
            if error.filename is None:
                raise  # not about a file: a defect
            text = f"{os.fspath(error.filename)}: {error.strerror}"
            said = {"error": text, "type": type(error).__name__}
        click.echo(f"Error: {text}", err=True)
        if as_json:
            click.echo(json.dumps(said, ensure_ascii=False))
        sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="nemo-image")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done.")
def main(verbose: bool) -> None:
    """Curate image-text datasets: WebDataset tars with Parquet metadata."""
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8":
        raise click.UsageError(
            f"Python takes file names for {sys.getfilesystemencoding()} here: set PYTHONUTF8=1, or a UTF-8 locale"
        )
    logging.basicConfig(
        level=logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    # Dask sets its loggers' level when it is imported, here and in the workers that it starts.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
    # Libraries say much at this level that is not about the user's data.
    for name in ("distributed", "timm", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Each of their many tries to reach the hub is a warning; our own error then says what to do.
    for name in ("httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
