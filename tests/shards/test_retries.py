from __future__ import annotations

import errno
import http.client
import logging
import ssl
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import tenacity.nap

from nemo_image.errors import MetadataFileError
from nemo_image.shards import retries

URL = "s3://bucket/x.tar"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    asked: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", asked.append)
    return asked


def _failing(*errors: Exception) -> Callable[[], str]:
    """A function that raises the errors, one a call, and then returns."""
    return Mock(side_effect=[*errors, "done", AssertionError("called again")])


def _raise(function: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _aiohttp(status: int) -> Exception:
    aiohttp = pytest.importorskip("aiohttp")
    request = Mock(real_url="http://host/x.tar")
    return aiohttp.ClientResponseError(request, (), status=status, message="said the server")


def _aiohttp_connection(said: str) -> Exception:
    error: Exception = pytest.importorskip("aiohttp").ClientConnectionError(said)
    return error


def _botocore(status: int, code: str = "x") -> Exception:
    exceptions = pytest.importorskip("botocore.exceptions")
    response = {"Error": {"Code": code, "Message": "said S3"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return exceptions.ClientError(response, "GetObject")


def _requests(status: int) -> Exception:
    requests = pytest.importorskip("requests")
    return requests.HTTPError(response=Mock(status_code=status))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConnectionResetError("reset"),
        TimeoutError,
        lambda: OSError(errno.EBUSY, "Please reduce your request rate."),
        lambda: OSError(errno.EREMOTEIO, "We encountered an internal error."),
        lambda: OSError(errno.ENETUNREACH, "Network is unreachable"),
        lambda: http.client.IncompleteRead(b"12", 3),
        lambda: retries.CutOffError("3 of 5 bytes"),
        lambda: _aiohttp(429),
        lambda: _aiohttp(500),
        lambda: _aiohttp(503),
        lambda: pytest.importorskip("aiohttp").ClientPayloadError("Response payload is not completed"),
        lambda: pytest.importorskip("aiohttp").ServerDisconnectedError(),
        lambda: _requests(502),
        lambda: pytest.importorskip("requests").ConnectionError("refused"),
        lambda: _botocore(503),
        lambda: _botocore(400, "RequestTimeout"),
        lambda: pytest.importorskip("botocore.exceptions").EndpointConnectionError(endpoint_url=URL),
        lambda: _from(FileNotFoundError(URL), _aiohttp(503)),  # fsspec's HTTP file system, whatever happened
        lambda: _from(OSError(errno.EIO, "unknown"), _botocore(502)),  # s3fs, for codes that it does not know
        lambda: _from(MetadataFileError("x.parquet cannot be read"), ConnectionResetError()),
    ],
)
def test_transient(make: Callable[[], Exception], waits: list[float]) -> None:
    error = make()
    function = _failing(error, error)
    assert retries.call(URL, function) == "done"
    assert len(waits) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: FileNotFoundError(errno.ENOENT, "No such file", URL),
        lambda: PermissionError("Access Denied"),
        lambda: IsADirectoryError("a folder"),
        lambda: OSError(errno.ENOSPC, "No space left on device"),
        lambda: OSError(errno.EROFS, "Read-only file system"),
        lambda: OSError(errno.EINVAL, "The authorization header is malformed"),
        lambda: ValueError("a defect"),
        lambda: MetadataFileError("x.parquet is no Parquet"),
        lambda: _from(FileNotFoundError(URL), _aiohttp(404)),
        lambda: _from(FileNotFoundError("No such bucket"), _botocore(404)),
        lambda: _from(OSError(errno.EIO, "unknown"), _botocore(400)),
        lambda: _from(OSError("gave up"), retries.GaveUpError("5 tries")),
    ],
)
def test_final(make: Callable[[], Exception], waits: list[float]) -> None:
    error = make()
    function = _failing(error)
    assert _raise(lambda: retries.call(URL, function)) is error
    assert waits == []


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: _aiohttp(404), FileNotFoundError),
        (lambda: _aiohttp(403), PermissionError),
        (lambda: _aiohttp(405), OSError),
        (lambda: _aiohttp(501), OSError),
        (lambda: _from(FileNotFoundError(URL), _aiohttp(403)), PermissionError),
        (lambda: _from(FileNotFoundError(URL), _aiohttp(416)), OSError),
        (
            lambda: _from(
                FileNotFoundError(URL),
                _from(
                    pytest.importorskip("aiohttp").ClientConnectionError("TLS"),
                    ssl.SSLCertVerificationError("self-signed"),
                ),
            ),
            OSError,
        ),
    ],
)
def test_clients_own_errors_become_pythons(make: Callable[[], Exception], kind: type, waits: list[float]) -> None:
    error = _raise(lambda: retries.call(URL, _failing(make())))
    assert type(error) is kind
    assert URL in str(error)
    assert waits == []


def test_back_off(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(retries.GaveUpError) as caught:
        retries.call(URL, _failing(*[TimeoutError("slow")] * 5))
    assert str(caught.value) == f"{URL}: TimeoutError: slow (5 tries): check the network and the server"
    assert isinstance(caught.value.__cause__, TimeoutError)
    for wait, least in zip(waits, [0.5, 1, 2, 4], strict=True):
        assert least <= wait <= least + 0.125
    assert len({round(wait % 0.5, 9) for wait in waits}) == 4  # jitter: many workers must not come back together
    waits.clear()
    monkeypatch.setenv("NEMO_IMAGE_RETRY_WAIT_S", "0")
    assert retries.call(URL, _failing(*[TimeoutError("slow")] * 4)) == "done"
    assert waits == [0, 0, 0, 0]


def test_a_first_wait_that_is_no_number(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NEMO_IMAGE_RETRY_WAIT_S", "soon")
    retries.call(URL, _failing(TimeoutError()))
    assert 0.5 <= waits[0] <= 0.625
    assert "NEMO_IMAGE_RETRY_WAIT_S='soon' is no number of seconds" in caplog.text


def test_enough_is_enough(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """A client that tries for long on its own is not asked again."""
    monkeypatch.setattr(retries, "ENOUGH_S", 0.0)
    with pytest.raises(retries.GaveUpError, match=r"\(1 tries\)"):
        retries.call(URL, _failing(TimeoutError()))
    assert waits == []


def test_a_retry_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        retries.call(URL, _failing(ConnectionResetError("by peer")))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{URL}: ConnectionResetError: by peer: trying again in 0.")
    assert record.getMessage().endswith("(try 1 of 5 failed)")


def test_our_own_errors_stay(waits: list[float]) -> None:
    errors = [_from(MetadataFileError("x.parquet cannot be read"), ConnectionResetError()) for _ in range(5)]
    error = _raise(lambda: retries.call(URL, _failing(*errors)))
    assert error is errors[-1]
    assert len(waits) == 4
    assert not retries.is_transient(error)  # enough was tried, says it to outer calls


@pytest.mark.parametrize("local", ["/data/x.tar", "x.tar", "file:///data/x.tar", "local://x"])
def test_local_files_are_not_tried_again(local: str, waits: list[float]) -> None:
    error = TimeoutError()
    function = Mock(side_effect=error)
    assert _raise(lambda: retries.retried(function)(local, 1, key=2)) is error
    function.assert_called_once_with(local, 1, key=2)
    assert waits == []


def test_retried() -> None:
    function = Mock(side_effect=[TimeoutError(), "done"])
    assert retries.retried(function)(URL, 1, key=2) == "done"
    assert [call.args for call in function.call_args_list] == [(URL, 1), (URL, 1)]
    assert function.call_args.kwargs == {"key": 2}
