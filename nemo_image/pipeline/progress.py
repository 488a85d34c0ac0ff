"""Progress of a pipeline: groups done, and what came out of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from nemo_image.engine.progress import Progress
from nemo_image.stages.record import GroupRecord


class PipelineProgress:
    """Counts finished groups, and what came out of each stage with its rate.

    Parameters
    ----------
    label : str
        The pipeline's name.
    stages : sequence of str
        Their names.
    total : int
        The number of groups.
    """

    def __init__(self, label: str, stages: Sequence[str], total: int) -> None:
        self._progress = Progress(label, total, "groups", stages)

    def __enter__(self) -> PipelineProgress:
        self._progress.__enter__()
        return self

    def advance(self, record: GroupRecord) -> None:
        """Count one more group."""
        counts: dict[str, int] = {}
        for stage in record.stages if record.status == "done" else ():
            counts[stage.name] = counts.get(stage.name, 0) + stage.items_out
        self._progress.add(counts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
