"""Centroids on disk: written once, read once in each worker process."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from nemo_image.datasets.recent import Recent
from nemo_image.errors import ArgumentError
from nemo_image.shards import files

CENTROIDS = "kmeans_centroids.npy"
"""float32, shape (clusters, size): the means of unit vectors, not scaled themselves."""

Matrix = npt.NDArray[np.float32]

_recent: Recent[Matrix] = Recent(lambda matrix: matrix.nbytes, 2**28)


@dataclass(frozen=True)
class Centroids:
    """The centroids of a clustering.

    Attributes
    ----------
    url : str
    digest : str
        XXH3-128 of the file.
    shape : tuple of int
        Clusters, and numbers of each.
    """

    url: str
    digest: str
    shape: tuple[int, int]
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, url: str, storage_options: Mapping[str, Any]) -> Centroids:
        """Look at a file.

        Raises
        ------
        ArgumentError
            If it is missing or holds no centroids.
        """
        matrix, digest = _read(url, storage_options)
        return cls(url, digest, (len(matrix), matrix.shape[1]), storage_options)

    def load(self) -> Matrix:
        """Return the centroids; one copy a process."""
        return _recent.get((self.url, self.digest), lambda: _read(self.url, self.storage_options)[0])


def write_centroids(url: str, matrix: Any, storage_options: Any) -> None:
    """Write centroids, atomically."""
    with files.atomic_writer(url, storage_options) as out:
        np.lib.format.write_array(out, np.ascontiguousarray(matrix, np.float32), allow_pickle=False)


def checked(matrix: Any, where: str) -> Matrix:
    """Return centroids as float32.

    Raises
    ------
    ArgumentError
        If they are none.
    """
    made = np.asarray(matrix)
    if made.ndim != 2 or not made.size or made.dtype.kind not in "fiu" or not np.isfinite(made).all():
        raise ArgumentError(
            f"{where} must be a matrix of finite numbers, one row a cluster, not an array of {made.dtype} of shape "
            f"{made.shape}"
        )
    return made.astype(np.float32)


def _read(url: str, storage_options: Any) -> tuple[Matrix, str]:
    try:
        data = files.read_bytes(url, storage_options)
        matrix = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except FileNotFoundError as error:
        raise ArgumentError(f"centroids: no file {os.fspath(url)}") from error
    except (ValueError, EOFError) as error:
        raise ArgumentError(f"centroids: {os.fspath(url)} is no .npy file of numbers ({error})") from error
    return checked(matrix, f"centroids: {os.fspath(url)}"), xxhash.xxh3_128_hexdigest(data)
