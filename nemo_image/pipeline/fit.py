"""Check that the stages of a pipeline fit together, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_image.errors import PipelineError
from nemo_image.stages.base import CompositeStage, ProcessingStage
from nemo_image.stages.tasks import EmptyTask, ImageBatch, Task

Stage = ProcessingStage[Any, Any]

READ = frozenset(
    {
        "image_path",
        "image_id",
        "image_data",
        "image_bytes",
        "caption",
        "metadata",
        "shard",
        "width",
        "height",
        "image_error",
        "files",
        "source",
    }
)
"""What every image has once it is read."""

MADE_BY = {
    "embedding": "ImageEmbeddingStage",
    "aesthetic_score": "ImageAestheticFilterStage",
    "nsfw_score": "ImageNSFWFilterStage",
    "text_embedding": "ClipScoreStage",
    "clip_score": "ClipScoreStage",
}
"""The stage that gives an attribute, for messages."""


def decomposed(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages with those that are made of others replaced by them.

    Raises
    ------
    PipelineError
        If a composite stage is made of composite ones.
    """
    result: list[Stage] = []
    for stage in stages:
        if not isinstance(stage, CompositeStage):
            result.append(stage)
            continue
        parts = stage.decompose()
        composite = [part.name for part in parts if isinstance(part, CompositeStage)]
        if composite or not parts:
            raise PipelineError(f"stage {stage.name!r} decomposes into {composite or 'nothing'}: give plain stages")
        result += parts
    return result


def with_own_names(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages with names that differ: results and settings go by them."""
    seen: dict[str, int] = {}
    result = []
    for stage in stages:
        number = seen[stage.name] = seen.get(stage.name, 0) + 1
        result.append(stage if number == 1 else stage.with_(name=f"{stage.name}_{number}"))
    return result


def is_source(stage: Stage) -> bool:
    """Tell whether a stage needs no input: it makes the tasks of the run."""
    takes, _ = stage.task_types()
    return takes is EmptyTask


def check_fit(stages: Sequence[Stage], needs_source: bool = True) -> None:
    """Raise if a stage does not fit the one before it.

    Parameters
    ----------
    stages : sequence of ProcessingStage
        None of them composite.
    needs_source : bool
        Whether the first one must make the tasks, because none are given.

    Raises
    ------
    PipelineError
        Naming the two stages, and what is missing.
    """
    if not stages:
        raise PipelineError("the pipeline has no stages: add_stage(FilePartitioningStage(file_paths=...)) begins one")
    if needs_source and not is_source(stages[0]):
        raise PipelineError(
            f"the first stage, {stages[0].name!r}, needs input: begin with FilePartitioningStage(file_paths=...), or "
            "give initial_tasks to run()"
        )
    for number, stage in enumerate(stages[1:], 2):
        if is_source(stage):
            raise PipelineError(f"stage {number}, {stage.name!r}, takes no input: it can only be the first")
    _check_types(stages)
    _check_fields(stages)


def _check_types(stages: Sequence[Stage]) -> None:
    gives: Any = None
    giver: Stage | None = None
    for stage in stages:
        takes, makes = stage.task_types()
        both = isinstance(gives, type) and isinstance(takes, type)
        if giver is not None and both and not (issubclass(gives, takes) or issubclass(takes, gives)):
            raise PipelineError(
                f"stage {stage.name!r} takes {takes.__name__}, but {giver.name!r} before it gives {gives.__name__}"
                f"{_advice(gives, takes)}"
            )
        gives, giver = makes, stage


def _advice(gives: type[Task[Any]], takes: type[Task[Any]]) -> str:
    if gives.__name__ == "FileGroup" and takes is ImageBatch:
        return ": put ImageReaderStage between them"
    if gives is ImageBatch and takes.__name__ == "DocumentBatch":
        return ": put ConvertImageBatchToDocumentBatchStage between them"
    return ""


def _check_fields(stages: Sequence[Stage]) -> None:
    """Check the attributes of images; those of other tasks' data are not known."""
    there: set[str] | None = None
    for stage in stages:
        takes, gives = stage.task_types()
        needs = stage.inputs()[1]
        missing = [name for name in needs if there is not None and name not in there and takes is ImageBatch]
        if missing:
            maker = MADE_BY.get(missing[0])
            advice = f": add {maker} before it" if maker else f"; there are {', '.join(sorted(there or ()))}"
            raise PipelineError(
                f"stage {stage.name!r} needs {missing[0]!r} of each image, which no stage before it gives{advice}"
            )
        if gives is ImageBatch or (there is not None and gives is None):
            there = {*(READ if there is None else there), *stage.outputs()[1]}
        elif gives is not None:
            there = None
