"""Mark the rows that a list of ids, URLs or hashes of images names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash
from dask.base import tokenize

from nemo_image import backend, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError
from nemo_image.filters.entries import (
    HashFile,
    as_texts,
    hash_texts,
    identity,
    path_or_texts,
    read_digest,
    read_entries,
    write_hashes,
)
from nemo_image.filters.image_columns import ImageColumns, Measured, map_with_errors
from nemo_image.shards import files
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader

BLOCKED = "blocked"

ContentHashName = Literal["sha256", "xxh3_128"]

HASHES: dict[str, tuple[Callable[[bytes], str], int]] = {
    "sha256": (lambda data: hashlib.sha256(data).hexdigest(), 64),
    "xxh3_128": (xxhash.xxh3_128_hexdigest, 32),
}
"""What makes each hash, and how many digits it has."""

_SHOWN = 80
_READING = 2  # counts changes to how files are read: hashes of an earlier reading are not used again


class Blocklist:
    """Adds a column that tells which rows a list names: by id, by URL or any other column, or by the image's bytes.

    Adds ``blocked`` (bool): true for rows that the list names, so that ``not blocked`` keeps the others. A row with
    nothing to look up (a null) is not blocked. Values are compared as text, exactly; an integer is its decimal digits.

    Parameters
    ----------
    entries : str, path or iterable of (str or int)
        A file (any fsspec URL): ``.parquet``, ``.csv`` or ``.tsv``, of which the column called as the one compared (or
        as `content_hash`) is read, in Parquet also the only one; the header of CSV and TSV must have it. Any other name
        is text with one entry a line. Or the entries themselves.
    column : str, optional
        The column of the metadata to look up; the dataset's ``id_col`` by default. An id that stands in several
        shards is blocked in all of them.
    content_hash : {"sha256", "xxh3_128"}, optional
        Look up a hash of each image's stored bytes instead, in hexadecimal digits. XXH3-128 is what
        :class:`~nemo_image.dedup.ExactDedup` writes as ``image_hash``; where a column holds hashes, name it in
        `column`: no image is read then.
    blocked_column : str, default "blocked"
        The column to add.
    output_dir : str, optional
        Where the list is put for the workers, as sorted hashes of 16 bytes an entry, which the processes of a machine
        share; by default below the dataset's ``_nemo_image``. They are XXH3-128: with 100 million entries and 5 billion
        rows, the chance that any row is blocked wrongly is 1.5e-21.

    Raises
    ------
    ArgumentError
        If the arguments contradict each other, or `entries` is no path and no list of texts or whole numbers.
    """

    def __init__(
        self,
        entries: str | os.PathLike[str] | Iterable[str | int],
        column: str | None = None,
        *,
        content_hash: ContentHashName | None = None,
        blocked_column: str = BLOCKED,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if content_hash is not None and content_hash not in get_args(ContentHashName):
            raise ArgumentError(f"content_hash must be 'sha256' or 'xxh3_128', not {content_hash!r}")
        if content_hash is not None and column is not None:
            raise ArgumentError("column and content_hash contradict each other: a list is of one or the other")
        self.entries = path_or_texts(entries)
        self.column = column
        self.content_hash = content_hash
        self.blocked_column = blocked_column
        self.output_dir = None if output_dir is None else files.folder(output_dir)

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Read the list now; return the dataset with the column added, lazily.

        Raises
        ------
        MissingColumnError
            If the column is not there, in the dataset or in the list's file.
        ArgumentError
            If the file is missing or unreadable, or an entry is no such hash.
        """
        column = None if self.content_hash is not None else self.column or dataset.id_col
        if column is not None:
            dataset.require_columns([column])
            as_texts(backend.arrow_values(dataset.metadata._meta[column]))
        folder = self.output_dir or files.join(dataset.path, FOLDER, "blocklists")
        hashes = self.write(folder, column or str(self.content_hash), dataset.source.storage_options)
        outputs = {self.blocked_column: schema.arrow_dtype("bool")}
        made_by = {"operator": "Blocklist", "by": column or self.content_hash, "entries": hashes.digest}
        if self.content_hash is not None:
            outputs[schema.IMAGE_ERROR] = schema.arrow_dtype("string")
            looking = BlockedImages(dataset.source, outputs, hashes, self.content_hash, self.blocked_column)
            return map_with_errors(dataset, looking, [], made_by)
        assert column is not None
        return dataset.map_columns(
            BlockedValues(hashes, column, self.blocked_column),
            inputs=[column],
            outputs=outputs,
            fingerprints=dict.fromkeys(outputs, made_by),
        )

    def __repr__(self) -> str:
        what = self.entries if isinstance(self.entries, str) else f"{len(self.entries)} entries"
        return f"Blocklist({what!r}, column={self.column!r}, content_hash={self.content_hash!r})"

    def write(self, folder: str, name: str, storage_options: Mapping[str, Any]) -> HashFile:
        """Write the list as sorted hashes; an earlier call with the same list has done it already.

        Parameters
        ----------
        folder : str
            That all workers see.
        name : str
            The column of the list's file to read, if it has several.
        storage_options : mapping
            Of the folder.

        Raises
        ------
        MissingColumnError
            If the list's file lacks the column.
        ArgumentError
            If the file is missing or unreadable, or an entry is no such hash.
        """
        listed = self.entries if isinstance(self.entries, list) else [self.entries, identity(self.entries)]
        url = files.absolute(files.join(folder, f"{tokenize(_READING, listed, name, self.content_hash)[:16]}.hashes"))
        with run_lock(folder, "blocklist", dict(storage_options)):
            there = read_digest(url, storage_options)
            return there or write_hashes(url, self._texts(name), storage_options)

    def _texts(self, name: str) -> Iterator[Sequence[str]]:
        batches: Iterable[list[str]]
        if isinstance(self.entries, str):
            batches = read_entries(self.entries, name, None)
        else:
            batches = [self.entries]
        for batch in batches:
            yield batch if self.content_hash is None else _hex(batch, self.content_hash)


