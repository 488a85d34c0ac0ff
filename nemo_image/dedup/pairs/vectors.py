"""The vectors of one cluster, in memory or in a file on this machine, read a few rows at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nemo_image.errors import DatasetError

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

# Rows that lie no further apart (in bytes) are read at once, with what lies between them: a system call costs as much.
_GAP = 16 * 1024
# The most bytes read at once beside the rows wanted.
_PIECE = 2**20


class Vectors(Protocol):
    """Rows of finite, non-zero vectors, as they were computed: not normalised."""

    @property
    def count(self) -> int:
        """The number of rows."""

    @property
    def size(self) -> int:
        """The length of each vector, in numbers."""

    def rows(self, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` (not included), shape (stop - start, size); possibly a view."""

    def take(self, indices: Indices) -> Floats:
        """Return the rows at `indices`, which ascend without repetition, shape (len(indices), size)."""


class MemoryVectors:
    """The rows of a matrix.

    Parameters
    ----------
    matrix : ndarray of float32, shape (count, size)
        It is not copied, nor written to.
    """

    def __init__(self, matrix: Floats) -> None:
        self._matrix = matrix
        self.count, self.size = matrix.shape

    def rows(self, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` (not included), as a view."""
        return self._matrix[start:stop]

    def take(self, indices: Indices) -> Floats:
        """Return the rows at `indices`: a view where they are neighbours."""
        if _adjacent(indices):
            return self._matrix[int(indices[0]) : int(indices[-1]) + 1] if len(indices) else self._matrix[:0]
        return np.take(self._matrix, indices, axis=0)


@dataclass(frozen=True)
class DiskVectors:
    """Rows of a raw file of little-endian float32 numbers, one vector after the other.

    They are read, not mapped: mapped pages would count as this process's memory. The file is opened by each call, so
    that the object can go to another process.

    Parameters
    ----------
    path : str or path
        A file on this machine.
    first_row : int
        The row of the file that is row 0 here.
    count : int
        The number of rows.
    size : int
        The length of each vector, in numbers.
    """

    path: str | os.PathLike[str]
    first_row: int
    count: int
    size: int

    def rows(self, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` (not included).

        Raises
        ------
        DatasetError
            If the file ends before.
        """
        out = np.empty((stop - start, self.size), "<f4")
        file = os.open(self.path, os.O_RDONLY)
        try:
            self._read(file, start, out)
        finally:
            os.close(file)
        return out

    def take(self, indices: Indices) -> Floats:
        """Return the rows at `indices`, which ascend; neighbours are read at once.

        Raises
        ------
        DatasetError
            If the file ends before.
        """
        out = np.empty((len(indices), self.size), "<f4")
        file = os.open(self.path, os.O_RDONLY)
        try:
            for start, stop in self._stretches(indices):
                wanted = indices[start:stop]
                if _adjacent(wanted):
                    self._read(file, int(wanted[0]), out[start:stop])
                else:
                    between = np.empty((int(wanted[-1] - wanted[0]) + 1, self.size), "<f4")
                    self._read(file, int(wanted[0]), between)
                    np.take(between, wanted - wanted[0], axis=0, out=out[start:stop])
        finally:
            os.close(file)
        return out

    def _stretches(self, indices: Indices) -> list[tuple[int, int]]:
        """Cut `indices` into parts to be read at once: all neighbours, or near each other and not too long."""
        width = self.size * 4
        cuts = np.flatnonzero(np.diff(indices) > 1 + _GAP // width) + 1
        bounds = np.concatenate([[0], cuts, [len(indices)]])
        stretches: list[tuple[int, int]] = []
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            first = start
            while first < stop:
                last = stop
                if not _adjacent(indices[first:stop]):
                    end = indices[first] + max(1, _PIECE // width)
                    last = first + int(np.searchsorted(indices[first:stop], end))
                stretches.append((first, last))
                first = last
        return stretches

    def _read(self, file: int, row: int, out: Floats) -> None:
        """Fill `out` with rows from `row` on."""
        buffer = out.reshape(-1).view(np.uint8).data
        offset, done = (self.first_row + row) * self.size * 4, 0
        while done < len(buffer):
            got = os.preadv(file, [buffer[done:]], offset + done)
            if not got:
                there = (offset + done) // (self.size * 4)
                raise DatasetError(
                    f"{os.fspath(self.path)} is cut short: it has {there} whole rows of {self.size} numbers, "
                    f"{self.first_row + self.count} are needed: write it anew"
                )
            done += got


def _adjacent(indices: npt.NDArray[Any]) -> bool:
    return len(indices) == 0 or int(indices[-1] - indices[0]) + 1 == len(indices)
