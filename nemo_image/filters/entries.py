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
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from nemo_image import schema
from nemo_image.errors import ArgumentError, MissingColumnError, NemoImageError, one_line
from nemo_image.shards import files

Hashes = npt.NDArray[np.uint64]
"""XXH3-128 of each entry, (n, 2): the high and the low half."""

BATCH = 2**18
"""Entries that are read at once."""

_BUCKET_BITS = 8
_SHOWN = 80
_MESSAGE = 200  # characters of another library's message
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


def path_or_texts(entries: str | os.PathLike[str] | Iterable[str | int]) -> str | list[str]:
    """Return the path of a blocklist's file, or the entries themselves as text.

    Raises
    ------
    ArgumentError
        If it is an empty path, no list, or an entry is neither text nor a whole number.
    """
    if isinstance(entries, str | os.PathLike):
        path = os.fspath(entries)
        if not isinstance(path, str) or not path.strip():
            raise ArgumentError(f"the blocklist's path is {path!r}: give a file, or a list of texts or whole numbers")
        return path
    if isinstance(entries, bytes | bytearray | memoryview | pd.DataFrame) or not isinstance(entries, Iterable):
        raise ArgumentError(
            f"a blocklist is a file's path, or a list of texts or whole numbers, not {type(entries).__name__}"
        )
    return [_entry(one, place) for place, one in enumerate(entries)]


def _entry(one: object, place: int) -> str:
    if isinstance(one, str):
        return str(one)
    if not isinstance(one, bool) and isinstance(one, int | np.integer):
        return str(int(one))
    raise ArgumentError(
        f"the blocklist's entry {place} (counted from 0) is {type(one).__name__} {repr(one)[:_SHOWN]}: entries are "
        "texts or whole numbers; convert it or leave it out"
    )


def read_entries(url: str, column: str, storage_options: Any) -> Iterator[list[str]]:
    """Yield a file's entries as text, some at once: of Parquet, of CSV (or TSV) with a header, or one a line.

    Parameters
    ----------
    url : str
        A name that ends in ``.parquet``, ``.csv`` or ``.tsv`` says so; text may be compressed (``.gz``, ``.xz`` …).
    column : str
        The column to read. In Parquet its name does not matter where there is only one; the header of CSV must have it,
        as a list without a header would lose its first entry.

    Raises
    ------
    ArgumentError
        If there is no such file, it cannot be read, or it is not what its name says.
    MissingColumnError
        If it has no such column.
    """
    kind = os.path.basename(url).lower().split(".")
    try:
        if "parquet" in kind[1:]:
            yield from _of_parquet(url, column, storage_options)
            return
        is_table = "csv" in kind[1:] or "tsv" in kind[1:]
        settings = {"compression": "infer", "newline": "" if is_table else None, **dict(storage_options or {})}
        with fsspec.open(url, "rt", encoding="utf-8-sig", **settings) as file:
            if is_table:
                yield from _of_csv(file, url, column, "\t" if "tsv" in kind[1:] else ",")
            else:
                yield from _in_batches(line.strip() for line in file)
    except (NemoImageError, MemoryError):
        raise
    except Exception as error:  # each way to compress has errors of its own
        raise _unreadable(url, error) from error


def identity(url: str) -> dict[str, Any]:
    """Return what tells a blocklist's file from others, and from itself after a change.

    Raises
    ------
    ArgumentError
        If there is no such file.
    """
    try:
        fs, path = files.open_fs(url)
        if fs.isdir(path):
            raise ArgumentError(f"the blocklist {url} is a folder: name the file in it")
        return dict(files.identify(url).to_dict())
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> ArgumentError:
    if isinstance(error, ArgumentError):
        return error
    if isinstance(error, FileNotFoundError):
        return ArgumentError(f"there is no blocklist {url}")
    if isinstance(error, OSError) and error.errno is not None:
        return ArgumentError(f"cannot read the blocklist {url}: {error.strerror or one_line(error)}")
    return ArgumentError(
        f"the blocklist {url} is not what its name says ({one_line(error)[:_MESSAGE]}): the ending must tell the kind "
        "(.parquet, .csv, .tsv, else one entry a line) and how it is compressed (.gz, .bz2, .xz, .zip)"
    )


def _of_parquet(url: str, column: str, storage_options: Any) -> Iterator[list[str]]:
    fs, path = files.open_fs(url, storage_options)
    with fs.open(path, "rb") as raw, pq.ParquetFile(raw) as file:
        name = _chosen(file.schema_arrow.names, column, url)
        for batch in file.iter_batches(BATCH, columns=[name]):
            try:
                texts = as_texts(batch.column(0))
            except ArgumentError as error:
                raise ArgumentError(f"the blocklist {url}, column {name!r}: {error}") from error
            yield from _in_batches(texts)


def _of_csv(file: io.TextIOBase, url: str, column: str, separator: str) -> Iterator[list[str]]:
    rows = _rows(csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True), url)
    names = next(rows, (1, []))[1]
    times = names.count(column)
    if times != 1:
        has = f"the column {column!r} {times} times" if times else f"no column {column!r}"
        first = separator.join(names)[:_SHOWN]
        raise MissingColumnError(
            f"the header of the blocklist {url} has {has}; its first line is {first!r}. Give it a header line with "
            f"{column!r} and {separator!r} between columns; a list without a header is a .txt with one entry a line"
        )
    yield from _in_batches(_cells(rows, names.index(column), len(names), url))


def _rows(reader: Any, url: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row's first line and its cells, without white space around them; no empty rows."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ArgumentError(
                f"the blocklist {url}, line {line}: {error}; look for a quote that is not closed"
            ) from error
        if row is None:
            return
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield line, cells


def _cells(rows: Iterable[tuple[int, list[str]]], place: int, count: int, url: str) -> Iterator[str]:
    for line, cells in rows:
        if len(cells) != count:
            raise ArgumentError(
                f"the blocklist {url}, line {line}: {len(cells)} cells under a header of {count}; put cells that hold "
                "the separator in quotes"
            )
        yield cells[place]


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
