"""A dataset as its parts: what saving and exporting work on, and what they give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd

from nemo_image.datasets.lineage import Lineage
from nemo_image.datasets.load import ShardLoader
from nemo_image.datasets.opening import Opened
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import MissingColumnError


@dataclass(frozen=True)
class DatasetState:
    """A dataset at one moment.

    Attributes
    ----------
    source : DatasetSource
    shards : list of str
    frame : dask.dataframe.DataFrame
        The user's metadata.
    lineage : Lineage
        What operators made of it, and what the user changed.
    """

    source: DatasetSource
    shards: Sequence[str]
    frame: Any
    lineage: Lineage

    @classmethod
    def of(cls, opened: Opened) -> DatasetState:
        """Return the state of a dataset as it lies on disk: one partition a shard."""
        loader = ShardLoader(opened.source)
        frame = dd.from_map(loader, opened.shards, meta=loader.meta(), label="load-shard")
        return cls(opened.source, opened.shards, frame, Lineage(frame.expr._name, dict(opened.provenance)))

    def require_columns(self, names: Sequence[str]) -> None:
        """Raise if the metadata lacks a column.

        Raises
        ------
        MissingColumnError
            Naming it, and the columns that are there.
        """
        missing = [name for name in names if name not in self.frame.columns]
        if missing:
            raise MissingColumnError(
                f"the metadata has no column {', '.join(map(repr, missing))}; it has {', '.join(self.frame.columns)}"
            )
