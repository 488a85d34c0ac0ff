"""Files of model weights: where they are kept, and how published ones get there.

Reading them is the job of :mod:`nemo_image.engine.state_dict`, whose two functions are here too.
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import platform
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_image.engine.state_dict import FilePath, describe, kind_of, load_state_dict, sha256_file
from nemo_image.errors import ArgumentError, WeightsError

__all__ = ["WeightsSource", "fetch_weights", "home", "load_state_dict", "sha256_file"]

CHUNK = 1 << 20
STALE_S = 3600.0
"""A temporary folder that nothing was written to for so long (in seconds) is the leftover of a killed process."""
WORTH_RETRYING = frozenset({408, 425, 429})
"""HTTP statuses below 500 that may pass."""


def home() -> Path:
    """Return the folder in which weights are kept; it need not exist yet.

    The environment variable ``NEMO_IMAGE_HOME`` names it; the default is ``nemo_image`` in the platform's cache folder.
    """
    chosen = os.environ.get("NEMO_IMAGE_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return _platform_cache() / "nemo_image"


def _platform_cache() -> Path:
    system = platform.system()
    if system == "Darwin":
        return Path.home() / "Library" / "Caches"
    if system == "Windows":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"


@dataclass(frozen=True)
class WeightsSource:
    """Where published weights can be downloaded.

    Attributes
    ----------
    url : str
        ``http`` or ``https``.
    filename : str
        The name under which the file is kept.
    sha256 : str, optional
        SHA-256 of that file in hexadecimal, where it is known.
    member : str, optional
        If `url` is a zip archive, the name in it of the file that is wanted.
    """

    url: str
    filename: str
    sha256: str | None = None
    member: str | None = None

    def fetch(self, folder: FilePath | None = None) -> Path:
        """Return the file's path in `folder` (default :func:`home`), downloading it first if it is not there.

        Raises
        ------
        WeightsError
            As :func:`fetch_weights` does.
        """
        return fetch_weights(self.url, self.filename, self.sha256, self.member, folder)


def fetch_weights(
    url: str,
    filename: str,
    sha256: str | None = None,
    member: str | None = None,
    folder: FilePath | None = None,
    *,
    timeout_s: float = 30.0,
    retries: int = 3,
    backoff_s: float = 0.5,
) -> Path:
    """Return the path of a weights file, downloading it first if it is not there.

    A file gets its final name at once, whole and checked, so any number of processes may fetch it at the same time.

    Parameters
    ----------
    url : str
        ``http`` or ``https``.
    filename : str
        Its name in `folder`, without a path.
    sha256 : str, optional
        SHA-256 of the file (of the member, if there is one), in hexadecimal.
    member : str, optional
        If `url` is a zip archive, the name in it of the file that is wanted. Nothing else is taken out of it, and its
        own paths are not used.
    folder : str or path, optional
        Default :func:`home`.
    timeout_s : float
        Seconds without an answer after which an attempt has failed.
    retries : int
        Further attempts after one that failed for a reason that may pass.
    backoff_s : float
        Seconds before the first of them; doubled for each further one.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    WeightsError
        If the file cannot be had, or is not what was asked for. Says what to do by hand.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ArgumentError(f"url must start with http:// or https://, not {url!r}")
    if filename in ("", ".", "..") or re.search(r"[/\\\0]", filename):
        raise ArgumentError(f"filename must be a file's name without a folder, not {filename!r}")
    if retries < 0 or timeout_s <= 0 or backoff_s < 0:
        raise ArgumentError(f"retries={retries} and backoff_s={backoff_s} must be >= 0, timeout_s={timeout_s} > 0")
    source = WeightsSource(url, filename, sha256, member)
    target = Path(home() if folder is None else folder).expanduser().absolute() / filename
    if target.exists():
        _require_sha256(target, sha256)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with tempfile.TemporaryDirectory(prefix=f".{filename}.", suffix=".tmp", dir=target.parent) as work:
            waits = [0.0, *(backoff_s * 2**attempt for attempt in range(retries))]
            _publish(_download(source, target, Path(work), timeout_s, waits), target)
    except OSError as error:
        raise WeightsError(
            f"cannot write {target}: {error.strerror or error}. Set NEMO_IMAGE_HOME to a folder that can be "
            "written to, or say model_path=<where the file is>"
        ) from error
    return target


class _AttemptError(Exception):
    """One attempt to download failed, for a reason that may pass or not."""

    def __init__(self, reason: str, may_pass: bool = True) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


