"""A report: what a dataset holds and what became of its rows, as one HTML file for people.

The file needs no network and runs no script: the page forbids both to itself, so that a caption cannot either. Counts
and histograms are of all rows; pictures are a selection, the same one each time. Its size is bounded (`MOST_BYTES`),
whatever the size of the dataset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.show.plan import plan_of
from nemo_image.datasets.show.survey import survey
from nemo_image.engine.decoding.server import start_ahead
from nemo_image.engine.run import current_client
from nemo_image.errors import ArgumentError, DatasetError, MissingColumnError
from nemo_image.reports.ledger import inspect_ledgers
from nemo_image.reports.page import Page
from nemo_image.reports.selection import Selection
from nemo_image.shards import files

THRESHOLDS: Mapping[str, tuple[float, ...]] = {schema.AESTHETIC_SCORE: (5.0,), schema.NSFW_SCORE: (0.5,)}
"""Usual thresholds of known scores: marked unless others are given."""

QUANTILES = (0.1, 0.5, 0.9)

NOT_REPORTS = (".tar", ".parquet", ".idx", ".json", ".jsonl")
"""Ends of names of a dataset's files: no report is written there."""

_HEAD_BYTES, _MADE_BY = 2000, b'<meta name="generator" content="nemo_image'  # how a report begins

MOST_BYTES = 16_000_000
"""No report is larger, in bytes."""


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes
    ----------
    path : str
    bytes : int
        Size of the file.
    rows : int
    pictures : int
        Pictures in it.
    unreadable : dict of str to str
        Shards that could not be read, with the cause: the metadata, so that their rows are missing, or the tar, so
        that their pictures are. Of tars, only those of the pictures that were chosen are opened.
    problems : list of str
        What does not balance in the ledgers.
    """

    path: str
    bytes: int
    rows: int
    pictures: int
    unreadable: dict[str, str]
    problems: list[str]


def write_report(
    dataset: ImageTextPairDataset,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    thresholds: Mapping[str, float | Sequence[float]] | None = None,
    quantiles: Sequence[float] = QUANTILES,
    pictures: int = 6,
    groups: int = 12,
    storage_options: Mapping[str, Any] | None = None,
) -> Report:
    """Write a report of a dataset: one HTML file that opens from disk.

    Columns that are pending are computed once, into the dataset's ``_nemo_image/``. All rows are read twice at most,
    without their embeddings, on the cluster if there is one.

    Parameters
    ----------
    dataset : ImageTextPairDataset
        With whatever filters and columns the user gave its frame.
    path : str or path
        The file, local or any fsspec URL. An earlier report that is there is replaced, nothing else.
    title : str, optional
        The dataset's path by default.
    thresholds : dict of str to float or sequence of float
        Values of scores at which to look: pictures just below and above each, and how many rows pass. 5 for
        ``aesthetic_score`` and 0.5 for ``nsfw_score`` by default, where these hold numbers; an empty sequence for none.
        Pictures at or above the least threshold of ``nsfw_score`` are blurred until the reader asks for them.
    quantiles : sequence of float
        Shares in (0, 1) at which pictures of each score are shown.
    pictures : int, default 6
        Pictures of each gallery at most.
    groups : int, default 12
        Groups of copies at most.
    storage_options : dict, optional
        For fsspec, of `path`.

    Returns
    -------
    Report

    Raises
    ------
    ArgumentError
        If an argument is out of range, a given threshold's column holds no numbers, or `path` is a folder, has the name
        of a dataset's file, or holds something other than an earlier report.
    MissingColumnError
        If there is no such column.
    """
    _check(pictures, groups, quantiles)
    _check_output(path, storage_options)
    limits = _thresholds(dataset, thresholds)
    dataset = dataset.materialize()
    plan = plan_of(dataset.metadata, dataset.id_col, limits, pictures)
    unfit = [name for name in thresholds or {} if limits[name] and name not in plan.numbers]
    if unfit:
        raise ArgumentError(f"thresholds: column {unfit[0]!r} holds no numbers")
    if current_client() is None:
        start_ahead()
    found = survey(dataset.state, plan, "report")
    selection = Selection(dataset, plan, found, tuple(quantiles), pictures, groups)
    accounts = _accounts(dataset)
    text = Page(dataset, plan, found, selection, accounts).render(title).encode("utf-8", "replace")
    with files.atomic_writer(path, storage_options) as out:
        out.write(text)
    problems = accounts["problems"] if accounts else []
    unreadable = {**selection.unreadable, **found.failures}
    return Report(os.fspath(path), len(text), found.rows, selection.pictures, unreadable, problems)


def _check(pictures: int, groups: int, quantiles: Sequence[float]) -> None:
    if pictures < 1:
        raise ArgumentError(f"pictures must be at least 1, not {pictures}")
    if not 0 <= groups <= 40:
        raise ArgumentError(f"groups must lie in 0 to 40, not {groups}")
    if any(not 0 < one < 1 for one in quantiles) or len(quantiles) > 9:
        raise ArgumentError(f"quantiles must be at most 9 shares between 0 and 1, not {list(quantiles)}")


def _check_output(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> None:
    """Raise if what is at `path` would be lost, or the report be taken for a dataset's file."""
    url = os.fspath(path)
    if url.endswith("/") or files.is_folder(url, storage_options):
        raise ArgumentError(
            f"{url} is a folder: name a file for the report, for example {files.join(url, 'report.html')}"
        )
    if url.lower().endswith(NOT_REPORTS):
        raise ArgumentError(
            f"{url} has the name of a dataset's file, not of a report: give another path, for example report.html"
        )
    fs, inside = files.open_fs(url, storage_options)
    try:
        with fs.open(inside, "rb") as file:
            start = file.read(_HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return  # the writer says why it cannot make one
    except PermissionError as error:
        raise ArgumentError(f"{url} cannot be read, so it may be no earlier report: give another path") from error
    if start and not (start.lstrip().startswith(b"<!DOCTYPE html>") and _MADE_BY in start):
        raise ArgumentError(f"{url} is there and is no report of nemo_image: give another path, or move that file away")


def _thresholds(
    dataset: ImageTextPairDataset, given: Mapping[str, float | Sequence[float]] | None
) -> dict[str, tuple[float, ...]]:
    wanted = {name: (one,) if isinstance(one, int | float) else tuple(one) for name, one in (given or {}).items()}
    missing = [name for name in wanted if name not in dataset.metadata.columns]
    if missing:
        raise MissingColumnError(
            f"thresholds: the metadata has no column {missing[0]!r}; it has {', '.join(dataset.metadata.columns)}"
        )
    known = {name: some for name, some in THRESHOLDS.items() if name in dataset.metadata.columns}
    found = {**known, **wanted}
    crowded = [name for name, some in found.items() if len(some) > 9 or not all(np.isfinite(some))]
    if crowded:
        raise ArgumentError(f"thresholds: give at most 9 finite numbers for {crowded[0]!r}")
    return {name: tuple(sorted(some)) for name, some in found.items()}


def _accounts(dataset: ImageTextPairDataset) -> dict[str, Any] | None:
    """Return the accounts of the runs that wrote the dataset, or None if there were none."""
    try:
        return inspect_ledgers(dataset.path, dict(dataset.source.storage_options) or None)
    except DatasetError:
        return None
