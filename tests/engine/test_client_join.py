"""Joining a running scheduler: finding it, waiting for its workers, comparing versions, what is said when it fails."""

from __future__ import annotations

import gc
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest

import nemo_image
from nemo_image import get_client, get_num_workers
from nemo_image.engine import join
from nemo_image.errors import ArgumentError, ClusterError


@pytest.fixture
def empty() -> Iterator[Any]:
    """A scheduler without workers."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as local:
        yield local


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, cluster: Any) -> Iterator[Any]:
    """Two processes that anyone may join: the other tests' cluster, unless it wants certificates (``--dask=tls``)."""
    from distributed import Client, LocalCluster

    if request.config.getoption("--dask") != "tls":
        yield cluster
        return
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


def test_join_by_file_and_by_address(tmp_path: Path, cluster: Any) -> None:
    address = cluster.scheduler_info()["address"]
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}))
    for where in ({"scheduler_address": address}, {"scheduler_file": file}):
        with get_client(**where, n_workers=2, set_as_default=False) as client:
            assert get_num_workers(client) == 2
    # What was joined goes on.
    assert cluster.submit(sum, [1, 2]).result() == 3


@pytest.mark.parametrize("begun", ["", '{"address": "tcp://127', "[]", "{}"])
def test_a_scheduler_file_that_is_being_written(tmp_path: Path, cluster: Any, begun: str) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(begun)
    finish = json.dumps({"address": cluster.scheduler_info()["address"]})
    later = threading.Timer(0.3, file.write_text, [finish])
    later.start()
    try:
        with get_client(scheduler_file=file, set_as_default=False) as client:
            assert get_num_workers(client) == 2
    finally:
        later.join()


@pytest.mark.parametrize("text", ["", '{"address": "tcp://127', "[]"])
def test_a_scheduler_file_that_stays_incomplete(tmp_path: Path, text: str) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(text)
    with pytest.raises(ClusterError, match=r"scheduler\.json.*names no address after 1 s"):
        get_client(scheduler_file=file, timeout=1)


def test_a_scheduler_file_that_is_not_there() -> None:
    with pytest.raises(ClusterError, match=r"nothere\.json.*does not exist"):
        get_client(scheduler_file="nothere.json")


def test_a_scheduler_file_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot be read"):
        get_client(scheduler_file=tmp_path)


def test_an_old_scheduler_file_that_is_replaced(tmp_path: Path, cluster: Any) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": "tcp://127.0.0.1:1"}))
    later = threading.Timer(0.3, file.write_text, [json.dumps({"address": cluster.scheduler_info()["address"]})])
    later.start()
    from dask import config

    try:
        with (
            config.set({"distributed.comm.timeouts.connect": "500 ms"}),
            get_client(scheduler_file=file, set_as_default=False) as client,
        ):
            assert get_num_workers(client) == 2
    finally:
        later.join()


