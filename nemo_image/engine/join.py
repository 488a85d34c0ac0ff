"""Join a running Dask scheduler: find it, wait for its workers, compare versions."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from nemo_image.errors import ArgumentError, ClusterError

logger = logging.getLogger("nemo_image")

TIMEOUT_S = 60.0
"""Seconds that a scheduler and its workers have to appear."""

CPUS_PER_WORKER = "NEMO_IMAGE_CPUS_PER_WORKER"
"""Environment variable: the cores that a worker process may keep busy."""

_POLL_S = 0.2

_MUST_AGREE = ("python", "nemo_image", "dask", "distributed", "pandas", "pyarrow")
"""Tasks and frames travel between processes in these packages' own formats."""

_SHOULD_AGREE = ("cloudpickle", "numpy", "torch", "torchvision", "timm", "pillow")
"""What these compute may differ in its last digits."""

_SCHEDULER_NEEDS = ("python", "dask", "distributed")

_NAMED = 3  # processes that a message names


def join(
    address: str | None,
    file: str | os.PathLike[str] | None,
    n_workers: int | None,
    client_kwargs: Mapping[str, Any],
) -> Any:
    """Return a client of a running scheduler that has its workers.

    Parameters
    ----------
    address, file
        Where the scheduler is: one of the two.
    n_workers : int, optional
        Wait for so many workers; for one by default.
    client_kwargs : mapping
        Arguments of the client; its ``timeout`` is ours too.
    """
    from dask.utils import parse_timedelta

    if address is not None and file is not None:
        raise ArgumentError("give scheduler_address or scheduler_file, not both")
    if client_kwargs.get("security") is True:
        raise ArgumentError(
            "security=True makes new certificates, which a running scheduler does not know: give a "
            "distributed.Security with the files that it was started with"
        )
    kwargs = dict(client_kwargs)
    timeout: float = parse_timedelta(kwargs.pop("timeout", TIMEOUT_S), default="s")
    deadline = time.monotonic() + timeout
    client = _connect(address, file, deadline, timeout, kwargs)
    try:
        make_ready(client, n_workers or 1, deadline - time.monotonic(), asked_s=timeout)
        check_versions(client)
    except BaseException:
        client.close()
        raise
    logger.info("joined %s; dashboard %s", client.scheduler.address, client.dashboard_link)
    return client


def make_ready(
    client: Any,
    n_workers: int,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    asked_s: float | None = None,
) -> None:
    """Wait for `n_workers`, and prepare each: it must know our dtypes before it unpickles a frame, and may not hang.

    Parameters
    ----------
    client : distributed.Client
    n_workers : int
        At least 1.
    timeout : float
        Seconds.
    environment : mapping, optional
        Variables that each worker sets where it has not got them.
    asked_s : float, optional
        The seconds to name in the message, where they are not `timeout`.
    """
    where = client.scheduler.address
    deadline = time.monotonic() + timeout
    try:
        while (found := _count_workers(client)) < n_workers:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"the scheduler at {where} has {found or 'no'} worker{'s' if found > 1 else ''}, not {n_workers}, "
                    f"after {asked_s or timeout:.0f} s: start workers, and see their logs"
                )
            time.sleep(_POLL_S)
        client.register_plugin(_make_plugin(environment or {}))
    except OSError as error:
        raise ClusterError(f"the scheduler at {where} went away ({error}): see its log, and start it again") from error


def _count_workers(client: Any) -> int:
    """Return the number of workers that run; ask no scheduler that is known to be gone, which takes half a minute."""
    if client.status != "running":
        raise ConnectionError(f"connection {client.status}")
    return sum(one["status"] == "running" for one in client.scheduler_info(n_workers=-1)["workers"].values())


def check_versions(client: Any) -> None:
    """Refuse a cluster whose processes cannot exchange tasks with this one; warn of those that compute differently.

    Raises
    ------
    ClusterError
        If a process has no nemo_image, or another version of a package that must be the same.
    """
    found = client.get_versions(packages=[*_MUST_AGREE[4:], *_SHOULD_AGREE])
    here = _versions_of(found["client"]) | {"nemo_image": own_version()}
    there = {name: _versions_of(one) for name, one in found["workers"].items()}
    there["the scheduler"] = {name: _versions_of(found["scheduler"])[name] for name in _SCHEDULER_NEEDS}
    for name, version in _own_versions(client).items():
        there.setdefault(name, {})["nemo_image"] = version
    wrong = _differences(_MUST_AGREE, here, there)
    if wrong:
        raise ClusterError(f"versions differ: {'; '.join(wrong)}. Install the same versions everywhere")
    odd = _differences(_SHOULD_AGREE, here, there)
    if odd:
        logger.warning("versions differ, and results may, in their last digits: %s", "; ".join(odd))


def own_version() -> str:
    """Return nemo_image's version, in the process that is asked."""
    import nemo_image

    return nemo_image.__version__


