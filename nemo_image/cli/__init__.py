"""The command line: ``nemo-image``."""

from nemo_image.cli.main import main

__all__ = ["main"]