def test_a_scheduler_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1 \("):
        get_client(scheduler_address="tcp://127.0.0.1:1", timeout="1 s")
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": "tcp://127.0.0.1:1"}))
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1 \(named by .*scheduler\.json"):
        get_client(scheduler_file=file, timeout=1)


def test_nothing_is_left_of_a_client_that_did_not_start(cluster: Any) -> None:
    def loops() -> int:
        return sum(thread.name == "IO loop" for thread in threading.enumerate())

    gc.collect()
    before = loops()
    gc.disable()  # which would tidy up, or come at the wrong moment
    try:
        with pytest.raises(ClusterError, match="no scheduler answers"):
            get_client(scheduler_address="tcp://127.0.0.1:1", timeout="1 s")
        assert loops() == before
    finally:
        gc.enable()


def test_an_address_of_no_protocol() -> None:
    with dask.config.set(scheduler="threads"):
        with pytest.raises(ClusterError, match="nosuch://"):
            get_client(scheduler_address="nosuch://127.0.0.1:1", timeout=1)
        assert dask.config.get("scheduler") == "threads"  # not a client that never came to be


def test_workers_that_do_not_come(empty: Any) -> None:
    with pytest.raises(ClusterError, match="has no worker, not 1, after 1 s: start workers"):
        get_client(scheduler_address=empty.scheduler_address, timeout=1)


def test_fewer_workers_than_asked_for(cluster: Any) -> None:
    with pytest.raises(ClusterError, match="has 2 workers, not 3, after 1 s"):
        get_client(scheduler_address=cluster.scheduler_info()["address"], n_workers=3, timeout=1)


def test_workers_that_come_later(empty: Any) -> None:
    later = threading.Timer(0.3, empty.scale, [1])
    later.start()
    try:
        with get_client(scheduler_address=empty.scheduler_address, n_workers=1, set_as_default=False) as client:
            assert get_num_workers(client) == 1
    finally:
        later.join()


def test_a_scheduler_that_goes_away_while_workers_are_awaited(empty: Any) -> None:
    later = threading.Timer(1.0, empty.close)
    later.start()
    try:
        with pytest.raises(ClusterError, match="went away"):
            get_client(scheduler_address=empty.scheduler_address, timeout=20)
    finally:
        later.join()


def test_joining_through_tls(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="makes certificates")
    from distributed import LocalCluster, Security

    security = Security.temporary()
    with LocalCluster(n_workers=1, security=security, protocol="tls", dashboard_address=":0") as local:
        file = tmp_path / "scheduler.json"
        file.write_text(json.dumps({"address": local.scheduler_address}))
        with get_client(scheduler_file=file, security=security, set_as_default=False) as client:
            assert client.scheduler.address.startswith("tls://")
            assert client.submit(sum, [1, 2]).result() == 3
        with pytest.raises(ClusterError, match="give security="):
            get_client(scheduler_file=file, timeout=1)
        with pytest.raises(ClusterError, match="no scheduler answers"):
            get_client(scheduler_file=file, security=Security.temporary(), timeout=1)
        with pytest.raises(ArgumentError, match="new certificates"):
            get_client(scheduler_file=file, security=True)


def test_another_nemo_image_on_the_workers(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address = cluster.scheduler_info()["address"]
    real = nemo_image.__version__
    monkeypatch.setattr(nemo_image, "__version__", "9.9.9")
    with pytest.raises(ClusterError, match=rf"nemo_image 9\.9\.9 here, {real} on tcp://.*Install the same versions"):
        get_client(scheduler_address=address, set_as_default=False)


def processes(**changes: dict[str, str | None]) -> Any:
    """Return what stands for a client of two workers whose versions are equal but for `changes`."""
    usual = dict.fromkeys(("dask", "distributed", "pandas", "pyarrow", "numpy", "torch", "msgpack", "toolz"), "1.0")
    usual["python"] = "3.11.7.final.0"
    named = {
        name: {"packages": {**usual, **changes.get(name, {})}} for name in ("client", "scheduler", "worker1", "worker2")
    }
    found = {
        "client": named["client"],
        "scheduler": named["scheduler"],
        "workers": {name: named[name] for name in ("worker1", "worker2")},
    }
    return SimpleNamespace(
        get_versions=lambda packages: found,
        run=lambda function: dict.fromkeys(found["workers"], function()),
        run_on_scheduler=lambda function: function(),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"worker1": {"python": "3.12.1.final.0"}}, r"python 3\.11 here, 3\.12 on worker1\."),
        ({"worker2": {"pandas": "2.3"}}, r"pandas 1\.0 here, 2\.3 on worker2\."),
        ({"worker1": {"pyarrow": None}}, r"pyarrow 1\.0 here, none on worker1\."),
        ({"scheduler": {"distributed": "0.9"}}, r"distributed 1\.0 here, 0\.9 on the scheduler\."),
        (
            {"client": {"dask": "2.0"}},
            r"dask 2\.0 here, 1\.0 on worker1, 1\.0 on worker2, 1\.0 on the scheduler\.",
        ),
    ],
)
def test_versions_that_must_agree(changes: Any, said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        join.check_versions(processes(**changes))


def test_versions_that_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    join.check_versions(
        processes(worker2={"python": "3.11.9.final.0", "msgpack": "2.0"}, scheduler={"torch": None, "pandas": None})
    )
    assert not caplog.records
    join.check_versions(processes(worker2={"torch": "2.0"}, worker1={"numpy": "0.9"}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "numpy 1.0 here, 0.9 on worker1; torch 1.0 here, 2.0 on worker2" in record.getMessage()


def test_workers_without_nemo_image() -> None:
    def fail(function: Any) -> None:
        raise ModuleNotFoundError("No module named 'nemo_image'")

    for name in ("run", "run_on_scheduler"):
        client = processes()
        setattr(client, name, fail)
        with pytest.raises(ClusterError, match="cannot import nemo_image"):
            join.check_versions(client)
