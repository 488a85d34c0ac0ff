"""Starting and joining clusters, and what is refused."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import pytest

from nemo_image import get_client, get_num_workers
from nemo_image.engine.threads import cpu_count, task_share
from nemo_image.errors import ArgumentError, MissingDependencyError


def shares() -> tuple[int, bool]:
    return task_share(), "nemo_image.schema" in sys.modules


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_cpu_cluster_shares_the_cores() -> None:
    with get_client("cpu", n_workers=2, threads_per_worker=1) as client:
        assert get_num_workers(client) == 2
        futures = [client.submit(shares, pure=False, workers=[one]) for one in client.scheduler_info()["workers"]]
        found = client.gather(futures)
        assert [share for share, _ in found] == [max(1, cpu_count() // 2)] * 2
        assert all(known for _, known in found)


@pytest.mark.parametrize("how", ["with", "with an error", "close"])
def test_closing_ends_the_processes(how: str) -> None:
    client = get_client("cpu", n_workers=2, threads_per_worker=1)
    pids = list(client.run(os.getpid).values())
    assert len(set(pids) - {os.getpid()}) == 2
    assert all(alive(pid) for pid in pids)
    if how == "close":
        client.close()
    elif how == "with":
        with client:
            pass
    else:
        with pytest.raises(KeyError), client:
            raise KeyError
    assert client.status == "closed"
    assert not any(alive(pid) for pid in pids)


def test_on_python_3_11_nothing_looks_at_frames_while_garbage_is_collected() -> None:
    """Workers would hang for ever, once in some hours: so there is no profile of them on the dashboard."""

    def callbacks(dask_worker: Any) -> set[str]:
        return set(dask_worker.periodic_callbacks)

    with get_client("cpu", n_workers=1) as client:
        client.cluster.scale(2)  # one that comes later is made ready too
        client.wait_for_workers(2)
        (first, second) = client.run(callbacks).values()
        assert ("profile" in first) == ("profile" in second) == (sys.version_info >= (3, 12))
        assert "heartbeat" in first & second


def test_tls_is_one_argument() -> None:
    pytest.importorskip("cryptography", reason="makes certificates")
    with get_client("cpu", n_workers=1, security=True) as client:
        addresses = [client.scheduler.address, *client.scheduler_info()["workers"]]
        assert [address.partition("://")[0] for address in addresses] == ["tls", "tls"]
        assert client.submit(sum, [1, 2]).result() == 3


def test_tls_without_what_makes_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingDependencyError, match="pip install cryptography"):
        get_client("cpu", n_workers=1, security=True)


def test_the_log_names_the_dashboard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nemo_image")
    with get_client("cpu", n_workers=1) as client:
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        assert client.dashboard_link in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cluster_type": "tpu"}, "cluster_type"),
        ({"n_workers": 0}, "n_workers"),
        ({"threads_per_worker": 0}, "threads_per_worker"),
        ({"scheduler_address": "tcp://x:1", "scheduler_file": "x"}, "not both"),
        ({"scheduler_address": "tcp://x:1", "threads_per_worker": 2}, "threads_per_worker"),
        ({"scheduler_address": "tcp://x:1", "security": True}, "new certificates"),
        ({"asynchronous": True}, "asynchronous"),
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