def _download(source: WeightsSource, target: Path, work: Path, timeout_s: float, waits: Sequence[float]) -> Path:
    """Return a downloaded and checked file in the folder `work`, after one attempt for each of `waits` (seconds)."""
    for number, wait in enumerate(waits, 1):
        if wait:
            time.sleep(wait)
        try:
            return _attempt(source, work, timeout_s)
        except _AttemptError as error:
            if error.may_pass and number < len(waits):
                continue
            tries = f" ({number} attempts)" if number > 1 else ""
            taken = f", take {source.member} out of it," if source.member else ""
            raise WeightsError(
                f"cannot download {source.url}: {error}{tries}. Download it by hand{taken} and put it at {target}, "
                "or say model_path=<where the file is>"
            ) from error
    raise AssertionError("there is at least one attempt")


def _attempt(source: WeightsSource, work: Path, timeout_s: float) -> Path:
    body = work / "body"
    with open(body, "wb") as file:
        for number, chunk in enumerate(_receive(source.url, timeout_s)):
            if number == 0:
                _refuse_other_content(chunk, source)
            file.write(chunk)
        if not file.tell():
            raise _AttemptError("the answer is empty")
    made = body if source.member is None else _extract(body, source.member, work / "member")
    found = sha256_file(made)
    if source.sha256 is not None and found != source.sha256.lower():
        raise _AttemptError(f"what arrived has SHA-256 {found}, the published file has {source.sha256}")
    try:
        load_state_dict(made)
    except WeightsError as error:
        raise _AttemptError(
            f"what arrived {str(error).removeprefix(f'{made} ').removesuffix(': download it again')}"
        ) from error
    return made


def _receive(url: str, timeout_s: float) -> Iterator[bytes]:
    """Yield the body of an answer in pieces; every failure of the network is an `_AttemptError`."""
    request = urllib.request.Request(url, headers={"User-Agent": "nemo_image"})
    got = 0
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            length = answer.headers.get("Content-Length", "")
            while chunk := answer.read(CHUNK):
                got += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        error.close()
        may_pass = error.code >= 500 or error.code in WORTH_RETRYING
        raise _AttemptError(f"the server says {error.code} {error.reason}", may_pass) from error
    except TimeoutError as error:
        raise _AttemptError(f"no answer within {timeout_s:g} s") from error
    except urllib.error.URLError as error:
        raise _AttemptError(f"no connection ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptError(f"the connection broke after {got} bytes ({error or type(error).__name__})") from error
    # Read in pieces, a body that is too short ends like a whole one.
    if length.isdigit() and got < int(length):
        raise _AttemptError(f"the connection broke after {got} of {length} bytes")


def _refuse_other_content(head: bytes, source: WeightsSource) -> None:
    """Stop a download that begins like something else, such as a page that says "not found"."""
    kind = kind_of(head)
    if kind is None or (source.member is not None and kind != "zip"):
        wanted = "weights" if source.member is None else "a zip archive"
        raise _AttemptError(f"the answer is {describe(head)}, not {wanted}", may_pass=False)


def _extract(archive: Path, member: str, made: Path) -> Path:
    """Copy the content of one member of a zip archive to the file `made`; no path in the archive is used."""
    try:
        with zipfile.ZipFile(archive) as opened:
            files = [name for name in opened.namelist() if not name.endswith("/")]
            named = [name for name in files if name.rpartition("/")[2] == member]
            hits = [member] if member in files else named
            if len(hits) != 1:
                has = ", ".join(files[:8]) or "nothing"
                raise _AttemptError(f"the zip archive holds {len(hits)} files named {member}; it has {has}", False)
            with opened.open(hits[0]) as content, open(made, "wb") as file:
                shutil.copyfileobj(content, file, CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError stands for an encrypted member or a compression that Python does not know.
        raise _AttemptError(f"the zip archive is damaged ({error})") from error
    return made


def _publish(made: Path, target: Path) -> None:
    """Give a finished file its final name, in one step that survives a crash."""
    with open(made, "rb+") as file:
        os.fsync(file.fileno())
    try:
        os.replace(made, target)
    except PermissionError:
        # On Windows: another process has fetched the file meanwhile and holds it open.
        if not target.exists():
            raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(target: Path) -> None:
    """Remove what killed processes left of this file."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may be sweeping too
            newest = max(entry.stat().st_mtime for entry in [left, *left.iterdir()])
            if time.time() - newest > STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _require_sha256(path: Path, wanted: str | None) -> None:
    if wanted is not None and (found := sha256_file(path)) != wanted.lower():
        raise WeightsError(
            f"{path} has SHA-256 {found}, the published file has {wanted}: remove it and it is downloaded again, "
            "or, if you mean this very file, say model_path="
        )
