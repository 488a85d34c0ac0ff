"""Servers, each started once a session, and clean counters for each test."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_image.shards import retries
from tests.remote.everywhere import environment, set_enough
from tests.remote.servers import NGINX, Front, nginx, serving, static_app


@pytest.fixture
def everywhere(request: pytest.FixtureRequest) -> Callable[[Callable[..., object], Any], None]:
    """Calls a function with an argument in this process, and on the workers that the test has because of ``--dask``."""
    if request.config.getoption("--dask") == "none" or request.node.get_closest_marker("in_process"):
        return lambda function, argument: function(argument) and None
    client = request.getfixturevalue("cluster")

    def call(function: Callable[..., object], argument: Any) -> None:
        function(argument)
        client.run(function, argument)

    return call


@pytest.fixture(autouse=True)
def _no_waiting(everywhere: Any) -> Iterator[None]:
    before = retries.ENOUGH_S
    everywhere(set_enough, 1e9)  # the machine may be slow
    # Our own retries are what is tested here, and botocore's wait for seconds.
    with environment(everywhere, {"NEMO_IMAGE_RETRY_WAIT_S": "0", "AWS_MAX_ATTEMPTS": "1"}):
        yield
    everywhere(set_enough, before)


@pytest.fixture(scope="session")
def _front() -> Iterator[tuple[Front, str]]:
    pytest.importorskip("aiohttp", reason="needs aiohttp, of the extra 'remote'")
    front = Front()
    with serving(front.app()) as url:
        yield front, url


# S3 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="needs s3fs, of the extra 'remote'")
    server_module = pytest.importorskip("moto.server", reason="needs moto[server], of the extra 'test'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_moto: str, _front: tuple[Front, str], everywhere: Any) -> Iterator[Front]:
    """An S3 server behind a front; named by the environment, so that no call has to."""
    front, url = _front
    front.reset(_moto)
    values = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with environment(everywhere, values):
        yield front


@pytest.fixture
def bucket(s3: Front) -> str:
    """The URL of a new bucket."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().call_s3("create_bucket", Bucket=name)
    s3.requests.clear()
    return f"s3://{name}"


# HTTP -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def www(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the web servers serve."""
    return tmp_path_factory.mktemp("www")


@pytest.fixture(scope="session")
def _aiohttp_url(www: Path) -> Iterator[str]:
    with serving(static_app(www)) as url:
        yield url


@pytest.fixture(scope="session")
def _nginx_url(www: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if NGINX is None:
        pytest.skip("needs nginx")
    with nginx(www, tmp_path_factory.mktemp("nginx")) as url:
        yield url


@pytest.fixture(params=["aiohttp", "nginx"])
def web_url(request: pytest.FixtureRequest, _front: tuple[Front, str]) -> str:
    """The URL at which a web server lists and serves `www`, through the front."""
    front, url = _front
    front.reset(request.getfixturevalue(f"_{request.param}_url"))
    return url + ("/listed" if request.param == "nginx" else "")


@pytest.fixture
def plain_url(_nginx_url: str, _front: tuple[Front, str]) -> str:
    """The URL at which nginx serves `www` without any listing, through the front."""
    front, url = _front
    front.reset(_nginx_url)
    return f"{url}/plain"


@pytest.fixture
def front(_front: tuple[Front, str]) -> Front:
    """What counts the requests, and lets them go wrong."""
    return _front[0]


@pytest.fixture
def folder(www: Path) -> Path:
    """A new folder of the web servers."""
    made = www / uuid.uuid4().hex[:8]
    made.mkdir()
    return made


@pytest.fixture(scope="session", autouse=True)
def _close_clients() -> Iterator[Any]:
    """Close fsspec's connections before the servers go."""
    yield
    import fsspec

    for protocol in ("s3", "http"):
        if protocol in fsspec.available_protocols():
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
