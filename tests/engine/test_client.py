"""Starting and joining clusters, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from nemo_image import get_client, get_num_workers
from nemo_image.engine import client as client_
from nemo_image.engine.threads import cpu_count, task_share
from nemo_image.errors import ArgumentError, ClusterError, MissingDependencyError


def close(client: Any) -> None:
    local = client.cluster
    client.close()
    if local is not None:
        local.close()


def shares() -> tuple[int, bool]:
    import sys

    return task_share(), "nemo_image.schema" in sys.modules


def test_cpu_cluster_shares_the_cores() -> None:
    client = get_client("cpu", n_workers=2, threads_per_worker=1)
    try:
        assert get_num_workers(client) == 2
        futures = [client.submit(shares, pure=False, workers=[one]) for one in client.scheduler_info()["workers"]]
        found = client.gather(futures)
        assert [share for share, _ in found] == [max(1, cpu_count() // 2)] * 2
        assert all(known for _, known in found)
    finally:
        close(client)


def test_join_by_file_and_by_address(tmp_path: Path, cluster: Any) -> None:
    import json

    address = cluster.scheduler_info()["address"]
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}))
    for where in ({"scheduler_address": address}, {"scheduler_file": file}):
        client = get_client(**where, set_as_default=False)
        try:
            assert get_num_workers(client) == 2
        finally:
            client.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cluster_type": "tpu"}, "cluster_type"),
        ({"n_workers": 0}, "n_workers"),
        ({"threads_per_worker": 0}, "threads_per_worker"),
        ({"scheduler_address": "tcp://x:1", "scheduler_file": "x"}, "not both"),
        ({"scheduler_address": "tcp://x:1", "n_workers": 2}, "n_workers"),
        ({"rmm_pool_size": "2G"}, "rmm_pool_size"),
        ({"nvlink_only": True}, "nvlink_only"),
        ({"rmm_async": False}, "rmm_async"),
        ({"enable_spilling": False}, "enable_spilling"),
        ({"scheduler_file": "x", "rmm_pool_size": "2G", "cluster_type": "gpu"}, "rmm_pool_size"),
        ({"scheduler_file": "x", "protocol": "ucx"}, "protocol"),
    ],
)
def test_unusable_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        get_client(**arguments)


def test_scheduler_file_that_is_not_there() -> None:
    with pytest.raises(ClusterError, match=r"nothere\.json"):
        get_client(scheduler_file="nothere.json")


def test_scheduler_that_does_not_answer() -> None:
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1"):
        get_client(scheduler_address="tcp://127.0.0.1:1", timeout=1)


def test_scheduler_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(client_, "WORKERS_TIMEOUT_S", 1.0)
    with LocalCluster(n_workers=0, dashboard_address=":0") as local, pytest.raises(ClusterError, match="no worker"):
        get_client(scheduler_address=local.scheduler_address)


@pytest.mark.skipif(importlib.util.find_spec("dask_cuda") is not None, reason="dask-cuda is installed")
def test_gpu_cluster_without_dask_cuda() -> None:
    with pytest.raises(MissingDependencyError, match="pip install"):
        get_client("gpu")
