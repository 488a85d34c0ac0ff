"""The test's own servers do what their names say: faults that do not happen would prove nothing."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.remote.servers import Front, fetch

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def url(web_url: str, folder: Path) -> str:
    (folder / "x.bin").write_bytes(CONTENT)
    return f"{web_url}/{folder.name}/x.bin"


def _range(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=10-19"})) as response:
        return response.status, response.read()


def test_a_web_server(url: str, front: Front) -> None:
    assert fetch(url) == CONTENT
    assert _range(url) == (206, CONTENT[10:20])
    assert front.served("x.bin") == len(CONTENT) + 10
    assert front.requests[-1].range == "bytes=10-19"
    assert b"x.bin" in fetch(url.removesuffix("x.bin"))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(url + "0")


def test_faults(url: str, front: Front) -> None:
    front.every(1, "503")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        fetch(url)
    front.every(1, "cut")
    with pytest.raises(http.client.IncompleteRead):
        fetch(url)
    front.every(1, "drop")
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        fetch(url)
    front.every(1, "short")
    assert _range(url) == (206, CONTENT[10:15])
    front.every(1, "no ranges")
    assert _range(url) == (200, CONTENT)
    front.every(1, "dribble")
    assert fetch(url) == CONTENT
    front.every(1, "no length")
    with urllib.request.urlopen(url) as response:
        assert response.headers["Content-Length"] is None
        assert response.read() == CONTENT
