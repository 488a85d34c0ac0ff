"""Progress of a pipeline: groups done, and for each stage how many images an hour of work brings."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from nemo_image.engine.progress import LOG_EVERY_S
from nemo_image.stages.record import GroupRecord

logger = logging.getLogger("nemo_image")


class PipelineProgress:
    """Counts finished groups, and what came out of each stage with its rate.

    A bar a stage where there is a terminal, plain log lines where there is none.

    Parameters
    ----------
    label : str
        The pipeline's name.
    stages : sequence of str
        Their names.
    total : int
        The number of groups.
    """

    def __init__(self, label: str, stages: Sequence[str], total: int) -> None:
        self.label = label
        self.total = total
        self.groups = 0
        self.items = dict.fromkeys(stages, 0)
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        self._rows: dict[str, Any] = {}

    def __enter__(self) -> PipelineProgress:
        if self.total and sys.stderr.isatty():
            self._bar = _make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, said="")
            self._rows = {name: self._bar.add_task(f"  {name}", total=None, said="") for name in self.items}
        return self

    def advance(self, record: GroupRecord) -> None:
        """Count one more group."""
        self.groups += 1
        for stage in record.stages if record.status == "done" else ():
            self.items[stage.name] = self.items.get(stage.name, 0) + stage.items_out
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, said=f"{self.groups:,} of {self.total:,} groups")
            for name, row in self._rows.items():
                self._bar.update(row, said=f"{self.items[name]:,} out, {self.items[name] / elapsed:,.1f}/s")
        elif now - self._logged >= LOG_EVERY_S or self.groups == self.total:
            self._logged = now
            said = ", ".join(f"{name} {count:,} ({count / elapsed:,.1f}/s)" for name, count in self.items.items())
            left = elapsed / self.groups * (self.total - self.groups)
            logger.info("%s: %d of %d groups; %s; %.0f s left", self.label, self.groups, self.total, said, left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
