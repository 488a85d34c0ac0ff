"""The task that takes one file group through all stages, in one process."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import cloudpickle

from nemo_image.engine.attempts import MAX_DEATHS, Attempts
from nemo_image.engine.gpu_share import gpu_share
from nemo_image.engine.isolation import isolate
from nemo_image.engine.prefetch import prefetch
from nemo_image.errors import NemoImageError, ShardError, one_line
from nemo_image.pipeline.checkpoint import Checkpoint
from nemo_image.pipeline.worker import LoadedStage, loaded_stages
from nemo_image.stages.base import Metrics, ProcessingStage, collecting_metrics
from nemo_image.stages.record import GroupRecord, StageStats
from nemo_image.stages.tasks import FileGroup, Task

logger = logging.getLogger("nemo_image")

WAITED = "seconds waited for"
"""What a stage that works ahead says of the time in which later stages had to wait for it."""


@dataclass(frozen=True)
class GroupItem:
    """A group, and the task that the first stage gets of it: the group itself, or one of the user's own."""

    group: FileGroup
    task: Task[Any]


class GroupTask:
    """Takes a group through all stages; returns its record, whatever happens.

    Parameters
    ----------
    stages : sequence of ProcessingStage
        Prepared and connected.
    run : str
        Names the run.
    notes_root : str, optional
        The folder in which attempts leave their notes.
    storage_options : dict, optional
        Of its file system.
    checkpoint : Checkpoint, optional
    retries : int
        Further attempts at a group after an error that is not one of ours.
    gpus : float
        The share of a GPU that a group holds while it is worked on.
    """

    task_name = "nemo-image-pipeline"

    def __init__(
        self,
        stages: Sequence[ProcessingStage[Any, Any]],
        run: str,
        notes_root: str | None = None,
        storage_options: Any = None,
        checkpoint: Checkpoint | None = None,
        retries: int = 0,
        gpus: float = 0.0,
    ) -> None:
        self._stages: list[ProcessingStage[Any, Any]] | None = list(stages)
        self._sent: bytes | None = None
        self.run = run
        self.notes_root = notes_root
        self.storage_options = storage_options
        self.checkpoint = checkpoint
        self.retries = retries
        self.gpus = gpus

    @property
    def stages(self) -> list[ProcessingStage[Any, Any]]:
        """The stages."""
        if self._stages is None:
            assert self._sent is not None
            self._stages = pickle.loads(self._sent)
        return self._stages

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the stages once, by cloudpickle, which sends classes along that workers do not have.

        They are unpickled within the task: outside it, a module that a worker lacks would end the worker's connection.
        """
        if self._sent is None:
            self._sent = cloudpickle.dumps(self._stages)
        return {**vars(self), "_stages": None}

    def __call__(self, item: GroupItem) -> GroupRecord:
        """Work on one group."""
        group = item.group
        record = GroupRecord(group.name, group.index, list(group.data))
        started = time.monotonic()
        try:
            done = self.checkpoint.finished(group, self.stages[-1]) if self.checkpoint else None
            if done is not None:
                return done
            with self._attempt(group.name), gpu_share(self.gpus):
                self._try(item, record)
            record.seconds = round(time.monotonic() - started, 3)
            if self.checkpoint:
                self.checkpoint.note(group, record)
        except Exception as error:
            stage = getattr(error, "nemo_image_stage", None)
            record.status, record.outputs = "failed", []
            record.error = f"stage {stage}: {one_line(error)}" if stage else one_line(error)
            record.seconds = round(time.monotonic() - started, 3)
        return record

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Keep decoders in a child process where one may have ended the process of an earlier attempt."""
        if self.notes_root is None:
            yield
            return
        with Attempts(self.notes_root, self.storage_options, self.run).attempt(name) as deaths:
            if deaths.in_this_run >= MAX_DEATHS:
                raise ShardError(
                    f"{deaths.in_this_run} processes that worked on this group died, the later ones with their "
                    "decoders in a child process: look at the workers' logs and memory"
                )
            with isolate() if deaths else nullcontext():
                yield

    def _try(self, item: GroupItem, record: GroupRecord) -> None:
        for attempt in range(self.retries + 1):
            try:
                record.stages, record.outputs = self._work(item)
                return
            except NemoImageError:
                raise  # it would be the same again
            except Exception as error:
                if attempt == self.retries:
                    raise
                logger.warning("%s: %s: trying again", item.group.name, one_line(error))

    def _work(self, item: GroupItem) -> tuple[list[StageStats], list[Task[Any]]]:
        stages = loaded_stages(self.run, self.stages)
        stats = [StageStats(one.stage.name) for one in stages]
        with collecting_metrics() as metrics, ExitStack() as opened:
            stream: Iterator[Task[Any]] = iter([item.task])
            stats[0].tasks_in, stats[0].items_in = 1, item.task.num_items
            before = _Clock()
            for number, one in enumerate(stages):
                following = stats[number + 1] if number + 1 < len(stages) else None
                clock = _Clock()
                stream = _measured(one, stream, item.group, (stats[number], following), before, clock)
                if one.stage.works_ahead:
                    # Closed before the stages behind it: they may be waiting for it.
                    ahead = opened.enter_context(closing(prefetch(stream, depth=1)))
                    clock = _Clock()
                    stream = _waited(ahead, clock, metrics, one.stage.name)
                before = clock
            outputs = list(stream)
        for one_stats in stats:
            one_stats.seconds = round(one_stats.seconds, 4)
            one_stats.metrics = {name: round(value, 4) for name, value in metrics[one_stats.name].items()}
        return stats, outputs


class _Clock:
    """Seconds that a stream took, those of the streams that it draws from included."""

    seconds = 0.0


def _measured(
    loaded: LoadedStage,
    tasks: Iterator[Task[Any]],
    group: FileGroup,
    stats: tuple[StageStats, StageStats | None],
    before: _Clock,
    clock: _Clock,
) -> Iterator[Task[Any]]:
    """Draw a stage's stream, with what it does counted; errors say the stage."""
    own, following = stats
    stream = loaded.stream(tasks, group)
    while True:
        started, others = time.perf_counter(), before.seconds
        try:
            task = next(stream)
        except StopIteration:
            return
        except Exception as error:
            if not hasattr(error, "nemo_image_stage"):
                error.nemo_image_stage = loaded.stage.name  # type: ignore[attr-defined]
            raise
        finally:
            elapsed = time.perf_counter() - started
            clock.seconds += elapsed
            own.seconds += elapsed - (before.seconds - others)
        for one, kind in ((own, "out"), (following, "in")):
            if one is not None:
                setattr(one, f"tasks_{kind}", getattr(one, f"tasks_{kind}") + 1)
                setattr(one, f"items_{kind}", getattr(one, f"items_{kind}") + task.num_items)
        yield task


def _waited(stream: Iterator[Task[Any]], clock: _Clock, metrics: Metrics, name: str) -> Iterator[Task[Any]]:
    """Draw a stream that another thread makes, with the time spent waiting for it."""
    while True:
        started = time.perf_counter()
        try:
            task = next(stream)
        except StopIteration:
            return
        finally:
            elapsed = time.perf_counter() - started
            clock.seconds += elapsed
            metrics[name][WAITED] += elapsed  # type: ignore[assignment]
        yield task
