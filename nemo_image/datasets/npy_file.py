"""Embeddings in a ``.npy`` file: its header, and some of its rows, on any file system."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from nemo_image.errors import EmbeddingError
from nemo_image.shards import files
from nemo_image.shards.sources import open_file, open_source


class Header(NamedTuple):
    """What the header of a ``.npy`` file says, and where (in bytes) its numbers begin."""

    rows: int
    size: int
    dtype: str
    fortran_order: bool
    offset: int


def read_header(url: str, storage_options: Mapping[str, Any]) -> Header:
    """Read the header of a ``.npy`` file of embeddings.

    Raises
    ------
    EmbeddingError
        If it is not one, or is cut short.
    """
    parsers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with open_file(url, storage_options) as file:
        try:
            shape, fortran_order, dtype = parsers[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError, EOFError) as error:
            raise EmbeddingError(f"{url} is no .npy file ({' '.join(str(error).split())}): write it anew") from error
        offset = file.tell()
        there = file.seek(0, os.SEEK_END) - offset
    if dtype.kind != "f" or len(shape) != 2 or not shape[1]:
        raise EmbeddingError(f"{url} holds {dtype} of shape {shape}, not a row of floats for each image")
    if there < shape[0] * shape[1] * dtype.itemsize:
        raise EmbeddingError(
            f"{url} is cut short: {there} bytes of numbers, {shape} of {dtype} are more: write it anew"
        )
    return Header(shape[0], shape[1], dtype.str if dtype.byteorder == ">" else dtype.name, fortran_order, offset)


def read_rows(url: str, rows: npt.NDArray[np.int64], storage_options: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Read rows of a ``.npy`` file of embeddings, and as little else as its place allows.

    Returns
    -------
    ndarray of float, shape (len(rows), size)
    """
    fs, path = files.open_fs(url, storage_options)
    if isinstance(fs, LocalFileSystem):
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)[rows])
    header = read_header(url, storage_options)
    if header.fortran_order:
        return np.asarray(np.load(io.BytesIO(files.read_bytes(url, storage_options)), allow_pickle=False)[rows])
    unique, place = np.unique(rows, return_inverse=True)
    runs = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
    width = header.size * np.dtype(header.dtype).itemsize
    with open_source(url, storage_options) as source:
        bounds = [(header.offset + int(run[0]) * width, header.offset + int(run[-1] + 1) * width) for run in runs]
        parts = source.read_ranges(bounds)
    return np.frombuffer(b"".join(parts), header.dtype).reshape(-1, header.size)[place]
