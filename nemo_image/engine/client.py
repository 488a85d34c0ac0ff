"""Start or join a Dask cluster."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from nemo_image.engine import join
from nemo_image.engine.device import require_gpus
from nemo_image.engine.threads import cpu_count
from nemo_image.errors import ArgumentError, ClusterError, MissingDependencyError

logger = logging.getLogger("nemo_image")

RMM_POOL_SIZE = "1024M"
BACKEND_VARIABLE = "DASK_NEMO_IMAGE__BACKEND"
"""Environment variable from which Dask takes the configuration ``nemo-image.backend``."""

GPU_EXTRA = "pip install 'nemo-image[image_cuda12]' (or [image_cuda13])"

_GPU_ONLY = {
    "nvlink_only": False,
    "rmm_pool_size": RMM_POOL_SIZE,
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
    rmm_pool_size: str | None = RMM_POOL_SIZE,
    enable_spilling: bool = True,
    set_torch_to_use_rmm: bool = False,
    rmm_async: bool = True,
    rmm_maximum_pool_size: str | None = None,
    rmm_managed_memory: bool = False,
    rmm_release_threshold: str | None = None,
    **cluster_kwargs: Any,
) -> Any:
    """Start a local cluster, or join a running scheduler; return the Dask client.

    The client is a context manager. Closing it, or leaving its ``with`` block, ends the processes of a cluster that was
    started here; a scheduler that was joined goes on. The log names the dashboard's address.

    Parameters
    ----------
    cluster_type : {"cpu", "gpu"}
        A ``LocalCluster``, whose workers leave GPUs alone, or a ``LocalCUDACluster`` with one process a GPU. When
        joining, ``"gpu"`` makes sure that every worker has one; without it, they are used where every worker has one.
    scheduler_address : str, optional
        Join the scheduler at this address, such as ``"tcp://node1:8786"``.
    scheduler_file : str or path, optional
        Join the scheduler that wrote this file. One that is still being written is waited for.
    n_workers : int, optional
        Worker processes. On the CPU, Dask's choice for the machine: few processes of several threads, because each
        process holds its own copy of the model. On GPUs, one a GPU. When joining: wait for so many, by default one.
    threads_per_worker : int, optional
        Tasks that a worker runs at the same time: on the CPU the cores divided by the workers, on a GPU 1.
    nvlink_only : bool, default False
        Move data between GPUs through UCX over NVLink, and set up connections by TCP; not over InfiniBand.
    protocol : str, default "tcp"
        The protocol between the processes; ``"ucx"`` needs distributed-ucxx. With ``security=``, ``"tls"``.
    rmm_pool_size : str, optional
        The GPU memory that a pool of RMM, the allocator of cuDF and cuML, begins with, such as ``"1024M"``. With
        `rmm_async`, whose pool grows by itself, the default is left to it, and dask-cuda warns of other values.
    enable_spilling : bool, default True
        Let cuDF move data from GPU to host memory when memory is short.
    set_torch_to_use_rmm : bool, default False
        Have torch allocate from RMM's pool too, in every worker, before it first uses its GPU.
    rmm_async : bool, default True
        Allocate with ``cudaMallocAsync``.
    rmm_maximum_pool_size : str, optional
        The most GPU memory that the pool may take.
    rmm_managed_memory : bool, default False
        Allocate CUDA's unified memory, which may exceed the GPU's; only with ``rmm_async=False``.
    rmm_release_threshold : str, optional
        What the pool keeps when it is freed; only with `rmm_async`.
    **cluster_kwargs
        Passed to the cluster, such as ``security=`` for TLS (True makes certificates for the cluster's life) or
        ``dashboard_address=":8787"``; when joining a scheduler, to the client: ``security=`` with the scheduler's
        certificates, and ``timeout=``, the seconds that scheduler and workers have to appear (60 by default).

    Raises
    ------
    ArgumentError
        If an address and a file are given together, or an argument is out of range, contradicts another, or would do
        nothing.
    ClusterError
        If the scheduler cannot be reached, has not its workers in time, runs other versions of Python, nemo_image or
        the libraries that exchange data; or there is no GPU.
    MissingDependencyError
        If ``cluster_type="gpu"`` and a part of RAPIDS is not installed.

    Examples
    --------
    >>> from nemo_image import get_client
    >>> with get_client("cpu", n_workers=2) as client:  # doctest: +SKIP
    ...     print(client.dashboard_link)
    """
    if cluster_type not in ("cpu", "gpu"):
        raise ArgumentError(f"cluster_type must be 'cpu' or 'gpu', not {cluster_type!r}")
    for name, value in (("n_workers", n_workers), ("threads_per_worker", threads_per_worker)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, not {value}")
    if cluster_kwargs.get("asynchronous"):
        raise ArgumentError("asynchronous=True: nothing here awaits; make the distributed.Client yourself")
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
        changed += ["threads_per_worker"] if threads_per_worker is not None else []
        changed += ["protocol"] if protocol != "tcp" else []
        if changed:
            raise ArgumentError(
                f"{changed[0]} is a setting of a cluster that is started here; a running one was started with its own: "
                "give it to its scheduler and workers"
            )
        client = join.join(scheduler_address, scheduler_file, n_workers, cluster_kwargs)
        if cluster_type == "gpu":
            try:
                require_gpus(client)
            except BaseException:
                client.close()
                raise
        return client
    protocol = _protocol(protocol, nvlink_only, cluster_kwargs.get("security"))
    if cluster_type == "gpu":
        client = _start_gpu(n_workers, threads_per_worker or 1, protocol, gpu_settings, cluster_kwargs)
    elif changed:
        raise ArgumentError(f"{changed[0]} is a setting of GPU clusters: leave it out, or give cluster_type='gpu'")
    else:
        client = _start_cpu(n_workers, threads_per_worker, protocol, cluster_kwargs)
    _log_start(client)
    return client


def get_num_workers(client: Any) -> int:
    """Return the number of worker processes that a client's cluster has now."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _protocol(protocol: str, nvlink_only: bool, security: Any) -> str:
    """Return the protocol that the arguments mean together."""
    if nvlink_only and protocol not in ("tcp", "ucx", "ucxx"):
        raise ArgumentError(f"nvlink_only means protocol='ucx', not {protocol!r}")
    protocol = "ucx" if nvlink_only and protocol == "tcp" else protocol
    encrypted = security is True or bool(getattr(security, "require_encryption", False))
    if encrypted and protocol.startswith("ucx"):
        raise ArgumentError(f"security: {protocol} cannot be encrypted; use protocol='tls', without nvlink_only")
    return "tls" if encrypted and protocol == "tcp" else protocol


def _start_cpu(
    n_workers: int | None, threads_per_worker: int | None, protocol: str, cluster_kwargs: Mapping[str, Any]
) -> Any:
    from dask.system import CPU_COUNT
    from distributed import LocalCluster
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
    kwargs["env"] = {join.CPUS_PER_WORKER: str(share), BACKEND_VARIABLE: "cpu", **kwargs.get("env", {})}
    kwargs.setdefault("dashboard_address", ":0")
    if not kwargs.get("processes", True):
        del kwargs["env"]
    if kwargs.get("security") is True:
        kwargs["security"] = _new_certificates()
    cluster = LocalCluster(n_workers=n_workers, threads_per_worker=threads_per_worker, protocol=protocol, **kwargs)
    return _own(cluster)


def _start_gpu(
    n_workers: int | None,
    threads_per_worker: int,
    protocol: str,
    settings: dict[str, Any],
    cluster_kwargs: Mapping[str, Any],
) -> Any:
    kwargs = {**cluster_kwargs, **_rmm_settings(settings)}
    if "env" in kwargs:
        raise ArgumentError(
            "env: dask-cuda gives its workers this process's environment: set the variables here, before"
        )
    if settings["nvlink_only"]:
        if kwargs.get("enable_infiniband"):
            raise ArgumentError("enable_infiniband contradicts nvlink_only: give protocol='ucx' with both instead")
        kwargs |= {"enable_nvlink": True, "enable_tcp_over_ucx": True, "enable_infiniband": False}
    kwargs |= {"enable_cudf_spill": settings["enable_spilling"], "protocol": protocol}
    kwargs.setdefault("dashboard_address", ":0")
    _require_rapids(protocol, cudf=settings["enable_spilling"], rmm=bool(_uses_rmm(kwargs)))
    if kwargs.get("security") is True:
        kwargs["security"] = _new_certificates()
    from dask_cuda import LocalCUDACluster

    try:
        cluster = LocalCUDACluster(n_workers=n_workers, threads_per_worker=threads_per_worker, **kwargs)
    except Exception as error:
        # NVML and CUDA raise errors of their own where there is no GPU or no driver.
        raise ClusterError(
            f"no GPU cluster can be started here ({type(error).__name__}: {error}): check nvidia-smi, or give "
            "cluster_type='cpu'"
        ) from error
    share = max(1, cpu_count() // max(1, len(cluster.workers)))
    return _own(cluster, {join.CPUS_PER_WORKER: str(share)})


def _rmm_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `LocalCUDACluster` that concern RMM; refuse those that contradict each other."""
    names = ("rmm_pool_size", "rmm_maximum_pool_size", "rmm_managed_memory", "rmm_release_threshold", "rmm_async")
    chosen = {name: settings[name] for name in names}
    if chosen["rmm_async"]:
        if chosen["rmm_managed_memory"]:
            raise ArgumentError("rmm_managed_memory needs rmm_async=False: cudaMallocAsync has no managed memory")
        if chosen["rmm_pool_size"] == RMM_POOL_SIZE:
            chosen["rmm_pool_size"] = None
    else:
        if chosen["rmm_release_threshold"] is not None:
            raise ArgumentError("rmm_release_threshold needs rmm_async=True: only that pool gives memory back")
        if chosen["rmm_maximum_pool_size"] is not None and chosen["rmm_pool_size"] is None:
            raise ArgumentError("rmm_maximum_pool_size needs an rmm_pool_size, or rmm_async=True: there is no pool")
    if settings["set_torch_to_use_rmm"]:
        # A worker that is restarted does this again, which `client.run` would not.
        chosen["rmm_allocator_external_lib_list"] = ["torch"]
    return chosen


def _uses_rmm(kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs["rmm_async"] or kwargs["rmm_managed_memory"] or kwargs["rmm_pool_size"] is not None)


def _require_rapids(protocol: str, *, cudf: bool, rmm: bool) -> None:
    """Say what is missing before anything is started."""
    wanted = {"dask_cuda": "cluster_type='gpu'"}
    wanted |= {"cudf": "enable_spilling=True"} if cudf else {}
    wanted |= {"rmm": "rmm_async, rmm_pool_size or rmm_managed_memory"} if rmm else {}
    wanted |= {"distributed_ucxx": f"protocol={protocol!r}"} if protocol.startswith("ucx") else {}
    for module, what in wanted.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(
                f"{what} needs {module}, which is not installed: {GPU_EXTRA}, or give cluster_type='cpu'"
            )


def _new_certificates() -> Any:
    from distributed import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise MissingDependencyError("security=True makes certificates: pip install cryptography") from error


@functools.cache
def _local_client_class() -> Any:
    from distributed import Client

    class LocalClient(Client):
        """A client that ends the cluster it was started with when it is closed."""

        def close(self, *args: Any, **kwargs: Any) -> None:
            """Close the connection, then end the cluster's processes."""
            cluster = self.cluster
            super().close(*args, **kwargs)  # type: ignore[no-untyped-call]
            if cluster is not None:
                cluster.close()

    return LocalClient


def _own(cluster: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Return a client that owns `cluster`, whose workers are all there."""
    try:
        client = _local_client_class()(cluster)
    except BaseException:
        cluster.close()
        raise
    try:
        join.make_ready(client, max(1, len(cluster.workers)), join.TIMEOUT_S, environment)
    except BaseException:
        client.close()
        raise
    return client


def _log_start(client: Any) -> None:
    has_bokeh = importlib.util.find_spec("bokeh") is not None
    logger.info(
        "started %d workers; dashboard %s%s",
        get_num_workers(client),
        client.dashboard_link,
        "" if has_bokeh else " (empty without bokeh: pip install bokeh)",
    )
