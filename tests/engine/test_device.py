"""Where workers compute: asked of all of them, once, on the client."""

from __future__ import annotations

import logging
from typing import Any

import dask
import pytest

from nemo_image import backend
from nemo_image.engine import device
from nemo_image.engine.device import new_frames, require_gpus, where_device_is, worker_device
from nemo_image.errors import ArgumentError, ClusterError


class Workers:
    """A client whose workers see GPUs, or not."""

    def __init__(self, **sees: bool) -> None:
        self.sees = sees
        self.submitted = 0

    def run(self, function: Any, on_error: str = "raise") -> dict[str, bool]:
        assert function is backend.sees_gpu
        return self.sees

    def submit(self, function: Any, *args: Any, pure: bool) -> Any:
        self.submitted += 1
        result = function(*args)
        return type("Future", (), {"result": lambda self: result})()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Any:
    def join(**sees: bool) -> Workers:
        found = Workers(**sees)
        monkeypatch.setattr(device, "current_client", lambda: found)
        return found

    return join


def test_all_workers_or_none(workers: Any, caplog: pytest.LogCaptureFixture) -> None:
    workers(a=True, b=True)
    assert worker_device() == "cuda"
    workers(a=False, b=False)
    assert worker_device() == "cpu"
    workers()
    assert worker_device() == "cpu"
    assert not caplog.records
    workers(a=True, b=False)
    assert worker_device() == "cpu"
    assert "but not b: all compute on their CPU" in caplog.text


def test_the_configuration_decides(workers: Any) -> None:
    workers(a=True)
    with dask.config.set({backend.BACKEND_KEY: "cpu"}):
        assert worker_device() == "cpu"
    workers(**{f"w{number}": False for number in range(5)})
    no_gpu = pytest.raises(ClusterError, match="no GPU is seen by w0, w1, w2 and 2 more")
    with dask.config.set({backend.BACKEND_KEY: "gpu"}), no_gpu:
        worker_device()
    no_such = pytest.raises(ArgumentError, match=r"nemo-image\.backend='tpu': use 'auto', 'cpu' or 'gpu'")
    with dask.config.set({backend.BACKEND_KEY: "tpu"}), no_such:
        worker_device()


def test_without_a_client_this_process_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current_client", lambda: None)
    monkeypatch.setattr(backend, "sees_gpu", lambda: True)
    assert worker_device() == "cuda"


def test_a_process_that_leaves_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.sees_gpu()
    with dask.config.set({backend.BACKEND_KEY: "cpu"}):
        assert not backend.sees_gpu()


def test_gpus_that_are_asked_for() -> None:
    require_gpus(Workers(a=True))
    with pytest.raises(
        ClusterError, match="no GPU is seen by 1 workers, the first b: start them with dask cuda worker"
    ):
        require_gpus(Workers(a=True, b=False))


def test_what_needs_a_gpu_goes_where_one_is(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = workers(a=True)
    monkeypatch.setattr(backend, "sees_gpu", lambda: False)  # a login node
    assert where_device_is("cuda", sum, [1, 2]) == 3
    assert client.submitted == 1
    assert where_device_is("cpu", sum, [1, 2]) == 3
    monkeypatch.setattr(backend, "sees_gpu", lambda: True)
    assert where_device_is("cuda", sum, [1, 2]) == 3
    assert client.submitted == 1


@pytest.mark.parametrize(
    ("cudf", "here", "there", "frames"),
    [
        (True, True, True, "cudf"),
        (False, True, True, "pandas"),
        (True, False, True, "pandas"),
        (True, True, False, "pandas"),
    ],
)
def test_frames(
    cudf: bool, here: bool, there: bool, frames: str, workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "has_cudf", lambda: cudf)
    workers(a=there)
    monkeypatch.setattr(device, "worker_device", lambda: "cuda" if there else "cpu")
    monkeypatch.setattr(backend, "sees_gpu", lambda: here)
    assert new_frames() == frames


def test_the_cluster_for_this_machine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "sees_gpu", lambda: False)
    assert device.local_cluster_type() == "cpu"
    monkeypatch.setattr(backend, "sees_gpu", lambda: True)
    found: dict[str, Any] = {"dask_cuda": None}
    monkeypatch.setattr(device.importlib.util, "find_spec", found.get)
    with caplog.at_level(logging.WARNING):
        assert device.local_cluster_type() == "cpu"
    assert "dask-cuda" in caplog.text
    found["dask_cuda"] = object()
    assert device.local_cluster_type() == "gpu"


def test_workers_of_a_cpu_cluster_leave_gpus_alone() -> None:
    from nemo_image import get_client

    with get_client("cpu", n_workers=1) as client:
        assert client.run(backend.chosen_backend) == dict.fromkeys(client.scheduler_info()["workers"], "cpu")
        address = client.scheduler.address
        with pytest.raises(ClusterError, match="no GPU is seen by 1 workers"):
            get_client("gpu", scheduler_address=address, set_as_default=False)
