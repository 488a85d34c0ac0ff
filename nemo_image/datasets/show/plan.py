"""What a survey of a dataset looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from nemo_image import backend, schema


@dataclass(frozen=True)
class Plan:
    """What a survey looks at.

    Attributes
    ----------
    id_col : str
    numbers : tuple of str
        Columns of numbers and booleans to count.
    scores : tuple of str
        Those of which the least and greatest rows are kept.
    thresholds : dict of str to tuple of float
        Of some of the scores.
    pictures : int
        Rows kept for each thing to show.
    columns : tuple of str
        All columns that are read.
    """

    id_col: str
    numbers: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    thresholds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    pictures: int = 8
    columns: tuple[str, ...] = ()


def plan_of(
    frame: Any, id_col: str, thresholds: Mapping[str, Sequence[float]] | None = None, pictures: int = 8
) -> Plan:
    """Return what there is to look at in a Dask frame of metadata."""
    kinds = {name: backend.arrow_type_of(backend.to_pandas(frame._meta[[name]])[name]) for name in frame.columns}
    hidden = {id_col, schema.SHARD, schema.IS_DUPLICATE, schema.CLUSTER}
    numbers = tuple(name for name, kind in kinds.items() if _is_number(kind) and name not in hidden)
    by_dedup = {schema.CENTROID_DISTANCE, schema.MAX_SIMILARITY, "hash_distance"}
    scores = tuple(name for name in numbers if pa.types.is_floating(kinds[name]) and name not in by_dedup)
    wanted = dict(thresholds or {})
    scores = tuple(dict.fromkeys([*(name for name in wanted if name in numbers), *scores]))
    texts = (schema.CAPTION, schema.IMAGE_ERROR, schema.DUPLICATE_TIER)
    others = (schema.IS_DUPLICATE, schema.CLUSTER, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SHARD, *texts)
    columns = (schema.SHARD, id_col, *numbers, *(name for name in others if name in kinds and name not in numbers))
    limits = {name: tuple(float(one) for one in some) for name, some in wanted.items() if name in numbers}
    return Plan(id_col, numbers, scores, limits, pictures, tuple(dict.fromkeys(columns)))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
