"""What `nemo-image curate` and `export` do once all columns are there: find duplicates, choose rows, write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from nemo_image import schema
from nemo_image.cli.options import F
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import ArgumentError
from nemo_image.filters import KeepExpression, add_columns, keep_with_thresholds
from nemo_image.filters.choose import OF_ALL_ROWS
from nemo_image.shards import files

DUPLICATES = "duplicates"
"""The folder, below the output's ``_nemo_image``, of what deduplication found, row by row."""

OF_DEDUP = (
    schema.IS_DUPLICATE,
    schema.DUPLICATE_OF,
    schema.DUPLICATE_OF_SHARD,
    schema.DUPLICATE_TIER,
    schema.CLUSTER,
    schema.CENTROID_DISTANCE,
    schema.MAX_SIMILARITY,
)
"""Columns that a deduplication makes."""

HASHES = ("image_hash", "image_phash", "hash_distance")

_DEDUP_DEFAULTS: Mapping[str, Any] = {
    "chains": False,
    "n_probe": 1,
    "fit_rows": None,
    "max_iter": 100,
    "centroids": None,
    "against": None,
    "embedding_column": schema.IMAGE_EMBEDDING,
    "id_column": None,
    "hash_name": "phash",
    "random_state": 1234,
}
_DEDUP_OPTIONS: Mapping[str, str | None] = {
    "eps": "semantic",
    "target_keep": "semantic",
    "n_clusters": "semantic",
    "max_distance": "perceptual",
    "which_to_keep": None,
}
"""Options, and the tier that they are for; None for all."""


def dedup_options(command: F) -> F:
    """Add the options of a deduplication on the way."""
    for option in (
        click.option("--max-distance", type=click.IntRange(0, 64), help="Perceptual: bits in which copies differ. [4]"),
        click.option("--n-clusters", type=click.IntRange(1), help="Semantic: k-means clusters."),
        click.option("--which-to-keep", help="Which of similar rows stays; as for nemo-image dedup."),
        click.option(
            "--target-keep", type=click.FloatRange(0, 1, min_open=True), help="Semantic: share to keep; chooses eps."
        ),
        click.option("--eps", type=click.FloatRange(0, 1), help="Semantic: copies have a cosine of 1 - eps. [0.01]"),
        click.option(
            "--dedup",
            "tiers",
            type=click.Choice(["exact", "perceptual", "semantic"]),
            multiple=True,
            help="Leave out copies, among the rows that pass every other condition; several in one run.",
        ),
    ):
        command = option(command)
    return command


def export_options(command: F) -> F:
    """Add the options of the tars to write."""
    for option in (
        click.option("--replace", is_flag=True, help="Replace an earlier export of other rows or settings in OUTPUT."),
        click.option("--shuffle-seed", type=int, help="Shuffle the output by this seed."),
        click.option("--keep-ids", is_flag=True, help="Keep ids and member names as they are."),
        click.option("--old-id-col", help="Column and JSON field that keep the old ids."),
        click.option(
            "--max-shards", type=click.IntRange(1), default=5, show_default=True, help="Digits of a shard's number."
        ),
        click.option("--samples-per-shard", type=click.IntRange(1), default=10000, show_default=True),
    ):
        command = option(command)
    return command


