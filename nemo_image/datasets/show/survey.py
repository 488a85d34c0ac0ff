"""One pass over a dataset's metadata: exact counts, and the few rows that are worth a look.

What a partition gives is small and can be merged in any order, so that ten million rows cost no more memory than ten
thousand. Rows are sampled by a hash of (shard, id): the same ones however the rows are partitioned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import backend, schema
from nemo_image.datasets.partitions import shard_tasks
from nemo_image.datasets.show.cards import RowName, clean
from nemo_image.datasets.show.distribution import Distribution
from nemo_image.datasets.show.groups import GroupSizes
from nemo_image.datasets.show.picks import (
    PRIORITY,
    REASON,
    REASONS,
    SAMPLE_ROWS,
    first,
    has_number,
    numbers_of,
    priorities,
    side_of,
    sort_key,
    worth_a_look,
)
from nemo_image.datasets.show.plan import Plan
from nemo_image.datasets.state import DatasetState
from nemo_image.engine.progress import Progress
from nemo_image.engine.run import run_tasks
from nemo_image.errors import one_line

Answer = TypeVar("Answer")

REASON_CHARACTERS = 32
CAPTION_LENGTH = "caption length (characters)"
OTHER = "(other reasons)"

_MERGED_AT_ONCE = 32


@dataclass
class Survey:
    """What a pass found, in some rows or in all. All counts are exact.

    Attributes
    ----------
    rows, duplicates, kept : int
        All; those with ``is_duplicate`` true; and false.
    distributions : dict of str to Distribution
        By column; the length of captions among them. Each of the plan's has one, be it empty.
    not_below : dict of (str, float) to int
        Rows at or above each threshold.
    reasons : Counter of str
        Rows by the category of ``image_error``.
    tiers, clusters : Counter
        Copies by what found them; rows by cluster.
    groups : GroupSizes
        Of copies of the same row.
    picked : DataFrame
        The rows worth a look, with their numbers.
    failures : dict of str to str
        Shards that could not be read, with the cause.
    """

    rows: int = 0
    duplicates: int = 0
    kept: int = 0
    distributions: dict[str, Distribution] = field(default_factory=dict)
    not_below: Counter[tuple[str, float]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    clusters: Counter[int] = field(default_factory=Counter)
    groups: GroupSizes = field(default_factory=GroupSizes)
    picked: pd.DataFrame | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Sequence[Survey], plan: Plan) -> Survey:
        """Add parts."""
        whole = cls()
        for part in parts:
            whole.rows += part.rows
            whole.duplicates += part.duplicates
            whole.kept += part.kept
            whole.failures |= part.failures
            for name in ("not_below", "reasons", "tiers", "clusters"):
                getattr(whole, name).update(getattr(part, name))
        whole.reasons, whole.tiers = _at_most(whole.reasons, REASONS), _at_most(whole.tiers, REASONS)
        names = dict.fromkeys(name for part in parts for name in part.distributions)
        for name in names:
            found = [part.distributions[name] for part in parts if name in part.distributions]
            whole.distributions[name] = Distribution.merged(found)
        whole.groups = GroupSizes.merged([part.groups for part in parts])
        picked = [part.picked for part in parts if part.picked is not None and len(part.picked)]
        if picked:
            rows = pd.concat(picked, ignore_index=True)
            whole.picked = rows[worth_a_look(rows, plan)].reset_index(drop=True)
        return whole

    # Rows to show ------------------------------------------------------------------------------------------------

    def sample(self, n: int) -> list[RowName]:
        """Return `n` rows drawn at random."""
        return self._names(lambda rows: first(rows, np.ones(len(rows), bool), None, n))

    def extremes(self, column: str, n: int, *, greatest: bool) -> list[RowName]:
        """Return the rows with the least or the greatest values of a score, the outermost first."""
        return self._names(lambda rows: first(rows, has_number(rows, column), sort_key(rows, column, greatest), n))

    def around(self, column: str, threshold: float, n: int) -> tuple[list[RowName], list[RowName]]:
        """Return the rows just below a threshold, and those at or just above it, the nearest first."""
        return (
            self._names(lambda rows: first(rows, *side_of(rows, column, threshold, above=False), n)),
            self._names(lambda rows: first(rows, *side_of(rows, column, threshold, above=True), n)),
        )

    def near(self, column: str, value: float, n: int) -> list[RowName]:
        """Return, of the rows drawn at random, those whose score is nearest a value."""

        def nearest(rows: pd.DataFrame) -> Any:
            drawn = np.zeros(len(rows), bool)
            drawn[first(rows, np.ones(len(rows), bool), None, SAMPLE_ROWS)] = True
            return first(rows, drawn & has_number(rows, column), np.abs(numbers_of(rows, column) - value), n)

        return self._names(nearest)

    def with_reason(self, reason: str, n: int) -> list[RowName]:
        """Return rows whose image has no result for a reason."""

        def some(rows: pd.DataFrame) -> Any:
            return first(rows, (rows[REASON] == reason).to_numpy(dtype=bool, na_value=False), None, n)

        return self._names(some)

    def values(self, name: RowName) -> dict[str, Any]:
        """Return the numbers of one of the rows that are not null, as the frame has them."""
        assert self.picked is not None
        found = self.picked[(self.picked[schema.SHARD] == name.shard) & (self.picked[self._id_col] == name.id)]
        hidden = (PRIORITY, REASON, schema.SHARD, self._id_col)
        row = found.iloc[0] if len(found) else pd.Series(dtype=object)
        return {str(key): value for key, value in row.items() if key not in hidden and not pd.isna(value)}

    def _names(self, choose: Callable[[pd.DataFrame], Any]) -> list[RowName]:
        if self.picked is None:
            return []
        rows = self.picked.iloc[choose(self.picked)]
        return [RowName(str(a), b) for a, b in zip(rows[schema.SHARD], rows[self._id_col].tolist(), strict=True)]

    @property
    def _id_col(self) -> str:
        assert self.picked is not None
        return str(self.picked.columns[1])


def survey(state: DatasetState, plan: Plan, label: str = "survey") -> Survey:
    """Look at all rows of a dataset, on the cluster if there is one."""
    whole = Survey()
    waiting: list[Survey] = []
    for part in each_partition(state, LookAt(plan), plan.columns, label):
        waiting.append(part)
        if len(waiting) == _MERGED_AT_ONCE:
            whole = Survey.merged([whole, *waiting], plan)
            waiting = []
    whole = Survey.merged([whole, *waiting], plan)
    for name in plan.numbers:  # also where no row could be read
        whole.distributions.setdefault(name, Distribution.of(pa.array([], pa.float64())))
    return whole


def each_partition(
    state: DatasetState, function: Callable[[pd.DataFrame], Answer], columns: Sequence[str], label: str
) -> Iterator[Any]:
    """Yield what a function makes of each partition of some columns of a dataset's frame, in any order.

    A shard that cannot be read gives a :class:`Survey` with its failure.
    """
    frame = backend.in_pandas(state.frame[list(columns)])
    tasks = shard_tasks(frame)
    if tasks is None:
        from dask import base
        from dask.delayed import delayed

        yield from base.compute(*(delayed(function)(part) for part in frame.to_delayed()))
        return
    count = len(tasks.shards)
    with Progress(label, count) as progress:
        for rows, answer in run_tasks(_OfPartition(function), list(tasks), on_error=_failed, count=count):
            progress.advance(rows)
            yield answer


class _OfPartition:
    """Calls a function on a partition; names its shard where that cannot be read."""

    task_name = "nemo-image-survey"

    def __init__(self, function: Callable[[pd.DataFrame], Any]) -> None:
        self.function = function

    def __call__(self, item: tuple[str, Callable[[], pd.DataFrame]]) -> tuple[int, Any]:
        frame = item[1]()
        return len(frame), self.function(frame)


def _failed(item: tuple[str, Any], error: BaseException) -> tuple[int, Any]:
    return 0, Survey(failures={item[0]: one_line(error)})


# One partition --------------------------------------------------------------------------------------------------------


class LookAt:
    """Surveys a partition."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, frame: pd.DataFrame) -> Survey:
        """Return what is in `frame`."""
        plan, found = self.plan, Survey(rows=len(frame))
        if not len(frame):
            return found
        frame = frame.reset_index(drop=True)  # labels repeat once partitions are joined
        for name in plan.numbers:
            values = backend.arrow_values(frame[name])
            found.distributions[name] = Distribution.of(values)
            limits = plan.thresholds.get(name, ())
            # Comparing would cast too, but refuses integers that a float64 does not hold.
            numbers = values.cast(pa.float64(), safe=False) if limits else values
            for threshold in limits:
                passed = pc.and_(pc.greater_equal(numbers, threshold), pc.is_finite(numbers))
                found.not_below[name, threshold] = pc.sum(passed).as_py() or 0
        if schema.CAPTION in frame:
            captions = backend.arrow_values(frame[schema.CAPTION])
            if pa.types.is_string(captions.type) or pa.types.is_large_string(captions.type):
                lengths = pc.utf8_length(captions)  # an empty one is none
                none = pa.scalar(None, lengths.type)
                found.distributions[CAPTION_LENGTH] = Distribution.of(pc.if_else(pc.equal(lengths, 0), none, lengths))
        reasons = _categories(frame)
        found.reasons = _at_most(Counter(reasons.dropna().tolist()), REASONS)
        self._copies(frame, found)
        found.picked = self._pick(frame, reasons)
        return found

    def _copies(self, frame: pd.DataFrame, found: Survey) -> None:
        if schema.IS_DUPLICATE in frame:
            flags = backend.arrow_values(frame[schema.IS_DUPLICATE])
            found.duplicates = pc.sum(flags).as_py() or 0
            found.kept = len(flags) - flags.null_count - found.duplicates
        tiers, clusters = _value_counts(frame, schema.DUPLICATE_TIER), _value_counts(frame, schema.CLUSTER)
        for tier, count in tiers:
            found.tiers[clean(tier, REASON_CHARACTERS)] += count
        found.tiers = _at_most(found.tiers, REASONS)
        found.clusters.update({cluster: count for cluster, count in clusters if isinstance(cluster, int)})
        found.groups = GroupSizes.of(frame)

    def _pick(self, frame: pd.DataFrame, reasons: pd.Series) -> pd.DataFrame:
        plan = self.plan
        columns = [schema.SHARD, plan.id_col, *(name for name in plan.numbers if name != plan.id_col)]
        rows = frame[columns].copy()
        rows[schema.SHARD] = rows[schema.SHARD].astype(str)
        rows[PRIORITY] = priorities(frame, plan.id_col)
        rows[REASON] = reasons
        return rows[worth_a_look(rows, plan)].reset_index(drop=True)


def _value_counts(frame: pd.DataFrame, name: str) -> Iterator[tuple[Any, int]]:
    if name in frame:
        counts: Any = pc.value_counts(backend.arrow_values(frame[name]).drop_null())
        yield from zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)


def _categories(frame: pd.DataFrame) -> pd.Series:
    """Return the category of each row's ``image_error``; null where there is none."""
    if schema.IMAGE_ERROR not in frame:
        return pd.Series(pd.array([None] * len(frame), dtype="object"), index=frame.index)
    errors = frame[schema.IMAGE_ERROR].astype(object)
    present = errors[errors.notna()]
    named = [clean(str(one)[:200].split(":", 1)[0], REASON_CHARACTERS) or OTHER for one in present]
    return pd.Series(named, index=present.index, dtype=object).reindex(frame.index)


def _at_most(counts: Counter[str], n: int) -> Counter[str]:
    """Return the most frequent reasons, the others as one."""
    if len(counts) <= n:
        return counts
    ordered = sorted(((name, count) for name, count in counts.items() if name != OTHER), key=lambda one: (-one[1], one))
    rest = sum(count for _, count in ordered[n - 1 :]) + counts[OTHER]
    return Counter({**dict(ordered[: n - 1]), OTHER: rest})
