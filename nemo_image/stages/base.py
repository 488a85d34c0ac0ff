"""The stage interface: what every step of a pipeline is."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar, get_args

from nemo_image.errors import ArgumentError
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import FileGroup, Task

X = TypeVar("X", bound=Task[Any])
Y = TypeVar("Y", bound=Task[Any])

Fields = tuple[list[str], list[str]]
"""Attributes of a task, and attributes of what its `data` holds."""

Metrics = dict[str, Counter[str]]

_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_metrics: ContextVar[Metrics | None] = ContextVar("nemo_image_stage_metrics", default=None)


@dataclass(frozen=True)
class Resources:
    """What a stage needs.

    Attributes
    ----------
    cpus : float
        Cores that it keeps busy, for people who plan a cluster. The workers' threads decide how many tasks run at once.
    gpus : float
        Its share of a GPU: with 0.25, four tasks of a worker use its GPU at the same time. 0 is the CPU.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus < 0 or not 0 <= self.gpus <= 1:
            raise ArgumentError(
                f"resources: cpus={self.cpus} must not be negative, gpus={self.gpus} must lie in [0, 1]"
            )


@dataclass(frozen=True)
class RunContext:
    """What a run tells its stages on the client, before any task starts.

    Attributes
    ----------
    name : str
        The pipeline's.
    groups : sequence of FileGroup
        What there is to do.
    has_gpu : bool
        Whether the workers have one.
    checkpoint_path : str or None
        Where finished groups are noted; None for a run that remembers nothing.
    token : str
        Names the pipeline: its stages and their arguments, not its input.
    settled : dict of str to dict
        By a stage's name, what an earlier run of the same checkpoint found out for it; see
        :meth:`ProcessingStage.settled`.
    """

    name: str
    groups: Sequence[FileGroup] = ()
    has_gpu: bool = False
    checkpoint_path: str | None = None
    token: str = ""
    settled: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def device(self, gpus: float) -> str:
        """Return torch's name of the device for a stage with a share of a GPU."""
        return "cuda" if gpus > 0 and self.has_gpu else "cpu"


