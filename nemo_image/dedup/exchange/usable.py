"""The usable embeddings of a frame, and why the others are not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from nemo_image import backend
from nemo_image.dedup.exchange.survey import Mask, has_error, passed_by

Matrix = npt.NDArray[np.float32]

PASSED_BY, NO_VALUE, BAD_VALUE, JUDGED = range(4)
"""States of a row: it entered as a duplicate; it has nothing to judge by; what it has is unusable; it is judged."""


def usable_vectors(
    frame: pd.DataFrame, column: str, size: int | None
) -> tuple[Matrix, npt.NDArray[np.int64], npt.NDArray[np.int8], dict[int, str]]:
    """Return the embeddings of the rows that are to be judged.

    Parameters
    ----------
    frame : DataFrame
        With `column`, and the columns that say which rows are passed by.
    size : int or None
        The length that each embedding must have, in numbers.

    Returns
    -------
    matrix : ndarray of float32, shape (n_judged, size)
    rows : ndarray of int64, shape (n_judged,)
        Their positions in `frame`.
    states : ndarray of int8, shape (n,)
        Of all rows.
    reasons : dict of int to str
        Values of ``image_error`` for vectors that are zero or not finite, by position.
    """
    matrix, rows = backend.to_matrix(frame[column], size)
    states = np.full(len(frame), NO_VALUE, np.int8)
    out: Mask = passed_by(frame)
    wanted = ~(out | has_error(frame))[rows]
    matrix, rows = (matrix[wanted], rows[wanted]) if not wanted.all() else (matrix, rows)
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = np.ascontiguousarray(matrix, np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    good = np.isfinite(norms) & (norms > 0)
    reasons = {
        int(row): f"embedding: {column} is a vector of norm {norm}"
        for row, norm in zip(rows[~good], norms[~good], strict=True)
    }
    states[rows] = np.where(good, JUDGED, BAD_VALUE)
    states[out] = PASSED_BY
    return (matrix, rows, states, reasons) if good.all() else (matrix[good], rows[good], states, reasons)
