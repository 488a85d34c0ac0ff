"""What a run of a pipeline gives: the last stage's tasks, and what every stage did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from nemo_image.stages.record import GroupRecord, StageStats
from nemo_image.stages.tasks import Task


@dataclass
class PipelineResults(Sequence[Task[Any]]):
    """The tasks that the last stage gave, in the order of the input; and the run's account.

    Attributes
    ----------
    name : str
        The pipeline's.
    tasks : list of Task
    stages : list of StageStats
        What each stage did, summed over the groups that were done in this run or taken over from an earlier one.
    groups : dict of str to int
        Groups by what became of them: ``done``, ``skipped`` (taken over), ``failed``.
    seconds : float
        Of the whole run.
    finished : dict of str to dict
        What stages did at the end, by their names: tars written, say.
    ledger : str or None
        The URL of the run's ledger, where a stage writes to a folder.
    """

    name: str
    tasks: list[Task[Any]] = field(default_factory=list)
    stages: list[StageStats] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    ledger: str | None = None

    @overload
    def __getitem__(self, index: int) -> Task[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task[Any]]: ...
    def __getitem__(self, index: int | slice) -> Task[Any] | list[Task[Any]]:
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task[Any]]:
        return iter(self.tasks)

    def stage(self, name: str) -> StageStats:
        """Return what the stage of a name did.

        Raises
        ------
        KeyError
            If there is no such stage.
        """
        for one in self.stages:
            if one.name == name:
                return one
        raise KeyError(f"no stage {name!r}; there are {', '.join(one.name for one in self.stages)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the account as plain values for JSON."""
        return {
            "pipeline": self.name,
            "groups": dict(self.groups),
            "seconds": round(self.seconds, 3),
            "stages": [one.to_dict() | {"rate": round(one.rate, 1)} for one in self.stages],
            "finished": self.finished,
            "ledger": self.ledger,
        }

    def summary(self) -> str:
        """Return the account as a table, one line a stage."""
        lines = [
            f"{self.name}: {', '.join(f'{count} groups {status}' for status, count in self.groups.items() if count)}"
        ]
        width = max((len(one.name) for one in self.stages), default=0)
        lines.append(f"{'stage':<{width}}  {'in':>10}  {'out':>10}  {'seconds':>9}  {'a second':>9}")
        for one in self.stages:
            numbers = f"{one.items_in:>10,}  {one.items_out:>10,}  {one.seconds:>9.1f}  {one.rate:>9,.1f}"
            noted = ", ".join(f"{name}: {value:,.6g}" for name, value in sorted(one.metrics.items()))
            lines.append(f"{one.name:<{width}}  {numbers}" + (f"  {noted}" if noted else ""))
        for name, said in self.finished.items():
            lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in said.items()))
        lines.append(f"{self.seconds:.1f} s in all" + (f"; ledger: {self.ledger}" if self.ledger else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"PipelineResults({self.name!r}, {len(self.tasks)} tasks, groups={self.groups})\n{self.summary()}"


def summed(names: Sequence[str], records: Sequence[GroupRecord]) -> list[StageStats]:
    """Return what each stage did in all groups that did not fail."""
    totals = {name: StageStats(name) for name in names}
    for record in records:
        for one in record.stages:
            if record.status != "failed" and one.name in totals:
                totals[one.name].add(one)
    return list(totals.values())
