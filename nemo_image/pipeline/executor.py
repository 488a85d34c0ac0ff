"""Run the stages of a pipeline on Dask: one task a file group, the stages chained inside it."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nemo_image.engine import ledger
from nemo_image.engine.attempts import Attempts
from nemo_image.engine.client import get_client
from nemo_image.engine.device import local_cluster_type, worker_device
from nemo_image.engine.run import current_client, run_tasks, without_client
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import ArgumentError, PipelineError, RunError, TooManyFailuresError, one_line
from nemo_image.pipeline.accounts import shard_record
from nemo_image.pipeline.checkpoint import Checkpoint
from nemo_image.pipeline.fit import Stage, check_fit, decomposed, is_source, with_own_names
from nemo_image.pipeline.group_task import GroupItem, GroupTask
from nemo_image.pipeline.progress import PipelineProgress
from nemo_image.pipeline.results import PipelineResults, summed
from nemo_image.pipeline.token import pipeline_token
from nemo_image.pipeline.worker import tear_down
from nemo_image.stages.base import RunContext
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import EmptyTask, FileGroup, Task

logger = logging.getLogger("nemo_image")

FAILURES_NAMED = 10


class DaskExecutor:
    """Runs pipelines on a Dask cluster.

    Each file group is one task: its stages are chained as generators in one process, batch by batch, so that pixels
    never travel between processes. Tasks return a small record.

    Parameters
    ----------
    client : distributed.Client, optional
        The current one by default; without one, a local cluster of processes is started for each run.
    n_workers : int, optional
        Processes of that local cluster.
    processes : bool, default True
        With False, groups are worked on by threads of this process, without any cluster: for debugging.
    retries : int, default 1
        Further attempts at a group whose stage raised an error that is not one of this library's. (A group whose worker
        died is always tried again.)
    max_failure_ratio : float, default 0.05
        The run stops when more groups than that share have failed; one is always borne, unless it is 0.
    storage_options : dict, optional
        For fsspec, of the `checkpoint_path`.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    def __init__(
        self,
        client: Any | None = None,
        n_workers: int | None = None,
        *,
        processes: bool = True,
        retries: int = 1,
        max_failure_ratio: float = 0.05,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if client is not None and (n_workers is not None or not processes):
            raise ArgumentError("give a client, or n_workers and processes for a cluster of the executor's own")
        if retries < 0:
            raise ArgumentError(f"retries must be at least 0, not {retries}")
        if not 0 <= max_failure_ratio <= 1:
            raise ArgumentError(f"max_failure_ratio must lie in [0, 1], not {max_failure_ratio}")
        self.client = client
        self.n_workers = n_workers
        self.processes = processes
        self.retries = retries
        self.max_failure_ratio = max_failure_ratio
        self.storage_options = dict(storage_options or {})

    def execute(
        self,
        stages: Sequence[Stage],
        initial_tasks: Sequence[Task[Any]] | None = None,
        checkpoint_path: str | None = None,
        name: str = "pipeline",
    ) -> PipelineResults:
        """Run stages; see :meth:`Pipeline.run`."""
        stages = with_own_names(decomposed(stages))
        check_fit(stages, needs_source=initial_tasks is None)
        started = time.monotonic()
        with self.cluster() as client:
            run = _Run(self, client, name, checkpoint_path)
            return run.execute(stages, initial_tasks, started)

    @contextmanager
    def cluster(self) -> Iterator[Any]:
        """Have a client for the ``with`` block, and make it the current one; None for threads of this process."""
        with ExitStack() as stack:
            if not self.processes:
                stack.enter_context(without_client())
                yield None
                return
            client = self.client or current_client()
            if client is None:
                client = stack.enter_context(get_client(local_cluster_type(), n_workers=self.n_workers))
            stack.enter_context(client.as_current())
            yield client


@dataclass(frozen=True)
class _Planned:
    """What a run does: prepared stages, and the groups that go through those behind the source."""

    stages: Sequence[Stage]
    items: Sequence[GroupItem]
    context: RunContext

    @property
    def folder(self) -> str | None:
        """Where the run writes to."""
        return self.stages[-1].output_folder()

    @property
    def folder_options(self) -> Mapping[str, Any]:
        return getattr(self.stages[-1], "storage_options", None) or {}


class _Run:
    """One run of a pipeline."""

    def __init__(self, executor: DaskExecutor, client: Any, name: str, checkpoint_path: str | None) -> None:
        self.executor = executor
        self.client = client
        self.name = name
        self.checkpoint = None if checkpoint_path is None else Checkpoint(checkpoint_path, executor.storage_options)
        self.id = uuid.uuid4().hex

    def execute(
        self, stages: Sequence[Stage], initial_tasks: Sequence[Task[Any]] | None, started: float
    ) -> PipelineResults:
        stages, items = self._begin(stages, initial_tasks)
        folder = stages[-1].output_folder()
        if self.checkpoint is not None and folder is None:
            raise PipelineError(
                f"checkpoint_path: the last stage, {stages[-1].name!r}, writes no files that a rerun could take over: "
                "end with ImageWriterStage or ParquetWriter"
            )
        with ExitStack() as held:
            if folder is not None:
                held.enter_context(run_lock(folder, "pipeline", getattr(stages[-1], "storage_options", None)))
            planned = self._prepare(stages, items)
            try:
                records = self._work(planned)
            finally:
                self._tear_down()
            return self._finish(planned, records, started)

    # Before ----------------------------------------------------------------------------------------------------------

    def _begin(
        self, stages: Sequence[Stage], initial_tasks: Sequence[Task[Any]] | None
    ) -> tuple[Sequence[Stage], list[GroupItem]]:
        """Return the stages that run on workers, and what they work on."""
        if is_source(stages[0]) and initial_tasks is None:
            made = stages[0].process_batch([EmptyTask()])
            rest = stages[1:]
            if not rest:
                raise PipelineError(f"the pipeline has no stage behind {stages[0].name!r}: nothing would be done")
        else:
            made, rest = list(initial_tasks or ()), stages
        items = []
        for index, task in enumerate(made):
            if isinstance(task, FileGroup):
                group = replace(task, index=index, name=task.name or f"group-{index:06d}")
            else:
                group = FileGroup(name=f"task-{index:06d}", index=index, task_id=task.task_id)
            items.append(GroupItem(group, group if isinstance(task, FileGroup) else task))
        repeated = [name for name, count in Counter(item.group.name for item in items).items() if count > 1]
        if repeated:
            raise ArgumentError(f"two file groups have the name {repeated[0]!r}: give each its own")
        return rest, items

    def _prepare(self, stages: Sequence[Stage], items: Sequence[GroupItem]) -> _Planned:
        context = RunContext(
            name=self.name,
            groups=[item.group for item in items],
            has_gpu=self._has_gpu(stages),
            checkpoint_path=None if self.checkpoint is None else self.checkpoint.root,
            settled={} if self.checkpoint is None else self.checkpoint.settled(),
        )
        prepared: list[Stage] = []
        for number, stage in enumerate(stages):
            if number == len(stages) - 1:
                context = replace(context, token=pipeline_token(prepared, stage))
            one = stage.prepare(context)
            prepared.append(one)
        # Before the stages are connected: a writer may then remove what it is to replace.
        if self.checkpoint is not None:
            self.checkpoint.begin(context.token, {stage.name: stage.settled() for stage in prepared})
        for number, stage in enumerate(prepared):
            stage.connect(prepared[:number], prepared[number + 1 :])
        return _Planned(prepared, items, context)

    def _has_gpu(self, stages: Sequence[Stage]) -> bool:
        wanting = [stage.name for stage in stages if stage.resources.gpus > 0]
        if not wanting:
            return False
        found = worker_device() == "cuda"
        if not found:
            logger.warning("no GPU on the workers: %s use the CPU", ", ".join(wanting))
        return found

    # The work --------------------------------------------------------------------------------------------------------

    def _work(self, planned: _Planned) -> list[GroupRecord]:
        notes_root = planned.folder or (self.checkpoint.root if self.checkpoint else None)
        has_gpu = planned.context.has_gpu
        work = GroupTask(
            planned.stages,
            self.id,
            notes_root,
            planned.folder_options,
            self.checkpoint,
            self.executor.retries,
            max(stage.resources.gpus for stage in planned.stages) if has_gpu else 0.0,
        )
        count = len(planned.items)
        ratio = self.executor.max_failure_ratio
        allowed = max(1.0, ratio * count) if ratio > 0 else 0.0
        records: list[GroupRecord] = []
        failed = 0

        def too_many() -> bool:
            return failed > allowed

        with PipelineProgress(self.name, [stage.name for stage in planned.stages], count) as progress:
            for record in run_tasks(work, planned.items, on_error=_dead_task, count=count, should_stop=too_many):
                records.append(record)
                failed += record.status == "failed"
                progress.advance(record)
        records.sort(key=lambda record: record.index)
        if len(records) < count:
            failures = _failures(records)
            raise TooManyFailuresError(
                f"stopped early: {failed} of the first {len(records)} groups failed, more than "
                f"max_failure_ratio={ratio} of {count} allows. {_causes(failures)}",
                failures,
            )
        if notes_root is not None:
            Attempts(notes_root, planned.folder_options).clear()
        return records

    def _tear_down(self) -> None:
        if self.client is None:
            tear_down(self.id)
            return
        try:
            self.client.run(tear_down, self.id, on_error="ignore")
        except Exception as error:  # the cluster may be gone; the run's own error says more
            logger.warning("%s: stages could not be torn down on the workers: %s", self.name, one_line(error))

    # After -----------------------------------------------------------------------------------------------------------

    def _finish(self, planned: _Planned, records: Sequence[GroupRecord], started: float) -> PipelineResults:
        done = [record for record in records if record.status != "failed"]
        finished = {stage.name: stage.finish(planned.context, done) for stage in planned.stages}
        names = [stage.name for stage in planned.stages]
        results = PipelineResults(
            name=self.name,
            tasks=[task for record in done for task in record.outputs],
            stages=summed(names, records),
            groups={status: sum(one.status == status for one in records) for status in ("done", "skipped", "failed")},
            finished={name: said for name, said in finished.items() if said},
        )
        if planned.folder is not None:
            made_by = {name: made for stage in planned.stages for name, made in stage.column_fingerprints().items()}
            accounts = [shard_record(record, planned.stages) for record in records]
            results.ledger, _ = ledger.write_ledger(
                planned.folder, "pipeline", accounts, planned.folder_options, made_by
            )
        results.seconds = time.monotonic() - started
        failures = _failures(records)
        if failures:
            said = f" (ledger: {results.ledger})" if results.ledger else ""
            raise RunError(
                f"{len(failures)} of {len(records)} groups failed, the others are finished{said}. {_causes(failures)}",
                failures,
            )
        return results


def _dead_task(item: GroupItem, error: BaseException) -> GroupRecord:
    return GroupRecord(item.group.name, item.group.index, list(item.group.data), status="failed", error=one_line(error))


def _failures(records: Sequence[GroupRecord]) -> dict[str, str]:
    return {_said(record): record.error or "" for record in records if record.status == "failed"}


def _said(record: GroupRecord) -> str:
    """Return what people know a group by: its files."""
    if not record.files:
        return record.name
    return record.files[0] + (f" and {len(record.files) - 1} more" if len(record.files) > 1 else "")


def _causes(failures: Mapping[str, str]) -> str:
    named = [f"{name}: {cause}" for name, cause in sorted(failures.items())[:FAILURES_NAMED]]
    more = len(failures) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")
