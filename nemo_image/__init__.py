"""Curate image-text datasets with Dask: embed, score, filter and export, with every row accounted for."""

from nemo_image import schema
from nemo_image.engine.client import get_client, get_num_workers

__version__ = "0.1.0"

__all__ = ["__version__", "get_client", "get_num_workers", "schema"]
