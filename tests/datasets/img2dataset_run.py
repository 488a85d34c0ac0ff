"""Run img2dataset itself against a web server that behaves as the web does, and keep what it writes.

``python -m tests.datasets.img2dataset_run FOLDER [EXECUTABLE]`` makes the sample that is committed beside this file: a
zip, because tars are mostly padding.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from tests.images import chunk
from tests.makers import encoded, picture

EXECUTABLE = "NEMO_IMAGE_IMG2DATASET"
"""Environment variable that names img2dataset's executable where it is not on the PATH."""

SAMPLE = "sample.zip"

TIMEOUT = "--timeout=2"
"""After as many seconds img2dataset gives up a server that never answers."""

PER_SHARD = 10
"""Rows a shard; a power of ten, so that the keys are the shard's five digits and one more."""

SETTINGS: dict[str, list[str]] = {
    # As its README advises for pictures that go into training: small, re-encoded.
    "resized": ["--image_size=48", "--resize_mode=border"],
    # Whatever came is kept, so that pages of HTML and cut pictures become samples.
    "as_is": ["--disable_all_reencoding=True", "--extract_exif=False", "--compute_hash=md5"],
}

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- what is served


def _photo(seed: int) -> bytes:
    return encoded(picture(seed, 40, 30), quality=80)


def _with_exif() -> bytes:
    exif = Image.Exif()
    exif[274], exif[271] = 6, "Käméra"  # orientation, maker
    return encoded(picture(40, 40, 30), quality=80, exif=exif)


