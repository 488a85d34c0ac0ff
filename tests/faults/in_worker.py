"""Preloaded by Dask workers: the fault strikes in a worker process.

See https://distributed.dask.org/en/stable/customize-initialization.html
"""

from __future__ import annotations

import json
import os
from typing import Any

from tests.faults.points import Fault, Trap, install
from tests.faults.runner import cut_small, write_often


def dask_setup(worker: Any) -> None:
    """Install the patches; called by Dask with the worker that starts."""
    wanted = json.loads(os.environ["NEMO_IMAGE_TEST_FAULT"])
    install(Trap(Fault(**wanted["fault"])))
    write_often()
    if wanted["row_group_rows"]:
        cut_small(wanted["row_group_rows"])
