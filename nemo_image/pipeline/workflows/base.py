"""What the workflows that list duplicates have in common."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nemo_image.dedup import DedupResult, SweepPoint
from nemo_image.dedup.sweep import curve_text
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.pipeline.workflows.duplicates import FOLDER, check_folder, write_duplicates
from nemo_image.pipeline.workflows.listing import Listing, check_fields
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")


@dataclass(frozen=True)
class DeduplicationResult:
    """What a workflow found.

    Attributes
    ----------
    rows : int
        Looked at.
    num_duplicates : int or None
        To be removed; None without a threshold.
    duplicates_path : str or None
        The folder of Parquet files that list them, for :class:`~nemo_image.stages.removal.ImageDuplicatesRemovalStage`.
    result : DedupResult or None
        The deduplication's own account.
    curve : DataFrame or None
        Without a threshold: one row for each usual one, with ``eps``, ``kept``, ``removed``, ``total`` and
        ``kept_fraction``.
    """

    rows: int
    num_duplicates: int | None = None
    duplicates_path: str | None = None
    result: DedupResult | None = None
    curve: pd.DataFrame | None = None

    def __str__(self) -> str:
        if self.result is None:
            assert self.curve is not None
            columns = (self.curve[name].tolist() for name in ("eps", "kept", "removed"))
            points = [SweepPoint(*values) for values in zip(*columns, strict=True)]
            return f"{self.rows:,} rows, no threshold given (eps): nothing is listed for removal\n{curve_text(points)}"
        return f"{self.result}\nlisted in {self.duplicates_path}"


class DeduplicationWorkflow:
    """What the workflows have in common."""

    def __init__(
        self,
        input_path: str | Sequence[str],
        output_path: str | os.PathLike[str],
        id_field: str,
        metadata_fields: Sequence[str] | None,
        storage_options: Mapping[str, Any],
        clear_output: bool,
        verbose: bool,
    ) -> None:
        paths = [input_path] if isinstance(input_path, str | os.PathLike) else list(input_path)
        self.input_paths = [files.absolute(path) for path in paths]
        self.output_path = files.folder(output_path)
        self.id_field = id_field
        self.metadata_fields = list(metadata_fields or ())
        self.storage_options = dict(storage_options)
        self.clear_output = clear_output
        self.verbose = verbose
        if not self.output_path or not self.input_paths or not all(self.input_paths):
            raise ArgumentError("input_path and output_path must not be empty")

    @property
    def duplicates_path(self) -> str:
        """The folder of the list of duplicates."""
        return files.join(self.output_path, FOLDER)

    @contextmanager
    def running(self, executor: Any) -> Iterator[None]:
        """Hold the output folder, and have the executor's client be the current one."""
        cluster = nullcontext if executor is None else getattr(executor, "cluster", None)
        if cluster is None:
            raise ArgumentError(f"executor must be a DaskExecutor, not {executor!r}")
        with cluster(), run_lock(self.output_path, "dedup", self.storage_options):
            check_folder(self.duplicates_path, None, self.clear_output, self.storage_options)
            yield

    def list_duplicates(self, listing: Listing, result: DedupResult) -> DeduplicationResult:
        """Write the list of duplicates."""
        check_fields(listing.fields, listing.extras)
        count = write_duplicates(listing, self.duplicates_path, self.clear_output)
        if count != result.removed:
            raise DatasetError(f"{count} duplicates are listed of {result.removed}: please report this")
        made = DeduplicationResult(result.rows, count, self.duplicates_path, result)
        if self.verbose:
            logger.info("%s", made)
        return made


def storage_options(**given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options that serve all reading and writing.

    Raises
    ------
    ArgumentError
        If they contradict each other, or something else is given.
    """
    merged: dict[str, Any] = {}
    for name, values in given.items():
        others = [key for key in values or () if key != "storage_options"]
        if others:
            raise ArgumentError(f"{name}: {others[0]!r} would do nothing; only 'storage_options' is taken")
        for key, value in ((values or {}).get("storage_options") or {}).items():
            if merged.setdefault(key, value) != value:
                raise ArgumentError(f"{name}: storage option {key!r} contradicts another; one set serves all files")
    return merged