def _hex(texts: Sequence[str], name: ContentHashName) -> list[str]:
    length = HASHES[name][1]
    wrong = next((text for text in texts if not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", text)), None)
    if wrong is not None:
        raise ArgumentError(
            f"content_hash={name!r}: the entry {wrong[:_SHOWN]!r} is no hash of {length} hexadecimal digits"
        )
    return [text.lower() for text in texts]


class BlockedValues:
    """Looks up a column's values."""

    row_by_row = True

    def __init__(self, hashes: HashFile, column: str, output: str) -> None:
        self.hashes = hashes
        self.column = column
        self.output = output

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return whether each row is blocked."""
        texts = as_texts(backend.arrow_values(frame[self.column]))
        found = self.hashes.contains(hash_texts(texts))
        found &= np.fromiter(map(bool, texts), bool, len(texts))
        return pd.DataFrame({self.output: pd.Series(pd.arrays.ArrowExtensionArray(pa.array(found)), frame.index)})

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("BlockedValues", self.hashes.url, self.hashes.digest, self.column, self.output)


class BlockedImages(ImageColumns):
    """Looks up hashes of images' stored bytes."""

    def __init__(
        self, source: DatasetSource, outputs: Mapping[str, Any], hashes: HashFile, name: ContentHashName, output: str
    ) -> None:
        super().__init__(source, outputs)
        self.names = (output,)
        self.hashes = hashes
        self.name = name

    def measure(self, reader: ShardReader, members: Sequence[Member]) -> Measured:
        """Yield whether each image is blocked."""
        digest = HASHES[self.name][0]
        texts = [digest(blob) for blob in reader.read_many(members)]
        for found in self.hashes.contains(hash_texts(texts)).tolist():
            yield (found,)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (*super().__dask_tokenize__(), self.hashes.url, self.hashes.digest, self.name)
