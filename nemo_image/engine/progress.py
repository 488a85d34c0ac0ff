"""Progress of a run: a bar where there is a terminal, plain log lines where there is none."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

logger = logging.getLogger("nemo_image")

LOG_EVERY_S = 30.0


class Progress:
    """Counts finished shards and rows, with rate and time left.

    Parameters
    ----------
    label : str
        What is being done.
    total : int
        The number of shards.
    unit : str, default "shards"
        What they are, if not shards.
    """

    def __init__(self, label: str, total: int, unit: str = "shards") -> None:
        self.label = label
        self.unit = unit
        self.total = total
        self.shards = 0
        self.rows = 0
        self._started = self._logged = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.total and sys.stderr.isatty():
            self._bar = _make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, rate="")
        return self

    def advance(self, rows: int) -> None:
        """Count one more shard with `rows` rows."""
        self.shards += 1
        self.rows += rows
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=f"{self.rows / elapsed:,.0f} rows/s")
        elif now - self._logged >= LOG_EVERY_S or self.shards == self.total:
            self._logged = now
            left = elapsed / self.shards * (self.total - self.shards)
            logger.info(
                "%s: %d of %d %s, %d rows, %.0f rows/s, %.0f s left",
                self.label,
                self.shards,
                self.total,
                self.unit,
                self.rows,
                self.rows / elapsed,
                left,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=Console(stderr=True))
