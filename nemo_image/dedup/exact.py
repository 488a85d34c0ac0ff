"""Exact deduplication: the same bytes."""

from __future__ import annotations

import logging
import os

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.hashes.hash_run import HASH_WORDS, HashSettings, deduplicate
from nemo_image.dedup.hashes.hashing import ContentHash
from nemo_image.dedup.result import DedupResult
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")


class ExactDedup:
    """Removes rows whose image is the same file, byte for byte, as another's.

    Needs no embeddings. Images are told by XXH3-128 of their stored bytes; of 5 billion different images, the chance
    that any two share a hash is 4e-20.

    Parameters
    ----------
    which_to_keep : {"id", "random"} or (str, bool), default "id"
        Which of equal rows stays: the one with the smallest id (then shard), a seeded choice, or by a column:
        ``("aesthetic_score", False)`` keeps the highest score. Nulls come last; ties go by id.
    id_column : str, optional
        The column of which ``duplicate_of`` names rows; the dataset's ``id_col`` by default.
    random_state : int, default 1234
        Seed of the order ``"random"``.
    output_dir : str, optional
        The folder of the result's files; by default one below the dataset's ``_nemo_image``.

    Attributes
    ----------
    result_ : DedupResult or None
        Of the last call.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    """

    def __init__(
        self,
        which_to_keep: str | tuple[str, bool] = "id",
        id_column: str | None = None,
        random_state: int = 1234,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.which_to_keep = which_to_keep
        self.id_column = id_column
        self.random_state = random_state
        self.output_dir = None if output_dir is None else files.folder(output_dir)
        self.result_: DedupResult | None = None
        self._order = Order.of(which_to_keep, HASH_WORDS)

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Hash and compare now; return the dataset with the result's columns.

        Adds ``is_duplicate``, ``duplicate_of``, ``duplicate_of_shard``, ``duplicate_tier``, ``image_hash`` and
        ``image_error``. Rows that enter with ``is_duplicate`` are passed by.

        Raises
        ------
        MissingColumnError
            If a column is not there.
        ArgumentError
            If an argument does not fit the dataset.
        DatasetError
            If `output_dir` holds something else.
        RunError
            If shards could not be read.
        """
        settings = HashSettings("exact", "image_hash", self._order, self.id_column or dataset.id_col, self.random_state)
        fingerprint = {"operator": "ExactDedup", "hash": "xxh3_128"}
        result, self.result_ = deduplicate(dataset, ContentHash(dataset.source), fingerprint, settings, self.output_dir)
        logger.info("%s", self.result_)
        return result
