"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.joined import joined_cluster

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--dask``: where the tests that do not say so themselves run."""
    parser.addoption(
        "--dask",
        choices=("none", "processes", "tls"),
        default="none",
        help="run every test with a client: of two local processes, or joined to a scheduler of another process by its "
        "file, through TLS",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="needs torch, of the extra 'image_cuda13' (or image_cuda12)")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep downloads of tests out of the user's cache."""
    monkeypatch.setenv("NEMO_IMAGE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material beside the checkout; skips where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared material at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real cluster of two processes, started once."""
    from distributed import Client, LocalCluster

    from nemo_image.engine.join import make_ready

    if request.config.getoption("--dask") == "tls":
        with joined_cluster(tmp_path_factory.mktemp("cluster")) as client:
            yield client
        return
    # Not the default: tests without a client must not find it.
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        make_ready(client, 2, 60)
        yield client


@pytest.fixture(autouse=True)
def _client_of_the_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--dask``, give every test a client, unless it says that it cannot use one."""
    if request.config.getoption("--dask") == "none" or request.node.get_closest_marker("in_process"):
        yield
        return
    with request.getfixturevalue("cluster").as_current():
        yield


@pytest.fixture(params=["no client", "two processes"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Run a test without any client, and on a cluster of two processes."""
    from nemo_image.engine.run import without_client

    if request.param == "no client":
        with without_client():
            yield None
        return
    client = request.getfixturevalue("cluster")
    with client.as_current():
        yield client
