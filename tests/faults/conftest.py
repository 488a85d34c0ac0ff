"""Fixtures of the fault tests, and the table of what the user saw.

``NEMO_IMAGE_FAULT_TABLE=faults.md python -m pytest tests/faults`` writes the table.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.table import FaultTable
from tests.faults.warm_runs import WarmRuns

MEMORY = "/dev/shm"
"""Where a sync costs nothing: what a killed process leaves is the same on every file system."""


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """Give a folder in memory, where there is one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(memory: Path) -> Iterator[Path]:
    """Give each test a folder in memory, which is removed at once."""
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def runs(memory: Path) -> Iterator[WarmRuns]:
    """Start jobs in processes of their own."""
    folder = memory / "runs"
    folder.mkdir()
    started = WarmRuns(folder)
    yield started
    started.close()


@pytest.fixture(scope="session")
def table() -> Iterator[FaultTable]:
    """Collect each fault and what the user saw."""
    collected = FaultTable()
    yield collected
    target = os.environ.get("NEMO_IMAGE_FAULT_TABLE")
    if target:
        Path(target).write_text(collected.markdown(), encoding="utf-8")
