"""Workflows over tars: images that are the same file, or look the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import ExactDedup, PerceptualDedup
from nemo_image.dedup.hashes.hash_run import DISTANCE
from nemo_image.engine.ledger import FOLDER as OWN
from nemo_image.errors import ArgumentError
from nemo_image.pipeline.workflows.base import DeduplicationResult, DeduplicationWorkflow, storage_options
from nemo_image.pipeline.workflows.listing import Listing, check_fields


class _HashWorkflow(DeduplicationWorkflow):
    """What the workflows by a hash of the image have in common: they read the tars."""

    extras: Sequence[str] = ()

    def _operator(self) -> ExactDedup | PerceptualDedup:
        raise NotImplementedError

    def run(self, executor: Any = None, checkpoint_path: str | os.PathLike[str] | None = None) -> DeduplicationResult:
        """Run the workflow.

        Hashes and what was found stay in the dataset's ``_nemo_image`` folder, where a rerun takes them over.

        Parameters
        ----------
        executor : DaskExecutor, optional
            Whose cluster does the work; by default the current client, or threads of this process.
        checkpoint_path : None
            There is no other place for what a rerun takes over.

        Raises
        ------
        ArgumentError
            If `checkpoint_path` is given.
        DatasetError
            If a folder holds something else.
        MissingColumnError
            If a column is not there.
        RunError
            If shards could not be read.
        """
        if checkpoint_path is not None:
            raise ArgumentError(
                f"checkpoint_path: what is finished stays in {self.input_paths[0]}/{OWN}, and a rerun takes it over: "
                "leave it out"
            )
        with self.running(executor):
            path = self.input_paths[0] if len(self.input_paths) == 1 else self.input_paths
            options = self.storage_options
            dataset = ImageTextPairDataset.from_webdataset(path, id_col=self.id_field, storage_options=options)
            dataset.require_columns(self.metadata_fields)
            operator = self._operator()
            operator(dataset)
            result = operator.result_
            assert result is not None
            source = dataset.unify_schemas().source if self.metadata_fields else dataset.source
            token = str(tokenize(result.folder.rpartition("/")[2], self.metadata_fields, self.id_field))
            kind = pa.type_for_alias(result.columns[schema.DUPLICATE_OF])
            fields = self.metadata_fields
            listing = Listing(
                result.folder, source, "file", kind, dataset.shards, result.rows, self.extras, fields, token
            )
            return self.list_duplicates(listing, result)


class ExactDeduplicationWorkflow(_HashWorkflow):
    """Finds images that are the same file, byte for byte, in tars, and lists the ids to remove.

    Parameters
    ----------
    input_path : str or list of str
        What :meth:`~nemo_image.datasets.ImageTextPairDataset.from_webdataset` takes: a folder of tars, say.
    output_path : str
        Gets ``duplicates/``: columns ``id``, ``shard``, ``duplicate_of``, ``duplicate_of_shard`` and `metadata_fields`.
    id_field : str, default "key"
        The column of the metadata that names a sample.
    which_to_keep : {"id", "random"} or (str, bool), default "id"
        As for :class:`~nemo_image.dedup.ExactDedup`.
    random_state : int, default 1234
    metadata_fields : list of str, optional
        Columns that are written beside the ids.
    read_kwargs, write_kwargs : dict, optional
        ``{"storage_options": {...}}`` for fsspec; they must not contradict each other.
    clear_output : bool, default True
        Replace the list that such a workflow wrote with other settings; nothing else is ever removed.
    verbose : bool, default True
        Log what was found.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    """

    def __init__(
        self,
        input_path: str | Sequence[str],
        output_path: str | os.PathLike[str],
        id_field: str = "key",
        which_to_keep: str | tuple[str, bool] = "id",
        random_state: int = 1234,
        metadata_fields: Sequence[str] | None = None,
        read_kwargs: Mapping[str, Any] | None = None,
        write_kwargs: Mapping[str, Any] | None = None,
        clear_output: bool = True,
        verbose: bool = True,
    ) -> None:
        options = storage_options(read_kwargs=read_kwargs, write_kwargs=write_kwargs)
        super().__init__(input_path, output_path, id_field, metadata_fields, options, clear_output, verbose)
        self.which_to_keep = which_to_keep
        self.random_state = random_state
        check_fields(self.metadata_fields, self.extras)
        self._operator()

    def _operator(self) -> ExactDedup:
        return ExactDedup(self.which_to_keep, random_state=self.random_state)


class PerceptualDeduplicationWorkflow(_HashWorkflow):
    """Finds images that look the same to a perceptual hash, in tars, and lists the ids to remove.

    Parameters
    ----------
    input_path, output_path, id_field, which_to_keep, random_state, metadata_fields, read_kwargs, write_kwargs, \
clear_output, verbose
        As for :class:`ExactDeduplicationWorkflow`; the list has the column ``hash_distance`` too, in bits.
    hash : {"phash", "dhash", "ahash"}, default "phash"
    max_distance : int, default 4
        Bits, of 64, in which the hashes of copies may differ.
    num_threads : int, default 4
        Decoding threads of a task.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    """

    extras = (DISTANCE,)

    def __init__(
        self,
        input_path: str | Sequence[str],
        output_path: str | os.PathLike[str],
        id_field: str = "key",
        hash: Literal["phash", "dhash", "ahash"] = "phash",
        max_distance: int = 4,
        which_to_keep: str | tuple[str, bool] = "id",
        random_state: int = 1234,
        num_threads: int = 4,
        metadata_fields: Sequence[str] | None = None,
        read_kwargs: Mapping[str, Any] | None = None,
        write_kwargs: Mapping[str, Any] | None = None,
        clear_output: bool = True,
        verbose: bool = True,
    ) -> None:
        options = storage_options(read_kwargs=read_kwargs, write_kwargs=write_kwargs)
        super().__init__(input_path, output_path, id_field, metadata_fields, options, clear_output, verbose)
        self.hash = hash
        self.max_distance = max_distance
        self.which_to_keep = which_to_keep
        self.random_state = random_state
        self.num_threads = num_threads
        check_fields(self.metadata_fields, self.extras)
        self._operator()

    def _operator(self) -> PerceptualDedup:
        return PerceptualDedup(
            self.hash, self.max_distance, self.which_to_keep, None, self.random_state, self.num_threads
        )
