"""A group's record as the ledger keeps it: every image accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_image.engine.ledger import Named, ShardRecord
from nemo_image.stages.base import ProcessingStage
from nemo_image.stages.record import GroupRecord, StageStats
from nemo_image.stages.tasks import FileGroup

ROWS = "rows"
"""What a writer's output says of how many rows it wrote."""


WITHOUT_SAMPLE = "rows_without_sample"
NAMED = (WITHOUT_SAMPLE, "samples_without_row", "repeated_members")
"""What a reader logs, and the ledger has a place of its own for."""


def shard_record(record: GroupRecord, stages: Sequence[ProcessingStage[Any, Any]]) -> ShardRecord:
    """Return the ledger's record of a group.

    The images that the reader saw are those that it gave and those that it says it left out; the images that came out
    are those that the writer says it wrote. What the stages between dropped is counted from what flowed. So the sides
    are counted apart.
    """
    result = ShardRecord(record.name, record.status, seconds=record.seconds, error=record.error)
    if record.status == "failed" or not record.stages:
        return result
    first = next((number for number, stage in enumerate(stages) if _reads_files(stage)), None)
    flow = record.stages if first is None else record.stages[first + 1 :]
    lost = {} if first is None else _left_out(record.stages[first], stages[first])
    entered = (record.stages[0].items_in if first is None else record.stages[first].items_out) + sum(lost.values())
    result.rows_in = entered
    result.losses = lost
    for one in flow if _writes_files(stages[-1]) is False else flow[:-1]:
        result.rows_filtered += max(0, one.items_in - one.items_out)
        result.rows_joined += max(0, one.items_out - one.items_in)
    said = [output.metadata[ROWS] for output in record.outputs if ROWS in output.metadata]
    result.rows_out = sum(said) if said else (flow[-1].items_out if flow else entered - sum(lost.values()))
    if first is not None:
        for name in NAMED:
            setattr(result, name, Named(int(record.stages[first].metrics.get(name, 0))))
    result.samples = entered - lost.get(WITHOUT_SAMPLE, 0)
    result.failures = {
        name.removeprefix("error: "): int(value)
        for one in record.stages
        for name, value in one.metrics.items()
        if name.startswith("error: ")
    }
    return result


def _reads_files(stage: ProcessingStage[Any, Any]) -> bool:
    takes, gives = stage.task_types()
    return takes is FileGroup and gives is not FileGroup


def _writes_files(stage: ProcessingStage[Any, Any]) -> bool:
    takes, gives = stage.task_types()
    return gives is FileGroup and takes is not FileGroup


def _left_out(stats: StageStats, reader: ProcessingStage[Any, Any]) -> dict[str, int]:
    """Return what the reader says it left out, by reason."""
    names = ["skipped", WITHOUT_SAMPLE]
    if getattr(reader, "on_error", None) != "keep":
        names.append("samples_without_image")
    return {name: int(stats.metrics[name]) for name in names if stats.metrics.get(name)}
