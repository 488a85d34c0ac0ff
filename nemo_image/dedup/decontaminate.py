"""Decontamination: rows that are too like a user's evaluation set."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.passes import file_identities
from nemo_image.datasets.queries import require_same_model
from nemo_image.dedup.evaluation.collect import EvaluationSet, collect, read_evaluation
from nemo_image.dedup.evaluation.mark import MarkContaminated, MarkSettings
from nemo_image.dedup.evaluation.pictures import PATH, is_dataset, list_pictures, pack
from nemo_image.dedup.exchange.work import begin, remove
from nemo_image.dedup.hashes.hashing import HashName, PerceptualHash
from nemo_image.dedup.perceptual import BITS
from nemo_image.dedup.sweep import is_eps
from nemo_image.engine.device import worker_device
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, MissingColumnError
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

PICTURES, EMBEDDED = "pictures", "embedded"
"""Folders that last until the evaluation set is collected."""


class Decontaminate:
    """Marks rows whose picture is, or nearly is, one of an evaluation set: what a model is to be tested on.

    Every row is compared with every picture of the evaluation set, by the cosine of their embeddings, by the bits in
    which their perceptual hashes differ, or by both; nothing is approximate. Hashes find recompressed and resized
    copies, embeddings also crops and other versions.

    Parameters
    ----------
    against : str, path, list of str, or ImageTextPairDataset
        The evaluation set: a folder of pictures (and its subfolders), tars as
        :meth:`~nemo_image.datasets.ImageTextPairDataset.from_webdataset` takes them, or a dataset.
    embedder : ImageEmbedder, optional
        Embeds the evaluation set, if it does not have `embedding_column`: the one that embedded the dataset.
    eps : float or None, default 0.05
        A row is contaminated if its cosine to a picture of the evaluation set is at least ``1 - eps``; at 0, exact
        copies are. Models differ widely: 0.05 suits CLIP embeddings. None: do not compare embeddings.
    max_distance : int or None, default 4
        Or if their hashes differ in at most so many of 64 bits. None: do not compare hashes.
    hash : {"phash", "dhash", "ahash"}, default "phash"
    embedding_column : str, default "image_embedding"
        Of the dataset, and of the evaluation set if that has it. Vectors of any norm.
    num_threads : int, default 4
        Decoding threads of a task, for the hashes.
    output_dir : str, optional
        The folder for what is kept of the evaluation set, which tasks read: 4 bytes a number of its embeddings. By
        default one below the dataset's ``_nemo_image``.

    Attributes
    ----------
    evaluation_ : EvaluationSet or None
        Of the last call.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    MissingDependencyError
        If imagehash is needed and not installed.
    """

    def __init__(
        self,
        against: Any,
        embedder: Any = None,
        eps: float | None = 0.05,
        max_distance: int | None = 4,
        hash: HashName = "phash",
        embedding_column: str = schema.IMAGE_EMBEDDING,
        num_threads: int = 4,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if eps is None and max_distance is None:
            raise ArgumentError("eps and max_distance are both None: there is nothing to compare by")
        if eps is not None and not is_eps(eps):
            raise ArgumentError(f"eps must lie in [0, 1], not {eps!r}: a pair counts from cosine 1 - eps on")
        is_bits = isinstance(max_distance, int) and not isinstance(max_distance, bool)
        if max_distance is not None and not (is_bits and 0 <= max_distance <= BITS):
            raise ArgumentError(f"max_distance must be a number of bits from 0 to {BITS}, not {max_distance!r}")
        if not isinstance(against, ImageTextPairDataset | str | os.PathLike | list | tuple):
            raise ArgumentError(
                f"against must be a folder of pictures or of tars, or an ImageTextPairDataset, not {against!r}"
            )
        if embedder is not None and not callable(embedder):
            raise ArgumentError(f"embedder: {type(embedder).__name__} cannot embed a dataset: give an ImageEmbedder")
        self.against = against
        self.embedder = embedder
        self.eps = None if eps is None else float(eps)
        self.max_distance = max_distance
        self.hash = hash
        self.embedding_column = embedding_column
        self.num_threads = num_threads
        self.output_dir = None if output_dir is None else files.folder(output_dir)
        self.evaluation_: EvaluationSet | None = None

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Embed and hash the evaluation set now; return the dataset with the columns, lazily.

        Adds ``contaminated`` (null where a row could not be compared by all that was asked for and nothing found it),
        ``eval_match`` (the picture that it is like), ``eval_similarity``, ``eval_hash_distance``, the hash
        (``image_phash``, …) and ``image_error``.

        Raises
        ------
        MissingColumnError
            If the dataset has no embeddings.
        ArgumentError
            If the evaluation set has none either and no embedder is given.
        EmbeddingError
            If those of the dataset and of the evaluation set come from different models.
        DatasetError
            If there is no evaluation set, or nothing in it can be compared with, or `output_dir` holds something else.
        RunError
            If the evaluation set could not be read.
        """
        options = dataset.source.storage_options
        if self.eps is not None and self.embedding_column not in dataset.metadata.columns:
            raise MissingColumnError(
                f"the metadata has no column {self.embedding_column!r}: run an embedder first, or give eps=None to "
                f"compare perceptual hashes alone; there are {', '.join(dataset.metadata.columns)}"
            )
        given = _Given.of(self.against, options)
        token = self._token(given, dataset)
        folder = self.output_dir or files.join(dataset.path, FOLDER, f"decontaminate-{token[:16]}")
        with run_lock(folder, "decontaminate", options):
            begin(folder, {"operator": "Decontaminate", "token": token}, options, named_by_user=bool(self.output_dir))
            evaluation = read_evaluation(folder, options) or self._evaluate(given, dataset, folder)
            for name in (PICTURES, EMBEDDED):
                remove(files.join(folder, name), options)
        self._check(evaluation, dataset)
        logger.info("evaluation set: %s", evaluation)
        self.evaluation_ = evaluation
        return self._marked(dataset, evaluation)

    def _token(self, given: _Given, dataset: ImageTextPairDataset) -> str:
        """Return what tells this evaluation set, and what is to be kept of it, from others."""
        by_model = dataset.provenance.get(self.embedding_column) if self.eps is not None else None
        asked = (self.eps is not None, self.max_distance is not None and self.hash, self.embedding_column)
        return str(tokenize(given.token(), asked, by_model, self.embedder if self.eps is not None else None))

    def _evaluate(self, given: _Given, dataset: ImageTextPairDataset, folder: str) -> EvaluationSet:
        """Embed and hash the evaluation set, and keep what rows are compared with."""
        options = dataset.source.storage_options
        found = given.dataset(files.join(folder, PICTURES), options)
        columns = [PATH] if given.pictures else []
        vector_column = hash_column = None
        if self.eps is not None:
            found, vector_column = self._with_embeddings(found, dataset)
            columns.append(vector_column)
        if self.max_distance is not None:
            found, hash_column = self._with_hashes(found)
            columns.append(hash_column)
        saved = found.save_metadata(files.join(folder, EMBEDDED), columns=columns)
        return collect(saved, vector_column, hash_column, folder)

    def _with_embeddings(
        self, found: ImageTextPairDataset, dataset: ImageTextPairDataset
    ) -> tuple[ImageTextPairDataset, str]:
        """Return the evaluation set with embeddings, and their column."""
        column = self.embedding_column
        if column not in found.metadata.columns:
            if self.embedder is None:
                raise ArgumentError(
                    f"against has no column {column!r}: give embedder=, the one that embedded the dataset, or eps=None "
                    "to compare perceptual hashes alone"
                )
            found = self.embedder(found)
            column = getattr(self.embedder, "image_embedding_column", column)
        mine, made_by = found.provenance.get(column), dataset.provenance.get(self.embedding_column)
        require_same_model(mine, made_by, self.embedding_column, "that of the evaluation set")
        return found, column

    def _with_hashes(self, dataset: ImageTextPairDataset) -> tuple[ImageTextPairDataset, str]:
        """Return a dataset with perceptual hashes, lazily, and their column; hashes that we made before are taken."""
        column = f"image_{self.hash}"
        if column in dataset.provenance:
            return dataset, column
        if column in dataset.metadata.columns:
            raise ArgumentError(f"column {column!r} came with the data, and is to hold our hashes: rename it")
        outputs = {column: schema.arrow_dtype("string"), schema.IMAGE_ERROR: schema.arrow_dtype("string")}
        made_by = {"operator": "PerceptualHash", "hash": self.hash, "bits": BITS}
        fingerprints: dict[str, Mapping[str, Any]] = {column: made_by}
        fingerprints[schema.IMAGE_ERROR] = dataset.provenance.get(schema.IMAGE_ERROR, made_by)
        hashing = PerceptualHash(dataset.source, self.hash, self.num_threads)
        made = dataset.map_columns(hashing, outputs=outputs, fingerprints=fingerprints, reads_images=True)
        return made, column

    def _check(self, evaluation: EvaluationSet, dataset: ImageTextPairDataset) -> None:
        """Raise where nothing could be found, or embeddings of another size are on their way."""
        if self.eps is not None and not evaluation.vectors:
            raise DatasetError(
                f"none of the {evaluation.rows} pictures of the evaluation set has a usable embedding: see the reasons "
                "that an embedder gives them (image_error)"
            )
        if self.max_distance is not None and not evaluation.hashed:
            raise DatasetError(f"none of the {evaluation.rows} pictures of the evaluation set can be decoded")
        missing = evaluation.rows - min(
            evaluation.vectors if self.eps is not None else evaluation.rows,
            evaluation.hashed if self.max_distance is not None else evaluation.rows,
        )
        if missing:
            logger.warning(
                "%d of the %d pictures of the evaluation set have no usable embedding or hash: what is like them "
                "is not found",
                missing,
                evaluation.rows,
            )
        size = dataset.provenance.get(self.embedding_column, {}).get("embedding_size", evaluation.size)
        if self.eps is not None and size != evaluation.size:
            raise EmbeddingError(
                f"column {self.embedding_column!r} holds embeddings of {size} numbers, the evaluation set's have "
                f"{evaluation.size}: they come from another model"
            )

    def _marked(self, dataset: ImageTextPairDataset, evaluation: EvaluationSet) -> ImageTextPairDataset:
        """Return the dataset with the columns that comparing makes, lazily."""
        hash_column = None
        if self.max_distance is not None:
            dataset, hash_column = self._with_hashes(dataset)
        settings = MarkSettings(
            self.embedding_column if self.eps is not None else None,
            hash_column,
            0.0 if self.eps is None else self.eps,
            0 if self.max_distance is None else self.max_distance,
        )
        inputs = [name for name in (settings.embedding_column, settings.hash_column) if name is not None]
        provenance = dataset.provenance
        made_by = {
            "operator": "Decontaminate",
            "against": evaluation.digest,
            "eps": self.eps,
            "max_distance": self.max_distance,
            "parents": {name: provenance.get(name) for name in inputs},
        }
        fingerprints: dict[str, Mapping[str, Any]] = dict.fromkeys(settings.outputs, made_by)
        fingerprints[schema.IMAGE_ERROR] = provenance.get(schema.IMAGE_ERROR, made_by)
        outputs = {name: schema.arrow_dtype(kind) for name, kind in settings.outputs.items()}
        outputs[schema.IMAGE_ERROR] = schema.arrow_dtype("string")
        if schema.IMAGE_ERROR in dataset.metadata.columns:
            inputs.append(schema.IMAGE_ERROR)
        marking = MarkContaminated(evaluation, settings, dataset.source.storage_options, worker_device())
        return dataset.map_columns(marking, inputs=inputs, outputs=outputs, fingerprints=fingerprints)


@dataclass(frozen=True)
class _Given:
    """An evaluation set as the user gave it: a folder with its pictures, or a dataset."""

    folder: str
    pictures: Sequence[Any]
    opened: ImageTextPairDataset | None

    @classmethod
    def of(cls, against: Any, storage_options: Any) -> _Given:
        if isinstance(against, ImageTextPairDataset):
            return cls("", (), against)
        path = files.folder(against) if isinstance(against, str | os.PathLike) else list(against)
        if is_dataset(path, storage_options):
            return cls("", (), ImageTextPairDataset.from_webdataset(path, storage_options=storage_options))
        assert isinstance(path, str)
        return cls(path, list_pictures(path, storage_options), None)

    def token(self) -> Any:
        """Return what tells it from others, and from later versions of itself."""
        if self.opened is None:
            return self.folder, [(one.path, one.size, one.version) for one in self.pictures]
        return str(tokenize(self.opened.metadata)), file_identities(self.opened)

    def dataset(self, folder: str, storage_options: Any) -> ImageTextPairDataset:
        """Return it as a dataset; pictures are packed into `folder`."""
        if self.opened is not None:
            return self.opened
        return pack(self.folder, self.pictures, folder, storage_options)