def _own_versions(client: Any) -> dict[str, str]:
    try:
        # The scheduler opens the graphs that tasks come in.
        return {**client.run(own_version), "the scheduler": client.run_on_scheduler(own_version)}
    except ImportError as error:
        raise ClusterError(
            f"the scheduler or a worker cannot import nemo_image ({error}): install it where they run"
        ) from error


def _versions_of(process: Mapping[str, Any]) -> dict[str, str | None]:
    """Return a process's versions; of Python's the first two numbers."""
    versions: dict[str, str | None] = dict(process["packages"])
    versions["python"] = ".".join(str(versions["python"]).split(".")[:2])
    return versions


def _differences(
    names: tuple[str, ...], here: Mapping[str, str | None], there: Mapping[str, Mapping[str, str | None]]
) -> list[str]:
    """Return a phrase for each package whose version is another in some process than here."""
    phrases = []
    for name in names:
        # This process may do without what only workers compute with.
        mine = here.get(name)
        others = {process: one[name] for process, one in there.items() if name in one and one[name] != mine}
        if mine is not None and others:
            shown = [f"{version or 'none'} on {process}" for process, version in list(others.items())[:_NAMED]]
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            phrases.append(f"{name} {mine} here, {', '.join(shown)}{more}")
    return phrases


def _connect(
    address: str | None,
    file: str | os.PathLike[str] | None,
    deadline: float,
    timeout: float,
    kwargs: Mapping[str, Any],
) -> Any:
    """Return a client; try until the deadline, and look at the file anew each time: an old one may be replaced."""
    import dask
    from dask.utils import parse_timedelta
    from distributed.versions import VersionMismatchWarning

    # A client waits as long again for a scheduler that it lost later: a short time, however long the workers take.
    usual: float = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"), default="s")
    scheduler = dask.config.get("scheduler", None)
    while True:
        where = address if file is None else _address_in(file, deadline, timeout)
        try:
            with warnings.catch_warnings():
                # `check_versions` says it in a line.
                warnings.simplefilter("ignore", VersionMismatchWarning)
                return _start(where, {"timeout": min(usual, timeout), **kwargs})
        except (TypeError, ValueError, RuntimeError) as error:
            _choose_scheduler(scheduler)
            raise ClusterError(_unreachable(where, file, error)) from error
        except (OSError, ImportError) as error:
            _choose_scheduler(scheduler)
            if time.monotonic() >= deadline or isinstance(error, ImportError):
                raise ClusterError(_unreachable(where, file, error)) from error


def _start(where: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return a client; leave nothing of one that does not start.

    Its thread would go on, and the garbage collector would close it at any moment: where that is while the next client
    starts, both wait for one lock of distributed's, for ever.
    """
    from distributed import Client

    client = Client.__new__(Client)
    try:
        Client.__init__(client, where, **kwargs)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error says more
            client.close()
            client._loop_runner.stop()  # `close` leaves the thread of a client that closed itself
        raise
    return client


def _choose_scheduler(name: Any) -> None:
    """Have Dask compute as it did before: a client chooses itself before it fails, and stays chosen."""
    import dask

    if name is None:
        dask.config.config.pop("scheduler", None)
    else:
        dask.config.set(scheduler=name)


def _unreachable(where: Any, file: str | os.PathLike[str] | None, error: BaseException) -> str:
    named = f" (named by {os.fspath(file)!r})" if file is not None else ""
    tls = ": give security=, with its certificates" if str(where).startswith("tls") else ""
    return f"no scheduler answers at {where}{named} ({error}){tls}"


def _address_in(file: str | os.PathLike[str], deadline: float, timeout: float) -> str:
    """Return the address that a scheduler's file names, once it does."""
    name = os.fspath(file)
    while True:
        try:
            with open(name, encoding="utf-8") as opened:
                return str(json.load(opened)["address"])
        except FileNotFoundError as error:
            raise ClusterError(
                f"scheduler_file {name!r} does not exist: start the scheduler with --scheduler-file"
            ) from error
        except OSError as error:
            raise ClusterError(f"scheduler_file {name!r} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"scheduler_file {name!r} names no address after {timeout:.0f} s (empty or cut off): see the "
                    "scheduler's log"
                ) from error
        time.sleep(_POLL_S)


def _make_plugin(environment: Mapping[str, str]) -> Any:
    from distributed import WorkerPlugin

    class PrepareWorker(WorkerPlugin):
        """Imports our pandas dtypes in every worker, those that join later too, and keeps workers from hanging."""

        name = "nemo-image-dtypes"

        def setup(self, worker: Any) -> None:
            import nemo_image.schema  # noqa: F401

            if sys.version_info < (3, 12):
                # Python 3.11 stops for ever where garbage is collected while a thread's frames are looked at, as the
                # profile of Dask's dashboard does a hundred times a second: github.com/dask/distributed/issues/8616
                for callback in ("profile", "profile-cycle"):
                    if callback in worker.periodic_callbacks:
                        worker.periodic_callbacks.pop(callback).stop()
            for variable, value in environment.items():
                os.environ.setdefault(variable, value)

    return PrepareWorker()