@dataclass
class Conditions:
    """Which rows to keep.

    Attributes
    ----------
    early : list of KeepExpression
        Terms that are decided before duplicates are looked for.
    late : list of KeepExpression
        Terms of what a deduplication finds.
    operators : list
        The deduplication's, in order.
    order_columns : list of str
        The columns by which it chooses among copies.
    """

    early: list[KeepExpression] = field(default_factory=list)
    late: list[KeepExpression] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    order_columns: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, keeps: Sequence[str], options: Mapping[str, Any]) -> Conditions:
        """Read the command's ``--keep`` and ``--dedup``.

        Raises
        ------
        ArgumentError
            If one is unusable, or an option is for a deduplication that was not asked for.
        """
        terms = [term for text in keeps for term in KeepExpression(text).terms()]
        for name, tier in _DEDUP_OPTIONS.items():
            if options[name] is not None and not (options["tiers"] if tier is None else tier in options["tiers"]):
                wanted = " ".join(["--dedup", *([] if tier is None else [tier])])
                raise ArgumentError(f"--{name.replace('_', '-')} is for {wanted}, which was not given")
        if not options["tiers"]:
            return cls(terms)
        from nemo_image.cli.dedup import make_operators

        late = [term for term in terms if any(name in OF_DEDUP for name in term.columns)]
        if not any(schema.IS_DUPLICATE in term.columns for term in late):
            late.append(KeepExpression(f"not {schema.IS_DUPLICATE}"))
        early = [term for term in terms if term not in late]
        order, _, direction = (options["which_to_keep"] or "").rpartition(":")
        made = make_operators({**_DEDUP_DEFAULTS, **options})
        return cls(early, late, made, [order] if order and direction else [])

    @property
    def columns(self) -> list[str]:
        """The columns that must be there before duplicates are looked for."""
        late = [name for term in self.late for name in term.columns if name not in OF_DEDUP]
        early = [name for term in self.early for name in term.columns]
        return list(dict.fromkeys([*early, *late, *self.order_columns]))

    def require_names(self, known: Sequence[str]) -> None:
        """Raise if a condition names a column that is not known.

        Raises
        ------
        MissingColumnError
            Naming it, and those that are known.
        """
        for term in [*self.early, *self.late]:
            term.require_columns(list(dict.fromkeys([*known, *OF_DEDUP])))

    def require_columns(self, dataset: ImageTextPairDataset) -> None:
        """Raise if a column is neither there nor made later.

        Raises
        ------
        MissingColumnError
            Naming it, and what would make it.
        """
        present = list(dataset.metadata.columns)
        for term in self.early:
            lacking = [name for name in term.columns if name not in present and name in OF_DEDUP]
            if lacking:
                raise ArgumentError(f"the column {lacking[0]!r} is made by a deduplication: give --dedup too")
            term.require_columns([*present, *OF_ALL_ROWS])
        for term in self.late:
            term.require_columns([*present, *OF_ALL_ROWS, *OF_DEDUP])
        dataset.require_columns([name for name in self.order_columns if name not in OF_ALL_ROWS])
        earlier = [name for name in (*OF_DEDUP, *HASHES) if name in present]
        if self.operators and earlier:
            raise ArgumentError(
                f"INPUT has {earlier[0]!r}, of an earlier deduplication: leave out --dedup, and keep by that "
                f"(--keep 'not {schema.IS_DUPLICATE}')"
            )
        for operator in self.operators:
            column = getattr(operator, "embedding_column", None)
            if column is not None and column not in present:
                raise ArgumentError(f"--dedup semantic needs embeddings, and there is no {column!r}: give --model")


@dataclass
class Chosen:
    """The rows to write.

    Attributes
    ----------
    dataset : ImageTextPairDataset
        With the column ``nemo_image_kept``.
    thresholds : dict of str to (int, float or None)
        Of the quantiles asked for.
    duplicates : list of dict
        What each deduplication found.
    ledgers : list of str
        Of the runs on the way.
    """

    dataset: ImageTextPairDataset
    thresholds: dict[str, int | float | None]
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    ledgers: list[str] = field(default_factory=list)


def choose_rows(
    dataset: ImageTextPairDataset, conditions: Conditions, output_path: str, caption_column: str | None
) -> Chosen:
    """Decide which rows to write.

    Duplicates are looked for among the rows that pass everything else, so that no group of copies loses all of them.
    """
    dataset = add_columns(dataset, conditions.columns, caption_column)
    early, thresholds = keep_with_thresholds(dataset, _joined(conditions.early, dataset.id_col))
    if not conditions.operators:
        return Chosen(early, thresholds)
    early.metadata = early.metadata[early.metadata[schema.KEPT]]
    if not len(early):
        return Chosen(early, thresholds)  # which the export refuses
    for operator in conditions.operators:
        early = operator(early)
    from nemo_image.cli.dedup import account

    found = [account(operator.result_) for operator in conditions.operators]
    folder = files.join(output_path.rstrip("/"), FOLDER, DUPLICATES)
    names = dict.fromkeys(name for operator in conditions.operators for name in operator.result_.columns)
    saved = early.save_metadata(folder, columns=[schema.KEPT, *names])
    # All rows again, so that one ledger accounts for them: those that were not kept so far have nulls.
    whole = add_columns(dataset.reopened(sidecars=[folder]), conditions.columns, caption_column)
    late, more = keep_with_thresholds(whole, _joined([KeepExpression(schema.KEPT), *conditions.late], whole.id_col))
    return Chosen(late, thresholds | more, found, [(saved.run_totals or {})["ledger"]])


def _joined(terms: Sequence[KeepExpression], id_col: str) -> str:
    return " and ".join(f"({term.text})" for term in terms) or f"{id_col} is not None"


def write_rows(dataset: ImageTextPairDataset, output_path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the rows chosen as a new dataset; return the run's totals."""
    names = ("samples_per_shard", "max_shards", "old_id_col", "keep_ids", "shuffle_seed", "replace")
    settings = {name: options[name] for name in names}
    exported = dataset.to_webdataset(output_path, filter_column=schema.KEPT, **settings)
    return {**(exported.run_totals or {}), "shards_out": len(exported.shards)}
