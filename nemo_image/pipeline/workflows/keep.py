"""Choose rows of a whole dataset, by quantiles too, and write them: a stage sees only some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError
from nemo_image.filters import KeepExpression, add_columns, keep_with_thresholds
from nemo_image.shards import files


@dataclass(frozen=True)
class KeepResult:
    """What became of the rows.

    Attributes
    ----------
    rows, rows_out : int
        Of the dataset, and of what was written.
    output_path : str
    thresholds : dict of str to (int, float or None)
        Of each quantile; None where no row has a value.
    ledger : str
    """

    rows: int
    rows_out: int
    output_path: str
    thresholds: Mapping[str, int | float | None]
    ledger: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        bounds = "".join(f"\n{name}: threshold {value}" for name, value in self.thresholds.items())
        return f"{self.rows_out:,} of {self.rows:,} rows are in {self.output_path}{bounds}"


class KeepWorkflow:
    """Writes the rows of a dataset that pass expressions, quantiles among them, as a new dataset of full shards.

    Parameters
    ----------
    input_path : str
        A dataset: a pipeline's output, say.
    output_path : str
    keep : str or sequence of str
        As ``nemo-image curate --keep`` takes them, for example ``clip_score in top 30% and width >= 200``; several are
        joined by ``and``. Sizes, blur, brightness and what can be said of captions are made where the dataset lacks
        them.
    id_col : str, default "key"
    sidecars : sequence of str
        Folders of Parquet files with further columns.
    caption_column : str, optional
        As for :class:`~nemo_image.filters.CaptionStats`.
    samples_per_shard, max_shards, old_id_col, keep_ids, shuffle_seed, replace
        As for :meth:`~nemo_image.datasets.ImageTextPairDataset.to_webdataset`.

    Raises
    ------
    ArgumentError
        If an expression is unusable.
    """

    def __init__(
        self,
        input_path: str | os.PathLike[str],
        output_path: str | os.PathLike[str],
        keep: str | Sequence[str],
        id_col: str = "key",
        sidecars: Sequence[str] = (),
        caption_column: str | None = None,
        samples_per_shard: int = 10000,
        max_shards: int = 5,
        old_id_col: str | None = None,
        keep_ids: bool = False,
        shuffle_seed: int | None = None,
        replace: bool = False,
    ) -> None:
        self.input_path = files.absolute(input_path)
        self.output_path = files.folder(output_path)
        texts = [keep] if isinstance(keep, str) else list(keep)
        if not texts:
            raise ArgumentError("keep names no expression: write for example 'clip_score in top 30%'")
        self.keep = " and ".join(f"({KeepExpression(text).text})" for text in texts)
        self.id_col = id_col
        self.sidecars = list(sidecars)
        self.caption_column = caption_column
        self.export: dict[str, Any] = {
            "samples_per_shard": samples_per_shard,
            "max_shards": max_shards,
            "old_id_col": old_id_col,
            "keep_ids": keep_ids,
            "shuffle_seed": shuffle_seed,
            "replace": replace,
        }

    def run(self, executor: Any = None, checkpoint_path: str | os.PathLike[str] | None = None) -> KeepResult:
        """Run the workflow.

        Parameters
        ----------
        executor : DaskExecutor, optional
            Whose cluster does the work; by default the current client, or threads of this process.
        checkpoint_path : None
            A rerun takes over what is finished without one.

        Raises
        ------
        ArgumentError
            If `checkpoint_path` is given, or an expression does not fit the dataset.
        MissingColumnError
            If a column is neither there nor made by a filter.
        DatasetError
            If `output_path` holds another dataset, or no row passes.
        RunError
            If shards failed.
        """
        if checkpoint_path is not None:
            raise ArgumentError("checkpoint_path: a rerun takes over what is finished by itself: leave it out")
        cluster = nullcontext if executor is None else getattr(executor, "cluster", None)
        if cluster is None:
            raise ArgumentError(f"executor must be a DaskExecutor, not {executor!r}")
        with cluster():
            dataset = ImageTextPairDataset.from_webdataset(self.input_path, id_col=self.id_col, sidecars=self.sidecars)
            dataset = add_columns(dataset, KeepExpression(self.keep).columns, self.caption_column)
            dataset, thresholds = keep_with_thresholds(dataset, self.keep)
            written = dataset.to_webdataset(self.output_path, filter_column=schema.KEPT, **self.export)
        totals = written.run_totals or {}
        return KeepResult(totals["rows_in"], totals["rows_out"], self.output_path, thresholds, totals["ledger"])
