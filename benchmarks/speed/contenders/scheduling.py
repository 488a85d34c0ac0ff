"""Tasks without work on a cluster of two processes: ours, as a save sends them, and Dask's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _cluster() -> Any:
    from nemo_image import get_client

    return get_client("cpu", n_workers=2, threads_per_worker=1, dashboard_address=None)


def ours(folder: str, count: int) -> Any:
    """The tasks of a save with a score to compute, each with its shard's rows and a record to return."""
    from benchmarks.many_shards import no_work

    client = _cluster()

    def run() -> dict[str, Any]:
        with client.as_current():
            return {"count": no_work(Path(folder), count)}

    return run


def bare_map(folder: str, count: int) -> Any:
    """One call of ``client.map`` with numbers, one of ``gather``."""
    client = _cluster()

    def run() -> dict[str, Any]:
        return {"count": len(client.gather(client.map(bool, range(count), pure=False)))}

    return run