class ProcessingStage(Generic[X, Y]):
    """A step of a pipeline: takes tasks of type X, gives tasks of type Y.

    A stage of your own overrides :meth:`process`; that is all it needs. It is called in worker processes, on one task
    at a time (unless it says `thread_safe`), and may keep what :meth:`setup` made, once a process.

    Attributes
    ----------
    name : str
        In descriptions, results and errors; by default the class's name in words.
    resources : Resources
    batch_size : int
        Tasks that :meth:`process_batch` gets at once.
    remove_image_data : bool
        Whether a pipeline frees the decoded pixels of the images that the stage gives. The stored file stays.
    thread_safe : bool
        Whether several threads of a process may call it at once.
    works_ahead : bool
        Whether its next tasks are made in a thread of their own while later stages work.
    """

    name: str = ""
    resources: Resources = Resources()
    batch_size: int = 1
    remove_image_data: bool = False
    thread_safe: ClassVar[bool] = False
    works_ahead: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = _WORDS.sub("_", cls.__name__).lower().removesuffix("_stage")

    # To override -----------------------------------------------------------------------------------------------------

    def process(self, task: X) -> Y | list[Y] | None:
        """Work on a task.

        Returns
        -------
        task, list of task, or None
            None drops the task.
        """
        raise NotImplementedError(f"{type(self).__name__} must override process(task)")

    # May be overridden -----------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Load what all tasks of a process share. Called once in each process, before its first task."""

    def teardown(self) -> None:
        """Let go of it. Called once in each process that called :meth:`setup`, at the end of the run."""

    def process_batch(self, tasks: list[X]) -> list[Y]:
        """Work on up to `batch_size` tasks at once; by default, on one after the other."""
        results: list[Y] = []
        for task in tasks:
            made = self.process(task)
            if isinstance(made, list):
                results += made
            elif made is not None:
                results.append(made)
        return results

    def inputs(self) -> Fields:
        """Return the attributes of a task, and of its images, that the stage needs."""
        return [], []

    def outputs(self) -> Fields:
        """Return the attributes of a task, and of its images, that the stage adds."""
        return [], []

    # For stages that know more of the run ----------------------------------------------------------------------------

    def prepare(self, context: RunContext) -> ProcessingStage[X, Y]:
        """Check on the client what can be checked, before any task starts; return the stage that the tasks carry."""
        return self

    def connect(self, earlier: Sequence[ProcessingStage[Any, Any]], later: Sequence[ProcessingStage[Any, Any]]) -> None:
        """Look at the (prepared) stages before and behind this one."""

    def settled(self) -> dict[str, Any]:
        """Return what :meth:`prepare` found out by trying, for later runs to go on with: values for JSON."""
        return {}

    def made_of(self) -> Any:
        """Return what a prepared stage is made of besides its arguments, the files it reads, say: values for JSON."""
        return None

    def output_folder(self) -> str | None:
        """Return the folder that the stage writes to, if it does."""
        return None

    def outputs_intact(self, outputs: Sequence[Task[Any]]) -> bool:
        """Tell whether what the stage gave for a group in an earlier run is still there."""
        return False

    def column_fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        """Return, for each column of results that the stage adds, what makes it: values for JSON."""
        return {}

    def stream(self, tasks: Iterator[X], group: FileGroup) -> Iterator[Y]:
        """Work on all tasks of a file group, in order, as they come.

        Parameters
        ----------
        tasks : iterator
            What the stage before gives; drawing from it makes that stage work.
        group : FileGroup
            What they come from.
        """
        for some in batches(tasks, max(1, self.batch_size)):
            yield from self.process_batch(some)

    def finish(self, context: RunContext, finished: Sequence[GroupRecord]) -> dict[str, Any]:
        """Do what can be done only when all groups are done; called on the client.

        Parameters
        ----------
        finished : sequence of GroupRecord
            Of the groups that are done, in their order.

        Returns
        -------
        dict
            What the results should say of it.
        """
        return {}

    # Final -----------------------------------------------------------------------------------------------------------

    def with_(
        self, name: str | None = None, resources: Resources | None = None, batch_size: int | None = None
    ) -> ProcessingStage[X, Y]:
        """Return a copy of the stage with other settings."""
        changed = copy.copy(self)
        for attribute, value in (("name", name), ("resources", resources), ("batch_size", batch_size)):
            if value is not None:
                setattr(changed, attribute, value)
        return changed

    def log_metric(self, name: str, value: float = 1) -> None:
        """Add to a number that the run's results say of this stage."""
        metrics = _metrics.get()
        if metrics is not None:
            metrics[self.name][name] += value  # type: ignore[assignment]

    @classmethod
    def task_types(cls) -> tuple[Any, Any]:
        """Return X and Y as the class was declared with; None where it does not say."""
        for owner in cls.__mro__:
            for base in getattr(owner, "__orig_bases__", ()):
                args = get_args(base)
                if len(args) == 2 and not any(isinstance(one, TypeVar) for one in args):
                    return args[0], args[1]
        return None, None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


class CompositeStage(ProcessingStage[X, Y]):
    """A stage made of others, which take its place when the pipeline is built."""

    def decompose(self) -> list[ProcessingStage[Any, Any]]:
        """Return the stages, none of them composite."""
        raise NotImplementedError(f"{type(self).__name__} must override decompose()")


@contextlib.contextmanager
def collecting_metrics() -> Iterator[Metrics]:
    """Collect what stages log inside the ``with`` block, by their names."""
    metrics: Metrics = defaultdict(Counter)
    token = _metrics.set(metrics)
    try:
        yield metrics
    finally:
        _metrics.reset(token)


def batches(tasks: Iterable[X], size: int) -> Iterator[list[X]]:
    """Cut tasks into lists of `size`, drawing no more of them than are asked for."""
    rest = iter(tasks)
    while some := list(islice(rest, size)):
        yield some
