"""What a cluster of GPUs is started with; where there is no GPU, through a stand-in for dask-cuda."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nemo_image import get_client, get_num_workers
from nemo_image.engine import client as client_
from nemo_image.engine.threads import cpu_count, task_share
from nemo_image.errors import ArgumentError, ClusterError, MissingDependencyError

PARTS = ("dask_cuda", "cudf", "rmm", "distributed_ucxx")


def stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


@pytest.fixture
def dask_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Have stand-ins for RAPIDS."""
    for name in PARTS:
        monkeypatch.setitem(sys.modules, name, stand_in(name))
    return sys.modules["dask_cuda"]


@pytest.fixture
def given(dask_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments that a stand-in for `LocalCUDACluster` was called with, which starts nothing."""
    calls: list[dict[str, Any]] = []

    def local_cuda_cluster(**settings: Any) -> Any:
        calls.append(settings)
        return SimpleNamespace(workers={})

    monkeypatch.setattr(dask_cuda, "LocalCUDACluster", local_cuda_cluster, raising=False)
    monkeypatch.setattr(client_, "_own", lambda cluster, environment: cluster)
    monkeypatch.setattr(client_, "_log_start", lambda client: None)
    return calls


@pytest.fixture
def started(dask_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The same, with a stand-in that starts processes without GPUs."""
    from distributed import LocalCluster

    calls: list[dict[str, Any]] = []

    def local_cuda_cluster(**settings: Any) -> Any:
        calls.append(settings)
        names = ("threads_per_worker", "protocol", "dashboard_address", "security")
        return LocalCluster(n_workers=settings["n_workers"] or 2, **{name: settings.get(name) for name in names})

    monkeypatch.setattr(dask_cuda, "LocalCUDACluster", local_cuda_cluster, raising=False)
    return calls


def cpus_per_worker() -> str:
    return os.environ["NEMO_IMAGE_CPUS_PER_WORKER"]


def test_defaults(started: list[dict[str, Any]]) -> None:
    with get_client("gpu") as client:
        assert get_num_workers(client) == 2
        # A worker that came later, or again, knows its share of the cores too.
        share = str(max(1, cpu_count() // 2))
        assert set(client.run(cpus_per_worker).values()) == {share}
        assert client.submit(task_share).result() == int(share)
    assert started == [
        {
            "n_workers": None,
            "threads_per_worker": 1,
            "protocol": "tcp",
            "rmm_pool_size": None,
            "rmm_maximum_pool_size": None,
            "rmm_managed_memory": False,
            "rmm_release_threshold": None,
            "rmm_async": True,
            "enable_cudf_spill": True,
            "dashboard_address": ":0",
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ({"rmm_pool_size": "2G"}, {"rmm_pool_size": "2G", "rmm_async": True}),
        ({"rmm_async": False}, {"rmm_pool_size": "1024M", "rmm_async": False}),
        ({"rmm_async": False, "rmm_maximum_pool_size": "8G"}, {"rmm_maximum_pool_size": "8G"}),
        (
            {"rmm_async": False, "rmm_managed_memory": True, "rmm_pool_size": None},
            {"rmm_managed_memory": True, "rmm_pool_size": None},
        ),
        ({"rmm_release_threshold": "1G"}, {"rmm_release_threshold": "1G"}),
        ({"enable_spilling": False}, {"enable_cudf_spill": False}),
        ({"set_torch_to_use_rmm": True}, {"rmm_allocator_external_lib_list": ["torch"]}),
        (
            {"nvlink_only": True},
            {"protocol": "ucx", "enable_nvlink": True, "enable_tcp_over_ucx": True, "enable_infiniband": False},
        ),
        ({"protocol": "ucx", "enable_infiniband": True}, {"protocol": "ucx", "enable_infiniband": True}),
        ({"n_workers": 1, "threads_per_worker": 2}, {"n_workers": 1, "threads_per_worker": 2}),
        ({"device_memory_limit": 0.5}, {"device_memory_limit": 0.5}),
        ({"dashboard_address": ":8787"}, {"dashboard_address": ":8787"}),
    ],
)
def test_settings_reach_dask_cuda(
    given: list[dict[str, Any]], arguments: dict[str, Any], passed: dict[str, Any]
) -> None:
    get_client("gpu", **arguments)
    assert {name: given[0][name] for name in passed} == passed


def test_tls_on_gpus(started: list[dict[str, Any]]) -> None:
    pytest.importorskip("cryptography", reason="makes certificates")
    with get_client("gpu", n_workers=1, security=True) as client:
        assert client.scheduler.address.startswith("tls://")
    assert started[0]["protocol"] == "tls"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rmm_managed_memory": True}, "rmm_managed_memory needs rmm_async=False"),
        ({"rmm_async": False, "rmm_release_threshold": "1G"}, "rmm_release_threshold needs rmm_async=True"),
        ({"rmm_async": False, "rmm_pool_size": None, "rmm_maximum_pool_size": "8G"}, "needs an rmm_pool_size"),
        ({"nvlink_only": True, "protocol": "tls"}, "nvlink_only means protocol='ucx'"),
        ({"nvlink_only": True, "security": True}, "cannot be encrypted"),
        ({"protocol": "ucx", "security": True}, "cannot be encrypted"),
        ({"nvlink_only": True, "enable_infiniband": True}, "enable_infiniband"),
        ({"env": {"A": "1"}}, "env: "),
    ],
)
def test_settings_that_contradict_each_other(given: list[dict[str, Any]], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        get_client("gpu", **arguments)
    assert not given


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("dask_cuda", {}),
        ("cudf", {}),
        ("rmm", {"enable_spilling": False}),
        ("distributed_ucxx", {"protocol": "ucx"}),
    ],
)
def test_a_part_of_rapids_that_is_missing(
    given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, missing: str, arguments: dict[str, Any]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(MissingDependencyError, match=rf"{missing}.*pip install 'nemo-image\[image_cuda12\]'"):
        get_client("gpu", **arguments)
    assert not given


def test_what_is_not_asked_for_need_not_be_there(given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = ("cudf", "rmm", "distributed_ucxx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    get_client("gpu", n_workers=1, enable_spilling=False, rmm_async=False, rmm_pool_size=None)
    assert len(given) == 1


def test_no_gpu(given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: Any) -> Any:
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setattr(sys.modules["dask_cuda"], "LocalCUDACluster", fail, raising=False)
    with pytest.raises(ClusterError, match=r"no GPU cluster.*NVML Shared Library Not Found\): check nvidia-smi"):
        get_client("gpu")


@pytest.mark.skipif(importlib.util.find_spec("dask_cuda") is not None, reason="dask-cuda is installed")
def test_without_dask_cuda() -> None:
    with pytest.raises(MissingDependencyError, match="pip install"):
        get_client("gpu")


def test_dask_cuda_has_these_arguments() -> None:
    """The stand-in takes what the real one takes; dask-cuda imports without a GPU."""
    dask_cuda = pytest.importorskip("dask_cuda", reason="needs dask-cuda, of the extra 'image_cuda12'")
    known = inspect.signature(dask_cuda.LocalCUDACluster).parameters
    ours = {
        "n_workers", "threads_per_worker", "protocol", "enable_cudf_spill", "enable_nvlink", "enable_tcp_over_ucx",
        "enable_infiniband", "rmm_pool_size", "rmm_maximum_pool_size", "rmm_managed_memory", "rmm_release_threshold",
        "rmm_async", "rmm_allocator_external_lib_list",
    }  # fmt: skip
    assert ours <= known.keys()
    plugins = pytest.importorskip("dask_cuda.plugins")
    assert callable(plugins._setup_rmm_for_torch)


@pytest.mark.gpu
def test_a_real_gpu_cluster() -> None:
    pytest.importorskip("dask_cuda", reason="needs dask-cuda, of the extra 'image_cuda12'")

    def allocators() -> tuple[str, str]:
        import rmm
        import torch

        torch.ones(1, device="cuda")
        return type(rmm.mr.get_current_device_resource()).__name__, torch.cuda.get_allocator_backend()

    with get_client("gpu", set_torch_to_use_rmm=True, rmm_release_threshold="1G") as client:
        for resource, backend in client.run(allocators).values():
            assert "Async" in resource
            assert backend == "pluggable"
