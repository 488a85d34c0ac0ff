"""Start or join a Dask cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from nemo_image.engine.threads import cpu_count
from nemo_image.errors import ArgumentError, ClusterError, MissingDependencyError

WORKERS_TIMEOUT_S = 60.0

_GPU_ONLY = {
    "nvlink_only": False,
    "rmm_pool_size": "1024M",
    "set_torch_to_use_rmm": False,
    "rmm_maximum_pool_size": None,
    "rmm_managed_memory": False,
    "rmm_release_threshold": None,
    "rmm_async": True,
    "enable_spilling": True,
}
"""Settings of a `LocalCUDACluster` with their defaults: elsewhere they would do nothing, and are refused."""


def get_client(
    cluster_type: Literal["cpu", "gpu"] = "cpu",
    scheduler_address: str | None = None,
    scheduler_file: str | os.PathLike[str] | None = None,
    n_workers: int | None = None,
    threads_per_worker: int | None = None,
    nvlink_only: bool = False,
    protocol: str = "tcp",
    rmm_pool_size: str | None = "1024M",
    enable_spilling: bool = True,
    set_torch_to_use_rmm: bool = False,
    rmm_async: bool = True,
    rmm_maximum_pool_size: str | None = None,
    rmm_managed_memory: bool = False,
    rmm_release_threshold: str | None = None,
    **cluster_kwargs: Any,
) -> Any:
    """Start a local cluster, or join a running scheduler; return the Dask client.

    Parameters
    ----------
    cluster_type : {"cpu", "gpu"}
        A ``LocalCluster``, or a ``LocalCUDACluster`` with one process a GPU.
    scheduler_address : str, optional
        Join the scheduler at this address, such as ``"tcp://node1:8786"``.
    scheduler_file : str or path, optional
        Join the scheduler that wrote this file.
    n_workers : int, optional
        Worker processes. On the CPU, Dask's choice for the machine: few processes of several threads, because each
        process holds its own copy of the model. On GPUs, one a GPU.
    threads_per_worker : int, optional
        Tasks that a worker runs at the same time: on the CPU the cores divided by the workers, on a GPU 1.
    nvlink_only, rmm_pool_size, set_torch_to_use_rmm, rmm_async, rmm_maximum_pool_size, rmm_managed_memory, \