def _animated() -> bytes:
    frames = [picture(seed, 24, 18) for seed in (41, 42)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _transparent() -> bytes:
    image = picture(43, 24, 18).convert("RGBA")
    image.putalpha(128)
    return encoded(image, "PNG")


def _bomb() -> bytes:
    """A PNG that announces 1.6 gigapixels, more than OpenCV takes, in a few bytes."""
    header = struct.pack(">IIBBBBB", 40000, 40000, 1, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(5000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


HTML = b"<!DOCTYPE html><html><body>This picture has moved.</body></html>"

BODIES: dict[str, bytes] = {
    "/exif.jpg": _with_exif(),
    "/animated.gif": _animated(),
    "/transparent.png": _transparent(),
    "/picture.webp": encoded(picture(44, 24, 18), "WEBP"),
    "/bomb.png": _bomb(),
    "/empty.jpg": b"",
    "/html.jpg": HTML,
    "/lying-type.jpg": _photo(45),
    "/robots.jpg": _photo(46),
    "/cut-silently.jpg": _photo(47)[:400],
}
TYPES = {"/lying-type.jpg": "text/html", "/animated.gif": "image/gif", "/transparent.png": "image/png"}


class _Handler(BaseHTTPRequestHandler):
    """Answers by path; ``/<number>.jpg`` is the photograph of that seed."""

    server: WebServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answer = {
            "/404.jpg": lambda: self.send_error(404),
            "/500.jpg": lambda: self.send_error(500),
            "/moved.jpg": lambda: self._redirect("/48.jpg"),
            "/in-circles.jpg": lambda: self._redirect("/in-circles.jpg"),
            "/never.jpg": self._never,
            "/cut.jpg": self._cut,
        }.get(path)
        if answer is not None:
            answer()
            return
        body = BODIES[path] if path in BODIES else _photo(int(path.strip("/").removesuffix(".jpg")))
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(path, "image/jpeg"))
        if path == "/robots.jpg":
            self.send_header("X-Robots-Tag", "noai")
        if path != "/cut-silently.jpg":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _never(self) -> None:
        self.server.hanging.set()
        self.connection.recv(1)  # returns once the client has given up

    def _cut(self) -> None:
        body = _photo(49)
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class WebServer(ThreadingHTTPServer):
    """The web, on loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hanging = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


@contextlib.contextmanager
def web_server() -> Iterator[WebServer]:
    """Serve pictures and trouble while the block runs."""
    with WebServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


# -------------------------------------------------------------------------------------------------------- what is asked


def url_rows(url: str) -> list[list[Row]]:
    """Return the rows of each input file; the columns beyond URL and caption differ in type between the two files."""
    good = [f"{url}/{seed}.jpg" for seed in range(PER_SHARD)]
    odd = ["exif.jpg", "animated.gif", "transparent.png", "picture.webp", "moved.jpg", "lying-type.jpg"]
    odd += ["html.jpg", "cut-silently.jpg", "empty.jpg", "bomb.png"]
    bad = ["404.jpg", "500.jpg", "never.jpg", "cut.jpg", "in-circles.jpg", "robots.jpg"]
    nowhere = ["http://127.0.0.1:1/refused.jpg", "no address at all", "", None]
    captions = ["Ein Käfer — 甲虫 🪲", None, "", 'two\nlines, a "quote" and a tab\t', "\\u0000 \u2028 <b>"]
    first: list[str | None] = [*good, *(f"{url}/{name}" for name in odd), *(f"{url}/{name}" for name in bad), *nowhere]
    # The second file: the first picture again (twice), then nothing but failures until its last, short shard.
    second: list[str | None] = [
        good[0],
        good[0],
        *(f"{url}/404.jpg?{number}" for number in range(8)),
        *(f"{url}/{name}" for name in bad),
    ]
    files = []
    for number, urls in enumerate((first, second)):
        rows = []
        for place, one in enumerate(urls):
            row: Row = {"url": one, "caption": captions[place % len(captions)]}
            row["source_id"] = place if number == 0 else place + 0.5
            row["rating"] = None if number == 0 else place / 4
            row["tags"] = ["a", "ü"] if place % 2 else None
            rows.append(row)
        files.append(rows)
    return files


# -------------------------------------------------------------------------------------------------------------- running


def executable() -> str | None:
    """Return where img2dataset's executable is, None if it is nowhere."""
    named = os.environ.get(EXECUTABLE)
    return named if named else shutil.which("img2dataset")


def command(program: str, urls: Path, out: Path, more: Sequence[str]) -> list[str]:
    """Return the command line that the tests and the sample use."""
    return [
        program, str(urls), f"--output_folder={out}", "--output_format=webdataset", "--input_format=jsonl",
        "--url_col=url", "--caption_col=caption", "--save_additional_columns=[source_id,rating,tags]",
        f"--number_sample_per_shard={PER_SHARD}", "--processes_count=1", "--thread_count=4", "--enable_wandb=False",
        *more,
    ]  # fmt: skip


def write_urls(folder: Path, files: Sequence[Sequence[Row]]) -> Path:
    """Write lists of rows as img2dataset's input files."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(files):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{number}.jsonl").write_text(text, encoding="utf-8")
    return folder


def environment() -> dict[str, str]:
    """Return an environment in which img2dataset asks nobody but the local server."""
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **quiet, "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "ignore"}


def run(program: str, urls: Path, out: Path, more: Sequence[str]) -> None:
    """Run img2dataset to its end."""
    done = subprocess.run(
        command(program, urls, out, more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode or not list(out.glob("*_stats.json")):
        raise RuntimeError(f"img2dataset ended with {done.returncode}:\n{done.stdout[-4000:]}")


def run_and_kill(program: str, server: WebServer, urls: Path, out: Path, more: Sequence[str]) -> None:
    """Run img2dataset until it waits for ``/never.jpg``, then kill it with its children."""
    server.hanging.clear()
    with subprocess.Popen(
        command(program, urls, out, more),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            if not server.hanging.wait(120):
                raise RuntimeError("img2dataset never asked for /never.jpg")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def make_sample(program: str, folder: Path) -> None:
    """Write the committed sample: a zip with one folder for each of `SETTINGS`, and a README."""
    lines = []
    with web_server() as server, tempfile.TemporaryDirectory() as made:
        urls = write_urls(Path(made) / "urls", url_rows(server.url))
        for name, more in SETTINGS.items():
            run(program, urls, Path(made) / name, [*more, TIMEOUT])
            words = command("img2dataset", Path("urls"), Path(name), [*more, TIMEOUT])
            lines.append(textwrap.indent(shlex.join(words).replace(" --", " \\\n    --"), "    "))
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / SAMPLE, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(one for one in Path(made).rglob("*") if one.is_file()):
                packed.writestr(zipfile.ZipInfo(path.relative_to(made).as_posix()), path.read_bytes(), 8)
    ask = [
        str(Path(program).parent / "python"),
        "-c",
        "import importlib.metadata as m; print(m.version('img2dataset'))",
    ]
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    readme = [
        "# What img2dataset writes",
        f"`{SAMPLE}` was made by img2dataset {version} itself, against the server in `../img2dataset_run.py`:",
        *lines,
        "After a change there, from the project's root: `python -m tests.datasets.img2dataset_run "
        "tests/datasets/img2dataset_sample EXECUTABLE`.",
    ]
    (folder / "README.md").write_text("\n\n".join(readme) + "\n")


if __name__ == "__main__":
    make_sample(sys.argv[2] if len(sys.argv) > 2 else executable() or "img2dataset", Path(sys.argv[1]))
