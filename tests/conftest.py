"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


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
def cluster() -> Iterator[Any]:
    """A real cluster of two processes, started once."""
    from distributed import Client, LocalCluster

    # Not the default: tests without a client must not find it.
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=["no client", "two processes"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Run a test without any client, and on a cluster of two processes."""
    if request.param == "no client":
        yield None
        return
    client = request.getfixturevalue("cluster")
    with client.as_current():
        yield client