rmm_release_threshold
        Settings of a ``LocalCUDACluster`` (``nvlink_only`` means UCX over NVLink); sizes such as ``"1024M"``.
    protocol : str, default "tcp"
        The protocol between the processes.
    enable_spilling : bool, default True
        Let cuDF move data from GPU to host memory when memory is short. GPU clusters only.
    **cluster_kwargs
        Passed to the cluster; when joining a scheduler, to the client (``security=`` for TLS, say).

    Raises
    ------
    ArgumentError
        If an address and a file are given together, or an argument is out of range.
    ClusterError
        If the scheduler cannot be reached, has no workers within a minute, or there is no GPU.
    MissingDependencyError
        If ``cluster_type="gpu"`` and dask-cuda is not installed.

    Examples
    --------
    >>> from nemo_image import get_client
    >>> client = get_client("cpu", n_workers=2)  # doctest: +SKIP
    """
    if cluster_type not in ("cpu", "gpu"):
        raise ArgumentError(f"cluster_type must be 'cpu' or 'gpu', not {cluster_type!r}")
    for name, value in (("n_workers", n_workers), ("threads_per_worker", threads_per_worker)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, not {value}")
    gpu_settings: dict[str, Any] = {
        "nvlink_only": nvlink_only,
        "rmm_pool_size": rmm_pool_size,
        "set_torch_to_use_rmm": set_torch_to_use_rmm,
        "rmm_maximum_pool_size": rmm_maximum_pool_size,
        "rmm_managed_memory": rmm_managed_memory,
        "rmm_release_threshold": rmm_release_threshold,
        "rmm_async": rmm_async,
        "enable_spilling": enable_spilling,
    }
    changed = [name for name, default in _GPU_ONLY.items() if gpu_settings[name] != default]
    if scheduler_address is not None or scheduler_file is not None:
        given = {"n_workers": n_workers, "threads_per_worker": threads_per_worker}
        changed += [name for name, value in given.items() if value is not None]
        changed += ["protocol"] if protocol != "tcp" else []
        if changed:
            raise ArgumentError(
                f"{changed[0]} is a setting of a cluster that is started here; a running one was started with its own: "
                "give it to its scheduler and workers"
            )
        return _join(scheduler_address, scheduler_file, cluster_kwargs)
    if cluster_type == "gpu":
        gpu_settings["enable_cudf_spill"] = gpu_settings.pop("enable_spilling")
        return _start_gpu(n_workers, threads_per_worker or 1, protocol, gpu_settings, cluster_kwargs)
    if changed:
        raise ArgumentError(f"{changed[0]} is a setting of GPU clusters: leave it out, or give cluster_type='gpu'")
    return _start_cpu(n_workers, threads_per_worker, protocol, cluster_kwargs)


def get_num_workers(client: Any) -> int:
    """Return the number of worker processes that a client's cluster has now."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _start_cpu(
    n_workers: int | None, threads_per_worker: int | None, protocol: str, cluster_kwargs: Mapping[str, Any]
) -> Any:
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster
    from distributed.deploy.utils import nprocesses_nthreads

    cores = min(CPU_COUNT, cpu_count())
    if n_workers is None and threads_per_worker is None:
        n_workers, threads_per_worker = nprocesses_nthreads(cores)
    elif threads_per_worker is None:
        threads_per_worker = max(1, cores // (n_workers or 1))
    elif n_workers is None:
        n_workers = max(1, cores // threads_per_worker)
    kwargs = dict(cluster_kwargs)
    # A lone worker with fewer threads than cores may use the rest for decoding and torch.
    share = max(1, cores // (n_workers or 1))
    kwargs["env"] = {"NEMO_IMAGE_CPUS_PER_WORKER": str(share), **kwargs.get("env", {})}
    kwargs.setdefault("dashboard_address", ":0")
    if not kwargs.get("processes", True):
        del kwargs["env"]
    cluster = LocalCluster(n_workers=n_workers, threads_per_worker=threads_per_worker, protocol=protocol, **kwargs)
    return _ready(Client(cluster))


def _start_gpu(
    n_workers: int | None,
    threads_per_worker: int,
    protocol: str,
    settings: dict[str, Any],
    cluster_kwargs: Mapping[str, Any],
) -> Any:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingDependencyError(
            f"dask-cuda cannot be imported ({error}): pip install 'nemo-image[image_cuda12]' (or [image_cuda13]), "
            "or give "
            "cluster_type='cpu'"
        ) from error
    from distributed import Client

    kwargs: dict[str, Any] = dict(cluster_kwargs)
    if settings.pop("nvlink_only"):
        protocol = "ucx"
        kwargs |= {"enable_nvlink": True, "enable_tcp_over_ucx": False, "enable_infiniband": False}
    to_torch = settings.pop("set_torch_to_use_rmm")
    try:
        cluster = LocalCUDACluster(
            n_workers=n_workers, threads_per_worker=threads_per_worker, protocol=protocol, **settings, **kwargs
        )
    except Exception as error:
        # NVML and CUDA raise errors of their own where there is no GPU or no driver.
        raise ClusterError(
            f"no GPU cluster can be started here ({type(error).__name__}: {error}): check nvidia-smi, or give "
            "cluster_type='cpu'"
        ) from error
    client = _ready(Client(cluster))
    if to_torch:
        client.run(_let_torch_use_rmm)
    return client


def _let_torch_use_rmm() -> None:
    import torch
    from rmm.allocators.torch import rmm_torch_allocator

    torch.cuda.memory.change_current_allocator(rmm_torch_allocator)


def _join(
    address: str | None,
    file: str | os.PathLike[str] | None,
    client_kwargs: Mapping[str, Any],
) -> Any:
    from distributed import Client

    if address is not None and file is not None:
        raise ArgumentError("give scheduler_address or scheduler_file, not both")
    if file is not None and not os.path.exists(file):
        raise ClusterError(
            f"scheduler_file {os.fspath(file)!r} does not exist: start the scheduler with --scheduler-file"
        )
    where = {"address": address} if address is not None else {"scheduler_file": os.fspath(file or "")}
    try:
        client = Client(**where, **{"timeout": WORKERS_TIMEOUT_S, **client_kwargs})
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no scheduler answers at {address or file} ({error})") from error
    return _ready(client)


def _ready(client: Any) -> Any:
    """Wait for the first worker, and let every worker know our dtypes before it unpickles a frame."""
    try:
        client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
    except TimeoutError as error:
        client.close()
        raise ClusterError(
            f"the scheduler has no worker after {WORKERS_TIMEOUT_S:.0f} s: start workers, and see their logs"
        ) from error
    client.register_plugin(_make_plugin())
    return client


def _make_plugin() -> Any:
    from distributed import WorkerPlugin

    class RegisterDtypes(WorkerPlugin):
        """Imports our pandas dtypes in every worker, those that join later too."""

        name = "nemo-image-dtypes"

        def setup(self, worker: Any) -> None:
            import nemo_image.schema  # noqa: F401

    return RegisterDtypes()
