"""The entries of a blocklist: read from a file or a list, and kept as sorted hashes of fixed width."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from nemo_image import schema
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.shards import files

Hashes = npt.NDArray[np.uint64]
"""XXH3-128 of each entry, (n, 2): the high and the low half."""

BATCH = 2**18
"""Entries that are read at once."""

_BUCKET_BITS = 8
_DIGEST = 16  # bytes at the end of a file of hashes


def hash_texts(texts: Iterable[str]) -> Hashes:
    """Return the hashes of texts."""
    digest = xxhash.xxh3_128_digest
    blob = b"".join(digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.frombuffer(blob, ">u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class HashFile:
    """A file of sorted hashes, 16 bytes each, that all workers of a machine share in memory where it is local.

    Attributes
    ----------
    url : str
    digest : str
        Of its content: lists of the same entries have the same.
    storage_options : dict
        For fsspec.
    """

    url: str
    digest: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Tell which hashes are in the file."""
        table = _loaded(self)
        first = np.searchsorted(table[:, 0], hashes[:, 0])
        found = np.zeros(len(hashes), bool)
        todo = np.arange(len(hashes))
        while len(todo):  # once, but for entries that share the first half of their hash
            todo = todo[first[todo] < len(table)]
            todo = todo[table[first[todo], 0] == hashes[todo, 0]]
            hit = table[first[todo], 1] == hashes[todo, 1]
            found[todo[hit]] = True
            todo = todo[~hit]
            first[todo] += 1
        return found


@functools.lru_cache(maxsize=8)
def _loaded(file: HashFile) -> npt.NDArray[Any]:
    _, path = files.open_fs(file.url, file.storage_options)
    if "://" not in file.url:
        count = (os.path.getsize(path) - _DIGEST) // 16
        return np.memmap(path, "<u8", "r", shape=(count, 2)) if count else np.zeros((0, 2), np.uint64)
    data = files.read_bytes(file.url, file.storage_options)
    return np.frombuffer(data, "<u8", (len(data) - _DIGEST) // 8).reshape(-1, 2)


def write_hashes(url: str, batches: Iterable[Sequence[str]], storage_options: Any) -> HashFile:
    """Write the sorted hashes of texts as a file.

    Memory is 16 bytes an entry, and what sorting a 256th of them takes.
    """
    buckets: list[list[Hashes]] = [[] for _ in range(2**_BUCKET_BITS)]
    for batch in batches:
        hashes = hash_texts(batch)
        hashes = hashes[np.argsort(hashes[:, 0])]
        edges = np.searchsorted(hashes[:, 0] >> np.uint64(64 - _BUCKET_BITS), np.arange(2**_BUCKET_BITS + 1))
        for number, (start, stop) in enumerate(pairwise(edges.tolist())):
            if start < stop:
                buckets[number].append(hashes[start:stop].copy())
    content = hashlib.blake2b(digest_size=_DIGEST)
    with files.atomic_writer(url, storage_options) as out:
        for number, some in enumerate(buckets):
            buckets[number] = []
            if some:
                bucket = _sorted_set(np.concatenate(some)).astype("<u8").tobytes()
                content.update(bucket)
                out.write(bucket)
        out.write(content.digest())
    return HashFile(url, content.hexdigest(), dict(storage_options))


def _sorted_set(hashes: Hashes) -> Hashes:
    hashes = hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]
    is_new = np.ones(len(hashes), bool)
    is_new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
    return hashes[is_new]


def read_digest(url: str, storage_options: Any) -> HashFile | None:
    """Return the file of hashes that is there, or None."""
    if not files.exists(url, storage_options):
        return None
    fs, path = files.open_fs(url, storage_options)
    size = int(fs.info(path)["size"])
    return HashFile(url, fs.cat_file(path, start=size - _DIGEST, end=size).hex(), dict(storage_options))


# --------------------------------------------------------------------------------------------------- files of entries


def read_entries(url: str, column: str, storage_options: Any) -> Iterator[list[str]]:
    """Yield a file's entries as text, some at once: of Parquet, of CSV (or TSV) with a header, or one a line.

    Parameters
    ----------
    url : str
        A name that ends in ``.parquet``, ``.csv`` or ``.tsv`` says so; text may be compressed (``.gz``, ``.xz`` …).
    column : str
        The column to read; where there is only one, its name does not matter.

    Raises
    ------
    ArgumentError
        If there is no such file, or it is not what its name says.
    MissingColumnError
        If it has no such column.
    """
    kind = os.path.basename(url).lower().split(".")
    try:
        if "parquet" in kind[1:]:
            yield from _of_parquet(url, column, storage_options)
            return
        with fsspec.open(url, "rt", encoding="utf-8-sig", compression="infer", **dict(storage_options or {})) as file:
            if "csv" in kind[1:] or "tsv" in kind[1:]:
                yield from _of_csv(file, url, column, "\t" if "tsv" in kind[1:] else ",")
            else:
                yield from _in_batches(line.strip() for line in file)
    except FileNotFoundError as error:
        raise ArgumentError(f"there is no blocklist {url}") from error
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid, EOFError) as error:
        raise ArgumentError(f"the blocklist {url} is not what its name says: {str(error).splitlines()[0]}") from error


def _of_parquet(url: str, column: str, storage_options: Any) -> Iterator[list[str]]:
    fs, path = files.open_fs(url, storage_options)
    with fs.open(path, "rb") as raw, pq.ParquetFile(raw) as file:
        name = _chosen(file.schema_arrow.names, column, url)
        for batch in file.iter_batches(BATCH, columns=[name]):
            yield from _in_batches(as_texts(batch.column(0)))


def _of_csv(file: io.TextIOBase, url: str, column: str, separator: str) -> Iterator[list[str]]:
    rows = csv.DictReader(file, delimiter=separator)
    name = _chosen(list(rows.fieldnames or []), column, url)
    yield from _in_batches(row[name] or "" for row in rows)


def _chosen(names: list[str], column: str, url: str) -> str:
    if column in names:
        return column
    if len(names) == 1:
        return names[0]
    raise MissingColumnError(f"the blocklist {url} has no column {column!r}; it has {', '.join(names) or 'none'}")


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        if text:
            batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def as_texts(values: pa.Array | pa.ChunkedArray) -> list[str]:
    """Return an array's values as text, ``""`` for nulls.

    Raises
    ------
    ArgumentError
        If they are neither text nor integers.
    """
    kind = schema.plain_type(values.type)
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ArgumentError(f"a blocklist holds text or whole numbers, not {kind}")
    return ["" if value is None else value for value in values.cast(kind).cast(pa.string()).to_pylist()]
