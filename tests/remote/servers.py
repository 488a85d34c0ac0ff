"""Servers on loopback: a web server, and a front that counts what goes through it and misbehaves when told to."""

from __future__ import annotations

import asyncio
import io
import itertools
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import aiohttp
    from aiohttp import web
except ImportError:  # the fixtures skip
    aiohttp = web = None  # type: ignore[assignment]

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "date", "server", "host"}


@contextmanager
def serving(app: Any, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run an aiohttp application in a thread; yield its URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        return int(runner.addresses[0][1])

    async def stop() -> None:
        for handler in list(runner.server.connections):
            if handler.transport is not None:
                handler.transport.abort()  # closing in good form would wait for the clients
        await runner.cleanup()

    port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for _ in range(3):  # transports close in the loop's next rounds
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def static_app(folder: Path, listing: bool = True) -> Any:
    """Return an application that serves a folder, with byte ranges."""
    app = web.Application()
    app.router.add_static("/", folder, show_index=listing)
    return app


@contextmanager
def nginx(folder: Path, work: Path) -> Iterator[str]:
    """Run nginx over a folder: ``/listed/`` with an index of each folder, ``/plain/`` without."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temporary = "".join(
        f"{name}_temp_path {work}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (work / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {work}/nginx.pid; error_log {work}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port};\n"
        f"location /listed/ {{ alias {folder}/; autoindex on; }} location /plain/ {{ alias {folder}/; }} }} }}\n"
    )
    assert NGINX is not None
    command = [NGINX, "-c", str(work / "nginx.conf"), "-p", str(work), "-e", str(work / "error.log")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        assert process.poll() is None, "nginx did not start"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        pause.wait(0.01)
    raise AssertionError("nginx does not answer")


def fetch(url: str) -> bytes:
    """Return what a URL serves, by the standard library."""
    with urllib.request.urlopen(url) as response:
        return bytes(response.read())


@dataclass
class Request:
    """A request that came to a :class:`Front`, and the size of the body that goes back, in bytes."""

    method: str
    path: str
    range: str | None
    status: int
    size: int


Fault = Callable[[str, str, int], str | None]


@dataclass
class Front:
    """Passes requests on to `upstream`, and keeps account of them.

    `fault` is asked (method, path, number of the request) what goes wrong: ``"503"``; ``"cut"``: half a body, then the
    connection is closed; ``"short"``: half of a range that claims to be all; ``"no ranges"``; ``"no length"``;
    ``"dribble"``: the body comes byte by byte; ``"drop"``: the request is passed on, and then there is no answer.
    """

    upstream: str = ""
    fault: Fault = lambda method, path, number: None
    requests: list[Request] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    def reset(self, upstream: str) -> None:
        self.upstream, self.fault = upstream, lambda method, path, number: None
        self.requests.clear()

    def every(self, count: int, *kinds: str) -> None:
        """Let every `count`-th request go wrong, in one way after the other."""
        numbers, order = itertools.count(1), itertools.cycle(kinds)
        self.fault = lambda method, path, number: next(order) if next(numbers) % count == 0 else None

    def count(self, method: str, suffix: str = "") -> int:
        return sum(one.method == method and one.path.endswith(suffix) for one in self.requests)

    def served(self, suffix: str = "") -> int:
        """Return the bytes of bodies that went back for paths with an ending."""
        return sum(one.size for one in self.requests if one.path.endswith(suffix))

    def app(self) -> Any:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.cleanup_ctx.append(self._with_session)
        return app

    async def _with_session(self, app: Any) -> Any:
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            yield

    async def _handle(self, request: Any) -> Any:
        kind = self.fault(request.method, request.path, next(self.numbers))
        wanted = request.headers.get("Range")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        body = await request.read()
        if kind == "503":
            self._note(request, wanted, 503, 0)
            return web.Response(status=503, text="try later")
        if kind == "no ranges":
            headers.pop("Range", None)
        url = self.upstream + request.raw_path
        async with self._session.request(
            request.method, url, headers=headers, data=io.BytesIO(body), allow_redirects=False
        ) as upstream:
            content = await upstream.read()
            status = upstream.status
            headers = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP}
        if kind == "drop":
            request.transport.abort()
            return web.Response()
        return await self._answer(request, wanted, kind, status, headers, content)

    async def _answer(
        self, request: Any, wanted: str | None, kind: str | None, status: int, headers: dict[str, str], content: bytes
    ) -> Any:
        if kind in ("no ranges", "no length"):
            headers.pop("Accept-Ranges", None)
        if kind == "short" and wanted is not None:
            content = content[: len(content) // 2]
            headers["Content-Length"] = str(len(content))
        if request.method == "HEAD":
            content = b""
        response = web.StreamResponse(status=status, headers=headers)
        if kind == "no length":
            response.headers.pop("Content-Length", None)
            response.enable_chunked_encoding()
        elif request.method == "HEAD":
            self._note(request, wanted, status, 0)
            return web.Response(status=status, headers=headers)
        note = self._note(request, wanted, status, 0)
        await response.prepare(request)
        whole = len(content) // 2 if kind == "cut" else len(content)
        for piece in _pieces(content[:whole], 1 if kind == "dribble" else 2**16):
            note.size += len(piece)  # before it is written: who has got it finds it counted
            await response.write(piece)
        if kind == "cut":
            request.transport.close()
        return response

    def _note(self, request: Any, wanted: str | None, status: int, size: int) -> Request:
        self.requests.append(Request(request.method, request.path, wanted, status, size))
        return self.requests[-1]


def _pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))
