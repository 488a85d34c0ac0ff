"""Which rows are worth a look: drawn at random, outermost, nearest to a threshold.

Each choice is of the first few rows in some order that no two rows share, so that choosing again among what was chosen
of several parts gives the same as choosing among all.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.show.plan import Plan

Mask = npt.NDArray[np.bool_]

SAMPLE_ROWS = 512
"""Rows drawn at random, from which pictures at quantiles are chosen."""

REASONS = 24
"""Reasons of bad images that are told apart; the rest are one."""

PRIORITY, REASON = "nemo_image_priority", "nemo_image_reason"


def priorities(frame: pd.DataFrame, id_col: str) -> npt.NDArray[np.uint64]:
    """Return a hash of each row's (shard, id), by which rows are drawn."""
    ids = frame[id_col].astype(str).to_numpy(dtype=object)
    names, codes = np.unique(frame[schema.SHARD].astype(str).to_numpy(dtype=object), return_inverse=True)
    salts = np.array([zlib.crc32(str(name).encode("utf-8", "replace")) for name in names], np.uint64)
    mixed = pd.util.hash_array(ids, categorize=False) ^ (salts[codes] * np.uint64(0x9E3779B97F4A7C15))
    return pd.util.hash_array(mixed)


def worth_a_look(rows: pd.DataFrame, plan: Plan) -> Mask:
    """Tell which rows may be shown of all: asked of merged rows again, it gives the same as of all at once."""
    chosen = np.zeros(len(rows), bool)
    chosen[first(rows, np.ones(len(rows), bool), None, SAMPLE_ROWS)] = True
    for name in plan.scores:
        present = has_number(rows, name)
        for greatest in (False, True):
            chosen[first(rows, present, sort_key(rows, name, greatest), plan.pictures)] = True
    for name, limits in plan.thresholds.items():
        for limit in limits:
            for above in (False, True):
                chosen[first(rows, *side_of(rows, name, limit, above=above), plan.pictures)] = True
    reasons = rows[REASON]
    for reason in sorted(reasons.dropna().unique())[: 4 * REASONS]:
        chosen[first(rows, (reasons == reason).to_numpy(dtype=bool, na_value=False), None, plan.pictures)] = True
    return chosen


def first(rows: pd.DataFrame, among: Mask, key: Any, n: int) -> npt.NDArray[np.int64]:
    """Return the positions of the `n` rows with the smallest key, of those in question; ties are drawn at random."""
    places = np.flatnonzero(among)
    priority = rows[PRIORITY].to_numpy()[places]
    order_by = priority if key is None else key[places]
    if len(places) > n:
        limit = np.partition(order_by, n - 1)[n - 1]
        near = order_by <= limit
        places, priority, order_by = places[near], priority[near], order_by[near]
    return np.asarray(places[np.lexsort((priority, order_by))][:n], np.int64)


def numbers_of(rows: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    """Return a column's numbers; NaN where there is none."""
    # Rounds integers that a float64 does not hold.
    values = backend.arrow_values(rows[column]).cast(pa.float64(), safe=False)
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def has_number(rows: pd.DataFrame, column: str) -> Mask:
    """Tell which rows have a finite number in a column."""
    return np.isfinite(numbers_of(rows, column))


def sort_key(rows: pd.DataFrame, column: str, greatest: bool) -> npt.NDArray[np.float64]:
    """Return by what the rows with the least, or the greatest, values come first."""
    return -numbers_of(rows, column) if greatest else numbers_of(rows, column)


def side_of(rows: pd.DataFrame, column: str, threshold: float, *, above: bool) -> tuple[Mask, npt.NDArray[np.float64]]:
    """Tell which rows lie on one side of a threshold, and how far from it."""
    values = numbers_of(rows, column)
    side = values >= threshold if above else values < threshold
    return side & np.isfinite(values), np.abs(values - threshold)
