"""Calling a storage again that failed for a moment: a lost connection, a timeout, HTTP 429 or 5xx, a body cut off.

Each further try comes after a longer wait, with jitter (exponential back-off): 0.5, 1, 2 and 4 s, about 9 s in all. The
environment variable ``NEMO_IMAGE_RETRY_WAIT_S`` gives another first wait, in seconds. What is final (no such file, no
permission, no space) and whatever is local is never tried again.
"""

from __future__ import annotations

import errno
import functools
import http.client
import logging
import os
import ssl
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from nemo_image.errors import NemoImageError, one_line

logger = logging.getLogger("nemo_image")

P = ParamSpec("P")
R = TypeVar("R")
Url = str | os.PathLike[str]

TRIES = 5
FIRST_WAIT_S = 0.5
ENOUGH_S = 30.0
"""Seconds after which nothing is tried again: some clients retry on their own, for long."""

_LOCAL = ("file", "local")
_NETWORK_ERRNOS = {
    getattr(errno, name)
    for name in (
        "EBUSY",  # s3fs: ServiceUnavailable, SlowDown
        "EREMOTEIO",  # s3fs: InternalError
        *("EAGAIN", "EPIPE", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED"),
        *("EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETDOWN", "ENETRESET"),
    )
    if hasattr(errno, name)
}
_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeout",
    "RequestTimeoutException",
    "IncompleteBody",
}
# Clients' exceptions that are no ConnectionError or TimeoutError of Python's: by module, which is not imported here.
_CLIENTS = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError"),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3.exceptions": ("ProtocolError", "TimeoutError"),
}
_CLIENT_PACKAGES = {"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}


class CutOffError(OSError):
    """A server sent fewer bytes than it was asked for."""


class GaveUpError(OSError):
    """A storage failed in every try."""


def is_local(url: Url) -> bool:
    """Tell whether a URL is a path of this machine."""
    protocol, separator, _ = os.fspath(url).partition("://")
    return not separator or protocol in _LOCAL


def call(url: Url, function: Callable[[], R]) -> R:
    """Call a function that works on a remote file, again where the storage fails for a moment.

    Parameters
    ----------
    url : str or path
        For messages: each further try is logged as a warning.
    function : callable without arguments
        May be called several times; does all of its work anew, or what is left of it.

    Raises
    ------
    GaveUpError
        If every try failed.
    OSError
        If the failure is final: of the class that a local file system would raise, also where a client has its own.
    NemoImageError
        As the function raised it.
    """

    def log(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error, wait = state.outcome.exception(), state.next_action.sleep
        assert error is not None
        said = "%s: %s: trying again in %.1f s (try %d of %d failed)"
        logger.warning(said, os.fspath(url), one_line(_reason(error)), wait, state.attempt_number, TRIES)

    first = _first_wait()
    tries = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(TRIES) | stop_after_delay(ENOUGH_S),
        wait=wait_exponential(multiplier=first) + wait_random(0, first / 4),
        before_sleep=log,
        reraise=True,
    )
    try:
        return tries(function)
    except Exception as error:
        final = _final(os.fspath(url), error, int(tries.statistics.get("attempt_number", 1)))
        if final is error:
            raise
        raise final from error


def retried(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument (by position) is a URL: a remote one is treated as in :func:`call`.

    Do not nest: the tries would multiply.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        url = str(args[0])
        return function(*args, **kwargs) if is_local(url) else call(url, lambda: function(*args, **kwargs))

    return wrapped


def is_transient(error: BaseException) -> bool:
    """Tell whether the cause of an exception is likely to pass."""
    chain = list(_chain(error))
    if any(isinstance(one, GaveUpError | ssl.SSLCertVerificationError) for one in chain):
        return False
    return any(_is_transient(one) for one in chain)


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or (status >= 500 and status not in (501, 505)) or _code(error) in _CODES
    if isinstance(error, CutOffError | ConnectionError | TimeoutError | http.client.IncompleteRead):
        return True
    if any(isinstance(error, kind) for kind in _client_errors()):
        return True
    return isinstance(error, OSError) and error.errno in _NETWORK_ERRNOS


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _client_errors() -> Iterator[type[BaseException]]:
    for module, names in _CLIENTS.items():
        found = sys.modules.get(module)  # an exception of a module that is not imported cannot come
        yield from (getattr(found, name) for name in names if hasattr(found, name))


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that a client's exception carries: aiohttp, requests, botocore, gcsfs or Azure."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return _number(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    values = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    found = next((one for one in map(_number, values) if one is not None), None)
    return found if found is not None else _number(getattr(response, "status_code", None))


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and 100 <= value < 600 else None


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _first_wait() -> float:
    text = os.environ.get("NEMO_IMAGE_RETRY_WAIT_S", "")
    try:
        return max(0.0, float(text)) if text else FIRST_WAIT_S
    except ValueError:
        logger.warning("NEMO_IMAGE_RETRY_WAIT_S=%r is no number of seconds: %s is taken", text, FIRST_WAIT_S)
        return FIRST_WAIT_S


def _final(url: str, error: Exception, count: int) -> Exception:
    """Return what to raise for an exception after which nothing is tried again."""
    if not is_transient(error):
        return error if isinstance(error, NemoImageError) else _as_os_error(url, error)
    gave_up = GaveUpError(f"{url}: {one_line(_reason(error))} ({count} tries): check the network and the server")
    if not isinstance(error, NemoImageError):
        return gave_up
    gave_up.__cause__, error.__cause__ = error.__cause__, gave_up  # tells an outer call that enough was tried
    return error


def _reason(error: BaseException) -> BaseException:
    """Return what will pass, of all that an exception was raised from."""
    return next((one for one in _chain(error) if _is_transient(one)), error)


def _as_os_error(url: str, error: Exception) -> Exception:
    """Give a client's own exception the class that a local file system would have raised."""
    by_client = next((one for one in _chain(error) if type(one).__module__.partition(".")[0] in _CLIENT_PACKAGES), None)
    if by_client is None or (by_client is not error and type(error) is not FileNotFoundError):
        return error  # no client's, or translated by fsspec
    # fsspec's HTTP file system says that there is no such file, whatever the server answered.
    said = f"{url}: {one_line(by_client)}"
    status = _status(by_client)
    if status in (404, 410):
        return error if isinstance(error, FileNotFoundError) else FileNotFoundError(errno.ENOENT, said)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"{said}: check the credentials")
    return OSError(said)
