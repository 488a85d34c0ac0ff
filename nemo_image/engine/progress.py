"""Progress of a run, with its rate and the time left: a bar in a terminal, a line that changes in a notebook, and plain
lines everywhere else.
"""

from __future__ import annotations

import html
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

logger = logging.getLogger("nemo_image")

FIRST_LINE_S, LINE_EVERY_S = 5.0, 30.0
"""Seconds until the first plain line of a run, and between the others."""

NOTEBOOK_EVERY_S = 0.5
RECENT_S, RECENT_STEPS = 120.0, 10
"""What is taken as the present pace: of the last so many seconds, or steps where those took longer."""


@dataclass(frozen=True)
class Moment:
    """How far a run is.

    Attributes
    ----------
    label, unit : str
        What is being done; what `done` and `total` count.
    done, total : int
    counts : dict of str to int
        What else was counted, such as rows.
    elapsed : float
        Seconds.
    pace : float
        Of `unit` a second, lately.
    rates : dict of str to float
        Of what else was counted, a second, since the start.
    """

    label: str
    unit: str
    done: int
    total: int
    counts: Mapping[str, int]
    elapsed: float
    pace: float
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take at the present pace; None before the first step."""
        return (self.total - self.done) / self.pace if self.done and self.pace > 0 else None

    @property
    def counted(self) -> str:
        """What else was counted, with its rate, in words."""
        return ", ".join(f"{count:,} {name} ({_rate(self.rates[name])}/s)" for name, count in self.counts.items())

    def __str__(self) -> str:
        parts = [f"{self.done:,} of {self.total:,} {self.unit}", self.counted]
        if self.done < self.total and self.left is not None:
            parts.append(f"{duration(self.left)} left")
        else:
            parts.append(f"took {duration(self.elapsed)}")
        return f"{self.label}: {'; '.join(part for part in parts if part)}"


class _Display(Protocol):
    """Where progress is seen."""

    def show(self, moment: Moment) -> None:
        """Show how far the run is, if it is time to."""

    def close(self, moment: Moment) -> None:
        """Show how the run has ended."""


class Progress:
    """Counts finished steps of a run, and shows them with rates and the time left.

    Parameters
    ----------
    label : str
        What is being done.
    total : int
        The number of steps.
    unit : str, default "shards"
        What they are.
    counts : sequence of str, default ("rows",)
        What else is counted.
    clock : callable
        Gives seconds.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "shards",
        counts: Sequence[str] = ("rows",),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.unit = unit
        self.total = total
        self.done = 0
        self.counts = dict.fromkeys(counts, 0)
        self._clock = clock
        self._started = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._started, 0)])
        self._display: _Display | None = None

    def __enter__(self) -> Progress:
        if self.total:
            self._display = _display_here(self._clock)
            self._display.show(self.moment())
        return self

    def advance(self, rows: int) -> None:
        """Count one more step with `rows` rows."""
        self.add({"rows": rows})

    def add(self, counts: Mapping[str, int]) -> None:
        """Count one more step, and what else there is to count."""
        self.done += 1
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self._recent.append((self._clock(), self.done))
        while len(self._recent) > RECENT_STEPS and self._recent[-1][0] - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        if self._display is not None:
            self._display.show(self.moment())

    def moment(self) -> Moment:
        """Return how far the run is now."""
        now = self._clock()
        elapsed = max(now - self._started, 1e-9)
        since, before = self._recent[0]
        pace = (self.done - before) / max(now - since, 1e-9)
        rates = {name: count / elapsed for name, count in self.counts.items()}
        return Moment(self.label, self.unit, self.done, self.total, dict(self.counts), elapsed, pace, rates)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close(self.moment())


def duration(seconds: float) -> str:
    """Return a span of time for people: ``"7 s"``, ``"4:05 min"``, ``"3:10 h"``, ``"2 d 5 h"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:,.2g}"


# Where it is seen ----------------------------------------------------------------------------------------------------


def _display_here(clock: Callable[[], float]) -> _Display:
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            return _Terminal(console)
    if _in_notebook():
        return _Notebook(clock)
    return _Lines(clock)


def _in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this: nothing is imported for it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class _Terminal:
    """A bar, with a line below for each thing counted if there are several."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=console)
        self._rows: list[Any] = []
        self._bars.start()

    def show(self, moment: Moment) -> None:
        lines = self._lines(moment)
        for place, (name, said) in enumerate(lines):
            if place == len(self._rows):
                self._rows.append(self._bars.add_task(name, total=None if place else moment.total, said=""))
            # Square brackets would be rich's markup.
            completed = 0 if place else moment.done
            self._bars.update(self._rows[place], description=_escaped(name), completed=completed, said=_escaped(said))

    def _lines(self, moment: Moment) -> list[tuple[str, str]]:
        done = f"{moment.done:,}/{moment.total:,} {moment.unit}"
        left = "" if moment.left is None or moment.done >= moment.total else f"  {duration(moment.left)} left"
        if len(moment.counts) <= 1:
            return [(moment.label, "  ".join(one for one in (done, moment.counted) if one) + left)]
        rows = [(f"  {name}", f"{n:,} ({_rate(moment.rates[name])}/s)") for name, n in moment.counts.items()]
        return [(moment.label, done + left), *rows]

    def close(self, moment: Moment) -> None:
        self.show(moment)
        self._bars.stop()


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class _Notebook:
    """One output that changes in its place."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._shown = -1.0
        self._handle: Any = None

    def show(self, moment: Moment) -> None:
        if self._shown < 0 or self._clock() - self._shown >= NOTEBOOK_EVERY_S:
            self._put(moment)

    def close(self, moment: Moment) -> None:
        self._put(moment)

    def _put(self, moment: Moment) -> None:
        from IPython.display import display

        self._shown = self._clock()
        share = 100 * moment.done / moment.total
        bar = (
            f'<progress value="{moment.done}" max="{moment.total}" aria-label="{html.escape(moment.label)}" '
            f'style="width:min(100%,28em);vertical-align:middle">{share:.0f}%</progress>'
        )
        bundle = {"text/plain": str(moment), "text/html": f"<div>{bar}<br>{html.escape(str(moment))}</div>"}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)


class _Lines:
    """A line now and then: in the log if it is listened to, else on the error output, where short runs say nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = clock() + FIRST_LINE_S
        self._said = -1

    def show(self, moment: Moment) -> None:
        if self._clock() >= self._next or moment.done == moment.total:
            self._put(moment)

    def close(self, moment: Moment) -> None:
        if moment.done != self._said:
            self._put(moment)

    def _put(self, moment: Moment) -> None:
        self._next = self._clock() + LINE_EVERY_S
        self._said = moment.done
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info("%s", moment)
        elif moment.elapsed >= FIRST_LINE_S:
            print(moment, file=sys.stderr, flush=True)
