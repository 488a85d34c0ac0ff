"""A pipeline: stages in a row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from nemo_image.errors import ArgumentError
from nemo_image.pipeline.executor import DaskExecutor
from nemo_image.pipeline.fit import Stage, check_fit, decomposed, with_own_names
from nemo_image.pipeline.results import PipelineResults
from nemo_image.shards import files
from nemo_image.stages.base import ProcessingStage
from nemo_image.stages.tasks import Task


class Pipeline:
    """Stages through which file groups go, each group in one task.

    Parameters
    ----------
    name : str
    description : str, optional
    stages : iterable of ProcessingStage, optional
        To begin with; :meth:`add_stage` adds more.
    """

    def __init__(self, name: str, description: str | None = None, stages: Iterable[Stage] | None = None) -> None:
        self.name = name
        self.description = description
        self.stages: list[Stage] = []
        for stage in stages or ():
            self.add_stage(stage)

    def add_stage(self, stage: Any) -> Pipeline:
        """Add a stage at the end; return the pipeline.

        Raises
        ------
        ArgumentError
            If it is no stage.
        """
        if not isinstance(stage, ProcessingStage):
            hint = f": write {stage.__name__}(...)" if isinstance(stage, type) else ""
            raise ArgumentError(f"a stage must be a ProcessingStage, not {stage!r}{hint}")
        self.stages.append(stage)
        return self

    def build(self, initial_tasks: Sequence[Task[Any]] | None = None) -> list[Stage]:
        """Check that the stages fit together; return those that will run, composite ones replaced by their parts.

        Raises
        ------
        PipelineError
            If they do not fit.
        """
        stages = with_own_names(decomposed(self.stages))
        check_fit(stages, needs_source=initial_tasks is None)
        return stages

    def describe(self) -> str:
        """Return the pipeline as text: its stages with their arguments, resources, inputs and outputs."""
        lines = [f"Pipeline: {self.name}"]
        if self.description:
            lines.append(f"Description: {self.description}")
        lines.append(f"Stages: {len(self.stages)}")
        for number, stage in enumerate(self.stages, 1):
            lines += ["", f"Stage {number}: {stage.name} ({type(stage).__name__})", *_described(stage)]
        return "\n".join(lines)

    def run(
        self,
        executor: DaskExecutor | None = None,
        initial_tasks: Sequence[Task[Any]] | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
    ) -> PipelineResults:
        """Run the pipeline.

        Parameters
        ----------
        executor : DaskExecutor, optional
            By default one on the current Dask client, or on a local cluster.
        initial_tasks : sequence of Task, optional
            What the first stage gets, if it does not find its input itself.
        checkpoint_path : str or path, optional
            A folder (or URL) for notes of the groups that are finished: a rerun skips them.

        Returns
        -------
        PipelineResults
            The last stage's tasks, and what each stage did.

        Raises
        ------
        PipelineError
            If the stages do not fit together.
        RunError
            If groups failed: the others are finished; lists them with their causes.
        """
        self.build(initial_tasks)
        path = None if checkpoint_path is None else files.folder(checkpoint_path)
        return (executor or DaskExecutor()).execute(self.stages, initial_tasks, path, self.name)

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r}, [{', '.join(stage.name for stage in self.stages)}])"


def _described(stage: Any) -> list[str]:
    lines = []
    if is_dataclass(stage):
        names = [one.name for one in fields(stage) if one.init and one.name != "name"]
        lines += [f"  {name}: {getattr(stage, name)!r}" for name in names if getattr(stage, name) is not None]
    gpus = f", {stage.resources.gpus:g} GPUs" if stage.resources.gpus else ""
    lines.append(f"  Resources: {stage.resources.cpus:g} CPUs{gpus}")
    for label, (_, names) in (("Inputs", stage.inputs()), ("Outputs", stage.outputs())):
        if names:
            lines.append(f"  {label}: {', '.join(names)}")
    return lines
