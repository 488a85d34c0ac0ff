"""The stages of a run in a worker process: set up once, shared by its threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_image.stages.base import ProcessingStage, batches
from nemo_image.stages.tasks import FileGroup, ImageBatch, Task

logger = logging.getLogger("nemo_image")


class LoadedStage:
    """A stage that is set up.

    Attributes
    ----------
    stage : ProcessingStage
    """

    def __init__(self, stage: ProcessingStage[Any, Any]) -> None:
        self.stage = stage
        self._lock = threading.Lock()
        self._is_set_up = False

    def set_up(self) -> None:
        """Call the stage's :meth:`setup`, unless that was done."""
        with self._lock:
            if not self._is_set_up:
                self.stage.setup()
                self._is_set_up = True

    def tear_down(self) -> None:
        """Call the stage's :meth:`teardown`, if it was set up."""
        with self._lock:
            if self._is_set_up:
                self._is_set_up = False
                self.stage.teardown()

    def stream(self, tasks: Iterator[Task[Any]], group: FileGroup) -> Iterator[Task[Any]]:
        """Work on a group's tasks; a stage that is not thread-safe, on one at a time in this process."""
        made = self._stream(tasks, group)
        return _without_pixels(made) if self.stage.remove_image_data else made

    def _stream(self, tasks: Iterator[Task[Any]], group: FileGroup) -> Iterator[Task[Any]]:
        stage = self.stage
        if stage.thread_safe or type(stage).stream is not ProcessingStage.stream:
            yield from stage.stream(tasks, group)
            return
        for some in batches(tasks, max(1, stage.batch_size)):
            with self._lock:
                made = stage.process_batch(some)
            yield from made


def _without_pixels(tasks: Iterator[Task[Any]]) -> Iterator[Task[Any]]:
    for task in tasks:
        for image in task.data if isinstance(task, ImageBatch) else ():
            image.drop_pixels()
        yield task


_runs: dict[str, list[LoadedStage]] = {}
_lock = threading.Lock()


def loaded_stages(run: str, stages: Sequence[ProcessingStage[Any, Any]]) -> list[LoadedStage]:
    """Return this process's stages of a run, set up."""
    with _lock:
        found = _runs.setdefault(run, [])
        if not found:
            found += [LoadedStage(stage) for stage in stages]
    for one in found:
        one.set_up()
    return found


def tear_down(run: str) -> None:
    """Let go of this process's stages of a run."""
    with _lock:
        found = _runs.pop(run, [])
    for one in found:
        try:
            one.tear_down()
        except Exception:
            logger.exception("stage %s: teardown failed", one.stage.name)
