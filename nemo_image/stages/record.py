"""What became of a file group, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_image.stages.tasks import FileGroup, Task


@dataclass
class StageStats:
    """What a stage did.

    Attributes
    ----------
    name : str
    tasks_in, tasks_out : int
        Tasks taken and given.
    items_in, items_out : int
        What they held: images, rows of tables, or files.
    seconds : float
        Time spent in the stage itself, without the stages before it.
    metrics : dict of str to float
        What the stage logged, such as images that could not be decoded, by reason.
    """

    name: str
    tasks_in: int = 0
    tasks_out: int = 0
    items_in: int = 0
    items_out: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Items per second of the stage's own time."""
        return max(self.items_in, self.items_out) / self.seconds if self.seconds > 0 else 0.0

    def add(self, other: StageStats) -> None:
        """Add what the same stage did elsewhere."""
        for name in ("tasks_in", "tasks_out", "items_in", "items_out", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0) + value

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values for JSON."""
        return asdict(self)


@dataclass
class GroupRecord:
    """The account of a file group.

    Attributes
    ----------
    name : str
        The group's.
    index : int
        Its place among the groups of the run.
    files : list of str
        What it was made of.
    status : str
        ``"done"``, ``"skipped"`` (was finished before) or ``"failed"``.
    stages : list of StageStats
        In the pipeline's order.
    outputs : list of Task
        What the last stage gave.
    error : str or None
        Why it failed.
    """

    name: str
    index: int = 0
    files: list[str] = field(default_factory=list)
    status: str = "done"
    stages: list[StageStats] = field(default_factory=list)
    outputs: list[Task[Any]] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON; its outputs must be file groups."""
        values = {name: getattr(self, name) for name in ("name", "index", "files", "status", "seconds", "error")}
        outputs = [
            {"data": one.data, "task_id": one.task_id, "dataset_name": one.dataset_name, "metadata": one.metadata}
            for one in self.outputs
        ]
        return {**values, "stages": [one.to_dict() for one in self.stages], "outputs": outputs}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GroupRecord:
        """Rebuild a record from :meth:`to_dict`."""
        known = dict(values)
        known["stages"] = [StageStats(**one) for one in values["stages"]]
        known["outputs"] = [FileGroup(**one) for one in values["outputs"]]
        return cls(**known)
