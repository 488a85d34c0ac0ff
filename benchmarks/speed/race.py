"""Run the contenders of one comparison in turn, round after round, and compare them within each round."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

CHILD = Path(__file__).parent / "child.py"
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contender:
    """One of those that do the same work.

    Attributes
    ----------
    name : str
    where : str
        ``"file.py:function"`` in `contenders/`; the function sets up and returns what is timed.
    keywords : dict
        Its arguments, as JSON can hold them.
    environment : str
        The environment that it runs in: ``"project"``, or one of `environments.RIVALS`.
    """

    name: str
    where: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    environment: str = "project"


@dataclass(frozen=True)
class Rival:
    """What the first contender is asked to reach beside another.

    Attributes
    ----------
    name : str
        The other contender's, or whose the published `speed` is.
    at_least : float, optional
        The first one's speed over its speed.
    memory_at_most : float, optional
        The first one's memory, above what its process held before, over its.
    same : dict
        Facts that both say, and by which share of them they may differ.
    speed : float, optional
        Units a second that were published, or are wanted; then nobody runs beside ours.
    """

    name: str
    at_least: float | None = None
    memory_at_most: float | None = None
    same: Mapping[str, float] = field(default_factory=dict)
    speed: float | None = None


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    name : str
    what : str
        The work, in a line.
    unit : str
        What is counted.
    contenders : list of Contender
        Ours first.
    targets : list of Rival
    floor : str, optional
        The contender that does only what cannot be left out.
    floor_text : str
        What the floor consists of, and where the rest of the time goes.
    rounds : int
        Rounds that count; one before them does not.
    needs_gpu : bool
    """

    name: str
    what: str
    unit: str
    contenders: Sequence[Contender]
    targets: Sequence[Rival] = ()
    floor: str | None = None
    floor_text: str = ""
    rounds: int = 5
    needs_gpu: bool = False


@dataclass
class Measured:
    """What the rounds of one contender gave, in their order.

    Attributes
    ----------
    seconds, extra_mib : list of float
        One a round.
    count : float
        Units of work in a round.
    peak_mib : float
        Largest resident memory of the process, or of the largest of its children.
    facts : dict
        Whatever else the contender said of its last round.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    extra_mib: list[float] = field(default_factory=list)
    count: float = 0
    peak_mib: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def speeds(self) -> list[float]:
        """Units a second in each round."""
        return [self.count / one for one in self.seconds]

    def note(self, answer: dict[str, Any]) -> None:
        """Take one round's answer."""
        self.seconds.append(answer.pop("seconds"))
        self.extra_mib.append(answer.pop("extra_mib"))
        self.count = answer.pop("count")
        self.peak_mib = max(self.peak_mib, answer.pop("peak_mib"), answer.pop("largest_child_mib"))
        self.facts = answer


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured.

    Attributes
    ----------
    rival : str
    kind : str
        ``"speed"``, ``"memory"``, or ``"difference of …"`` some fact.
    wanted, value : float
        What is asked, and the median of the rounds' ratios; for a fact, the share by which the two differ.
    each : sequence of float
        The rounds' ratios.
    """

    rival: str
    kind: str
    wanted: float
    value: float
    each: Sequence[float]

    @property
    def held(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.wanted if self.kind == "speed" else self.value <= self.wanted

    def __str__(self) -> str:
        asked = f"{'at least' if self.kind == 'speed' else 'at most'} {self.wanted:g} is asked"
        return f"{self.kind} {self.value:.3f} beside {self.rival}, {asked}: {'held' if self.held else 'MISSED'}"


class Runner:
    """A contender's process."""

    def __init__(self, contender: Contender, python: str) -> None:
        self.measured = Measured(contender.name)
        paths = {"PYTHONPATH": str(PROJECT)} if contender.environment == "project" else {}
        self._process = subprocess.Popen(
            [python, str(CHILD), contender.where, json.dumps(dict(contender.keywords))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            env={**os.environ, **paths},
        )
        try:
            self._answer()
        except RuntimeError:
            self.close()
            raise

    def run(self, *, counts: bool) -> None:
        """Have it run once."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = json.loads(self._answer())
        if counts:
            self.measured.note(answer)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.measured.name!r} ended with status {self._process.wait()}; see above")
        return line

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Runners(list[Runner]):
    """The processes of a row, ended together."""

    def __enter__(self) -> Runners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self:
            one.close()


def run_row(row: Row, pythons: Mapping[str, str], rounds: int | None = None) -> dict[str, Measured]:
    """Run a row's contenders in turn; return what was measured, by their names.

    Parameters
    ----------
    pythons : dict
        The interpreter of each environment.
    rounds : int, optional
        The row's own number by default.
    """
    with Runners() as runners:
        for contender in row.contenders:
            runners.append(Runner(contender, pythons[contender.environment]))
        for number in range((rounds or row.rounds) + 1):
            # Each goes first as often as the others: what a neighbour leaves in the caches helps nobody in particular.
            first = number % len(runners)
            for runner in [*runners[first:], *runners[:first]]:
                runner.run(counts=number > 0)
        measured = {runner.measured.name: runner.measured for runner in runners}
    counts = {name: one.count for name, one in measured.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"row {row.name!r}: the contenders did not do the same work: {counts}")
    return measured


def verdicts(row: Row, measured: Mapping[str, Measured]) -> list[Verdict]:
    """Compare ours with each rival, within each round."""
    ours = measured[row.contenders[0].name]
    found = []
    for target in row.targets:
        if target.speed is not None and target.at_least is not None:
            each = [one / target.speed for one in ours.speeds]
            found.append(Verdict(target.name, "speed", target.at_least, median(each), each))
            continue
        theirs = measured[target.name]
        if target.at_least is not None:
            each = [one / other for one, other in zip(ours.speeds, theirs.speeds, strict=True)]
            found.append(Verdict(target.name, "speed", target.at_least, median(each), each))
        if target.memory_at_most is not None:
            each = [one / max(other, 1e-9) for one, other in zip(ours.extra_mib, theirs.extra_mib, strict=True)]
            found.append(Verdict(target.name, "memory", target.memory_at_most, median(each), each))
        for name, wanted in target.same.items():
            share = abs(ours.facts[name] / theirs.facts[name] - 1)
            found.append(Verdict(target.name, f"difference of {name}", wanted, share, [share]))
    return found
