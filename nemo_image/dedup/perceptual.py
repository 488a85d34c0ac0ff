"""Perceptual deduplication: pictures that look the same to a hash."""

from __future__ import annotations

import logging
import os
from typing import Literal

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup.exchange.rows import Order
from nemo_image.dedup.hashes.hash_run import HASH_WORDS, HashSettings, deduplicate
from nemo_image.dedup.hashes.hashing import PerceptualHash
from nemo_image.dedup.result import DedupResult
from nemo_image.errors import ArgumentError
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

BITS = 64


class PerceptualDedup:
    """Removes rows whose picture has nearly the same perceptual hash as one that is kept: recompressed, resized copies.

    Needs no embeddings. Hashes have 64 bits; pairs within `max_distance` are found through several indexes of parts of
    the hash (multi-index hashing, Norouzi, Punjani and Fleet, CVPR 2012), none is left out. Pictures of one colour all
    have one hash, whatever the colour: they are kept.

    Parameters
    ----------
    hash : {"phash", "dhash", "ahash"}, default "phash"
        As the imagehash library defines them: signs of a discrete cosine transform, of differences of neighbouring
        pixels, or against the average.
    max_distance : int, default 4
        Bits, of 64, in which the hashes of copies may differ. On COCO photographs, 4 found all copies that were
        recompressed at quality 50 or halved in size, and different pictures were 14 apart or more; 6 also found nine of
        ten that had 2% cut off. Crops and other views are the semantic tier's.
    which_to_keep : {"id", "random"} or (str, bool), default "id"
        Which of similar rows stays: the one with the smallest id (then shard), a seeded choice, or by a column:
        ``("aesthetic_score", False)`` keeps the highest score. Nulls come last; ties go by id.
    id_column : str, optional
        The column of which ``duplicate_of`` names rows; the dataset's ``id_col`` by default.
    random_state : int, default 1234
        Seed of the order ``"random"``.
    num_threads : int, default 4
        Decoding threads of a task.
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
    MissingDependencyError
        If imagehash is not installed.
    """

    def __init__(
        self,
        hash: Literal["phash", "dhash", "ahash"] = "phash",
        max_distance: int = 4,
        which_to_keep: str | tuple[str, bool] = "id",
        id_column: str | None = None,
        random_state: int = 1234,
        num_threads: int = 4,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(max_distance, int) or isinstance(max_distance, bool) or not 0 <= max_distance <= BITS:
            raise ArgumentError(f"max_distance must be a number of bits from 0 to {BITS}, not {max_distance!r}")
        self.hash = hash
        self.max_distance = max_distance
        self.which_to_keep = which_to_keep
        self.id_column = id_column
        self.random_state = random_state
        self.num_threads = num_threads
        self.output_dir = None if output_dir is None else files.folder(output_dir)
        self.result_: DedupResult | None = None
        self._order = Order.of(which_to_keep, HASH_WORDS)

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Hash and compare now; return the dataset with the result's columns.

        Adds ``is_duplicate``, ``duplicate_of``, ``duplicate_of_shard``, ``duplicate_tier``, the hash (``image_phash``,
        …), ``hash_distance`` (in bits) and ``image_error``. Rows that enter with ``is_duplicate`` are passed by. The
        last step, which looks for near hashes, is one task that holds the hashes and ids of all rows.

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
        hashing = PerceptualHash(dataset.source, self.hash, self.num_threads)
        settings = HashSettings(
            "perceptual",
            f"image_{self.hash}",
            self._order,
            self.id_column or dataset.id_col,
            self.random_state,
            self.max_distance,
        )
        fingerprint = {"operator": "PerceptualDedup", "hash": self.hash, "bits": BITS}
        result, self.result_ = deduplicate(dataset, hashing, fingerprint, settings, self.output_dir)
        logger.info("%s", self.result_)
        return result
