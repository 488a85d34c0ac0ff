"""The dataset: a lazy frame of metadata, and where its samples lie."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from nemo_image import backend, schema
from nemo_image.datasets import columns as columns_
from nemo_image.datasets import export, footers, opening, partitions, save, search
from nemo_image.datasets.discover import discover
from nemo_image.datasets.lineage import Lineage
from nemo_image.datasets.quarantine import read_quarantine
from nemo_image.datasets.schemas import unify_schemas, with_source
from nemo_image.datasets.show import Showing
from nemo_image.datasets.source import DatasetSource, OnMismatch
from nemo_image.datasets.state import DatasetState
from nemo_image.engine.device import new_frames
from nemo_image.errors import ArgumentError, MissingColumnError, NemoImageError, ShardError
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

SHOWN_SHARDS = 3
COUNTED_SHARDS = 100
"""A `repr` reads the footers of so many shards at most."""


class ImageTextPairDataset(Showing):
    """Image-text pairs in WebDataset tars, with a lazy Dask frame of metadata.

    Users read and assign :attr:`metadata` freely. Each row says its shard and its id, so filters, joins and
    repartitions keep every row with its own image.

    Parameters
    ----------
    path : str
        The folder (or fsspec URL) of the dataset.
    metadata : dask.dataframe.DataFrame
        One row a pair, with the columns ``shard`` and `id_col`. A frame without ``shard`` must have one partition a
        tar file, in their order.
    tar_files : sequence of str
        The shards' tars.
    id_col : str
        The column that names a row's sample: by its key, or by the same field of its JSON.

    Attributes
    ----------
    run_totals : dict or None
        The sums of the ledger of the run that wrote this dataset; None for one that was opened.

    Raises
    ------
    ArgumentError
        If `tar_files` is empty, or `metadata` has neither ``shard`` nor one partition a tar file.
    MissingColumnError
        If `metadata` lacks `id_col`.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Any, tar_files: Sequence[str], id_col: str) -> None:
        found = discover(list(tar_files))
        if id_col not in metadata.columns:
            raise MissingColumnError(
                f"metadata has no column {id_col!r} (id_col); it has {', '.join(metadata.columns)}"
            )
        if schema.SHARD not in metadata.columns:
            metadata = opening.name_shards(metadata, list(tar_files), found.root)
        source = DatasetSource(
            tar_root=found.root,
            metadata_root=files.folder(path),
            id_col=id_col,
            schema=opening.schema_of_frame(metadata),
            frames="cudf" if backend.is_cudf(metadata._meta) else "pandas",
        )
        # The frame is the user's own: what the files hold, if there are any, says nothing of it.
        self._set_up(DatasetState(source, found.shards, metadata, Lineage(metadata.expr._name, touched=True)))

    @classmethod
    def from_webdataset(
        cls,
        path: str | os.PathLike[str] | Sequence[str],
        id_col: str = "key",
        sidecars: Sequence[str] = (),
        on_mismatch: OnMismatch = "null",
        storage_options: Mapping[str, Any] | None = None,
    ) -> ImageTextPairDataset:
        """Open a WebDataset with Parquet metadata. Only names are listed and one schema is read.

        Parameters
        ----------
        path : str, path or sequence of str
            A folder, a glob, a brace pattern (``{00000..00099}.tar``) or a list of tars; local or any fsspec URL. A
            dataset in which no tar has a Parquet file gets its metadata from the tars' JSON and captions.
        id_col : str, default "key"
            The column that names a row's sample.
        sidecars : sequence of str
            Folders of Parquet files with further columns, one file a shard, joined lazily by (shard, id).
        on_mismatch : {"null", "drop", "raise"}
            What happens to rows without a sample: null results and a reason in ``image_error``; left out, and counted
            in the ledger; or a failed shard.
        storage_options : dict, optional
            Passed to fsspec.

        Raises
        ------
        ArgumentError
            If an argument is unusable.
        DatasetError
            If there is no such folder, no tar, a tar or Parquet file without its partner, or no column `id_col`.
        """
        opened = opening.open_webdataset(path, id_col, sidecars, on_mismatch, storage_options)
        return cls._of(DatasetState.of(opened.held_in(new_frames())))

    @classmethod
    def _of(cls, state: DatasetState, run_totals: dict[str, Any] | None = None) -> ImageTextPairDataset:
        dataset = cls.__new__(cls)
        dataset._set_up(state, run_totals)
        return dataset

    def reopened(
        self, path: str | os.PathLike[str] | None = None, sidecars: Sequence[str] = ()
    ) -> ImageTextPairDataset:
        """Return the dataset as its files are now: its own shards, with no assigned column and no filter.

        Parameters
        ----------
        path : str or path, optional
            A folder that :meth:`save_metadata` has saved it to; by default where its metadata lie.
        sidecars : sequence of str
            Further folders of Parquet files, as for :meth:`from_webdataset`.
        """
        target = _target(path)
        target = None if target == self._source.metadata_root else target
        return type(self)._of(DatasetState.of(opening.reopen(self._source, self._shards, target, sidecars)))

    def _set_up(self, state: DatasetState, run_totals: dict[str, Any] | None = None) -> None:
        self._source = state.source
        self._shards = list(state.shards)
        self._metadata = state.frame
        self._counting_frame = state.frame
        self._lineage = state.lineage
        self.run_totals = run_totals

    # What a user looks at and assigns -------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The folder (or URL) of the dataset's metadata."""
        return self._source.metadata_root

    @property
    def id_col(self) -> str:
        """The column that names a row's sample."""
        return self._source.id_col

    @property
    def tar_files(self) -> list[str]:
        """The shards' tars."""
        return [self._source.tar_url(shard) for shard in self._shards]

    @property
    def shards(self) -> list[str]:
        """The shards' names: their tars' paths below the dataset's, without ``.tar``."""
        return list(self._shards)

    @property
    def source(self) -> DatasetSource:
        """Where the dataset's files lie."""
        return self._source

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """The fingerprint of each column that nemo_image added: what made it."""
        return {name: dict(made) for name, made in self.lineage.provenance.items()}

    @property
    def state(self) -> DatasetState:
        """The dataset's parts at this moment."""
        return DatasetState(self._source, self._shards, self._metadata, self.lineage)

    @property
    def lineage(self) -> Lineage:
        """What operators made, what is still to compute, and whether the user has changed the frame."""
        return self._lineage.seen(self._metadata)

    @property
    def metadata(self) -> Any:
        """The lazy Dask frame: one row a pair, one partition a shard at load; of cuDF on GPUs, else of pandas.

        A frame may be assigned. Without the column ``shard``, it must have one partition a tar file, in their order.
        """
        return self._metadata

    @metadata.setter
    def metadata(self, frame: Any) -> None:
        if not hasattr(frame, "map_partitions") or not hasattr(frame, "columns"):
            raise ArgumentError(
                f"metadata must be a Dask frame, not {type(frame).__name__}: see dask.dataframe.from_pandas"
            )
        missing = [name for name in (schema.SHARD, self.id_col) if name not in frame.columns]
        if missing == [schema.SHARD] and frame.npartitions == len(self._shards):
            tars = [self._source.tar_url(shard) for shard in self._shards]
            frame = opening.name_shards(frame, tars, self._source.tar_root)
        elif missing:
            raise MissingColumnError(
                f"the assigned metadata lacks {', '.join(map(repr, missing))}: each row must say its shard and its id "
                f"(without 'shard', a frame of one partition a tar file is taken: of {len(self._shards)}, not "
                f"{frame.npartitions})"
            )
        self._lineage = self._lineage.seen(frame)
        self._metadata = self._counting_frame = frame

    def __len__(self) -> int:
        """Count the rows, from the files' footers where no filter was assigned."""
        if not self.lineage.touched and self._source.on_mismatch != "drop" and not self._source.built_from_tars:
            return footers.count_rows(self._source, self._shards)
        return partitions.count_rows(self._counting_frame)

    def head(self, n: int = 5, npartitions: int = 1) -> pd.DataFrame:
        """Compute the first `n` rows (of the first `npartitions` partitions; -1 means all), as a frame of pandas."""
        return backend.to_pandas(self._metadata.head(n, npartitions=npartitions))

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        embedder: Any = None,
        embedding_column: str = schema.IMAGE_EMBEDDING,
        columns: Sequence[str] | None = None,
    ) -> search.SearchResult:
        """Find the `k` rows whose saved embeddings are most like a text, a picture or a vector, exactly.

        Parameters
        ----------
        query : str, path, bytes, picture, vector, matrix, or list of one of them
            A text; a picture as ``pathlib.Path``, bytes or ``PIL.Image.Image`` (or a string that names a picture
            file); numbers of any norm but zero. A list or matrix is several queries.
        k : int, default 10
            Rows for each query; all, if there are fewer.
        embedder : object, optional
            What made the embeddings, with ``embed_text`` for texts and ``embed_pictures`` for pictures.
        embedding_column : str, default "image_embedding"
            The saved embeddings to search. Rows with none, or with a vector that is zero or not finite, are skipped.
        columns : sequence of str, optional
            Columns of the metadata to give beside similarity, shard and id; by default all that are computed already
            and hold no embeddings.

        Raises
        ------
        ArgumentError
            If the query or `k` is unusable, or the embedder is missing or cannot embed the query.
        MissingColumnError
            If there are no saved embeddings, or no such column.
        EmbeddingError
            If the embeddings come from another model than `embedder`, or have another size than the query.
        RunError
            If shards could not be read.
        """
        return search.search(self.state, query, k, embedder, embedding_column, columns)

    def __repr__(self) -> str:
        shards = ", ".join(self._shards[:SHOWN_SHARDS]) + (", …" if len(self._shards) > SHOWN_SHARDS else "")
        rows = self._rows_said()
        pending = f"\n  to compute: {', '.join(self.lineage.pending)}" if self.lineage.pending else ""
        return (
            f"<ImageTextPairDataset {self.path}\n"
            f"  {len(self._shards)} shards ({shards}), {self._metadata.npartitions} partitions, {rows}\n"
            f"  id_col: {self.id_col}\n"
            f"  columns: {', '.join(self._metadata.columns)}{pending}>"
        )

    def _rows_said(self) -> str:
        if self.lineage.touched or self._source.built_from_tars or len(self._shards) > COUNTED_SHARDS:
            return "rows not counted"
        try:
            return f"{len(self):,} rows"
        except ShardError:
            return "rows unknown (a Parquet file is unreadable)"

    # What operators use ---------------------------------------------------------------------------------------------

    def map_columns(
        self,
        function: Callable[[pd.DataFrame], pd.DataFrame],
        *,
        inputs: Sequence[str] = (),
        outputs: Mapping[str, Any],
        fingerprints: Mapping[str, Mapping[str, Any]],
        reads_images: bool = False,
    ) -> ImageTextPairDataset:
        """Add an operator's columns, lazily, computing only the rows that are not computed yet.

        Parameters
        ----------
        function : callable
            Takes a frame with ``shard``, the id and `inputs` (its index counts from 0), and returns one with `outputs`
            on the same index. Runs on the workers; tokenizable by Dask.
        inputs : sequence of str
            The columns that `function` reads; no others are.
        outputs : dict of str to dtype
            The columns that it makes. A row counts as computed once the first of them, or ``image_error``, is not null.
        fingerprints : dict of str to dict
            What makes each column: values for JSON. Earlier values with the same fingerprint are taken as they are.
        reads_images : bool
            Whether `function` reads the tars, so that the ledger should account for their samples.

        Returns
        -------
        ImageTextPairDataset
            The same rows with the columns added.
        """
        wanted = columns_.required_inputs(self._source, inputs)
        joins_errors = schema.IMAGE_ERROR in outputs and schema.IMAGE_ERROR in self.lineage.pending
        if joins_errors:
            wanted = list(dict.fromkeys([*wanted, schema.IMAGE_ERROR]))
        self.require_columns(wanted)
        plain = {name: dict(fingerprint) for name, fingerprint in fingerprints.items()}
        work = columns_.ColumnFunction(function, self._source, outputs, plain, joins_errors)
        meta = backend.like(schema.empty_frame(outputs.items()), self._metadata._meta)
        made = self._metadata[wanted].map_partitions(work, meta=meta)
        frame = self._metadata.assign(**{name: made[name] for name in outputs})
        result = self._copy()
        result._metadata = frame
        result._lineage = self.lineage.extended(frame, outputs, plain, reads_images)
        return result

    def with_user_columns(self, columns: Mapping[str, Any]) -> ImageTextPairDataset:
        """Return the dataset with columns of the caller's own, as if assigned to :attr:`metadata`."""
        result = self._copy()
        result._metadata = self._metadata.assign(**columns)
        return result

    def require_columns(self, names: Sequence[str]) -> None:
        """Raise if the metadata lacks a column.

        Raises
        ------
        MissingColumnError
            Naming it, and the columns that are there; or saying that it is in other shards than the first.
        """
        try:
            self.state.require_columns(names)
        except MissingColumnError as error:
            there: Collection[str] = ()
            with contextlib.suppress(NemoImageError):
                there = unify_schemas(self.state)[0].frame.columns  # of all shards; opening reads the first one's
            if all(name in there for name in names):
                raise MissingColumnError(
                    f"{error}. Other shards have it: dataset.unify_schemas() adds it, null in those that lack it"
                ) from None
            raise

    def _copy(self) -> ImageTextPairDataset:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    # What writes ----------------------------------------------------------------------------------------------------

    def save_metadata(
        self,
        path: str | os.PathLike[str] | None = None,
        columns: Sequence[str] | None = None,
        resume: bool = True,
        max_failure_ratio: float = save.DEFAULT_FAILURE_RATIO,
        *,
        part: tuple[int, int] | None = None,
        retry_failed: bool = False,
        quarantine_bytes: bool = False,
    ) -> ImageTextPairDataset:
        """Compute the metadata and write one Parquet file a shard, each atomically.

        Parameters
        ----------
        path : str or path, optional
            The folder to write. By default the dataset's own files are enriched in place: rows and columns that were
            there stay, and rows that the frame no longer has get nulls in the new columns. With a `path`, exactly the
            frame's rows are written.
        columns : sequence of str, optional
            With a `path`: the columns to write besides ``shard`` and the id; all by default.
        resume : bool, default True
            Compute only what is not computed yet, was made by something else, or from another source.
        max_failure_ratio : float, default 0.05
            The run stops early once more than this share of the shards has failed (one failed shard is always borne,
            unless it is 0).
        part : tuple of int, optional
            ``(i, n)``: do the i-th of n shares of the shards, from 1 on. The n parts may run at the same time on
            machines that know nothing of each other, and together equal one run.
        retry_failed : bool, default False
            Compute only what failed before: failed shards, and images in the quarantine.
        quarantine_bytes : bool, default False
            Keep the bytes of bad images in the quarantine too (see :meth:`quarantine`).

        Returns
        -------
        ImageTextPairDataset
            The saved dataset, re-read; with `part`, only that part's shards.

        Raises
        ------
        ArgumentError
            If `columns` is given without a `path`, or an argument is out of range.
        MissingColumnError
            If a column of `columns` is not there.
        RunError
            After the other shards are finished, if some failed: lists them with their causes.
        TooManyFailuresError
            If the run was stopped early.
        OutputBusyError
            If another run is writing to the same folder.
        """
        options = save.SaveOptions(resume, max_failure_ratio, part, retry_failed, quarantine_bytes)
        return type(self)._of(*save.save(self.state, _target(path), columns, options))

    def pending_shards(
        self, path: str | os.PathLike[str] | None = None, columns: Sequence[str] | None = None
    ) -> list[str]:
        """Return the shards that :meth:`save_metadata` with the same arguments would still have to compute.

        Parameters
        ----------
        path, columns
            As for :meth:`save_metadata`.
        """
        return save.pending_shards(self.state, _target(path), columns)

    def quarantine(self) -> pd.DataFrame:
        """Return the images that could not be decoded when this dataset was saved.

        Returns
        -------
        DataFrame
            One row an image: ``shard``, the id, ``image_error``, and where the image lies: its ``member`` of the tar,
            ``offset`` and ``size`` in bytes; ``image_bytes`` too if they were kept. Rows without a sample are not among
            them.
        """
        return read_quarantine(self._source, self._shards)

    def to_webdataset(
        self,
        path: str | os.PathLike[str],
        filter_column: str,
        samples_per_shard: int = 10000,
        max_shards: int = 5,
        old_id_col: str | None = None,
        keep_ids: bool = False,
        shuffle_seed: int | None = None,
        *,
        replace: bool = False,
    ) -> ImageTextPairDataset:
        """Write the rows where `filter_column` is true as a new dataset of full shards.

        Parameters
        ----------
        path : str or path
            A folder that holds no other dataset.
        filter_column : str
            A boolean column; null counts as false.
        samples_per_shard : int, default 10000
            Samples of each output shard; only the last has fewer.
        max_shards : int, default 5
            Digits of the shard number in names and ids: 5 digits are room for 100,000 shards.
        old_id_col : str, optional
            A column (and JSON field) that keeps the old id.
        keep_ids : bool, default False
            Keep the samples' keys and ids as they are.
        shuffle_seed : int, optional
            Shuffle by this seed; by default the samples are in the order of (shard, offset in the tar). The source
            shards, in an order drawn from the seed, are cut into groups of at most 16 (more where an output shard needs
            more), whose samples are permuted uniformly: a uniform permutation of all, up to 16 shards. Each output
            shard reads the shards of one or two groups.
        replace : bool, default False
            Remove the shards of an earlier export, of other rows or settings, from `path` first.

        Returns
        -------
        ImageTextPairDataset
            The new dataset.

        Raises
        ------
        ArgumentError
            If too few digits are given for the shards, `filter_column` is not boolean, or an argument is out of range.
        DatasetError
            If `path` holds another dataset, or no row passes.
        RunError
            If shards failed.
        OutputBusyError
            If another run is writing to `path`.
        """
        target = _target(path)
        assert target is not None
        how = export.ExportOptions(
            filter_column, samples_per_shard, max_shards, old_id_col, keep_ids, shuffle_seed, replace
        )
        totals = export.export(self.state, target, how)
        options = dict(self._source.storage_options) or None
        exported = type(self).from_webdataset(target, id_col=self.id_col, storage_options=options)
        exported.run_totals = totals
        return exported

    def unify_schemas(self) -> ImageTextPairDataset:
        """Return the dataset with column types that hold the values of all shards.

        Opening a dataset reads one shard's types. Saves and exports do this by themselves; call it before other
        computations where shards differ. Reads every shard's footer (the tars of shards without Parquet), and logs what
        differs.
        """
        state, notes = unify_schemas(self.state, read_tars=True)
        for note in notes:
            logger.warning("%s: %s", self.path, note)
        result = self._copy()
        result._counting_frame = with_source(self._counting_frame, self._source, state.source)
        result._source, result._metadata, result._lineage = state.source, state.frame, state.lineage
        return result

    def materialize(self, always: bool = False) -> ImageTextPairDataset:
        """Compute what is pending once, resumably, in the dataset's ``_nemo_image/`` folder.

        Operators that need several passes call this, so that nothing is embedded twice.

        Parameters
        ----------
        always : bool, default False
            Write the rows to files even if no column is pending.

        Returns
        -------
        ImageTextPairDataset
            The same rows, read from the files; itself if there is nothing pending.
        """
        state, totals = save.materialize(self.state, always)
        return self if totals is None else type(self)._of(state, totals)


def _target(path: str | os.PathLike[str] | None) -> str | None:
    if path is not None and not os.fspath(path):
        raise ArgumentError("path is empty: give a folder")
    return None if path is None else files.folder(path)
