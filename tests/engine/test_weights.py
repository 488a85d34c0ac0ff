from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import re
import socket
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nemo_image.engine import weights
from nemo_image.engine.weights import WeightsSource, fetch_weights, home, load_state_dict, sha256_file
from nemo_image.errors import ArgumentError, WeightsError

HTML = b"<!DOCTYPE html>\n<html><head><title>Not Found</title></head><body>Sorry</body></html>"


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"layer.weight": torch.randn(5, 3, generator=generator), "layer.bias": torch.randn(5, generator=generator)}


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


GOOD = saved(state())
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()


class Server:
    """A web server on this machine whose answers the test writes, one for each request; the last one stays."""

    def __init__(self) -> None:
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[str] = []
        self.asked = threading.Semaphore(0)
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                outer.asked.release()
                number = min(len(outer.requests), len(outer.answers)) - 1
                outer.answers[number](self)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, name: str = "net.pth") -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    # Answers

    def body(self, content: bytes, status: int = 200, length: int | None = -1) -> None:
        """Send `content`; `length` is what the header claims (-1: the truth, None: nothing)."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            if length is not None:
                handler.send_header("Content-Length", str(len(content) if length == -1 else length))
            handler.end_headers()
            handler.wfile.write(content)

        self.answers.append(answer)

    def hang(self, after: bytes = b"") -> None:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            if after:
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(GOOD)))
                handler.end_headers()
                handler.wfile.write(after)
                handler.wfile.flush()
            self.closing.wait()

        self.answers.append(answer)

    def hang_up(self) -> None:
        self.answers.append(lambda handler: handler.connection.close())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEMO_IMAGE_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetch(server: Server, folder: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"timeout_s": 30.0, "retries": 2, "backoff_s": 0.0, "folder": folder} | options
    return fetch_weights(server.url(), "net.pth", **settings)


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


class TestHome:
    def test_the_variable_decides(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("NEMO_IMAGE_HOME", str(tmp_path / "x"))
        assert home() == tmp_path / "x"

    def test_a_relative_one_is_made_absolute(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NEMO_IMAGE_HOME", "y")
        assert home() == tmp_path / "y"

    @pytest.mark.parametrize(
        ("system", "variables", "below_home"),
        [
            ("Linux", {}, ".cache/nemo_image"),
            ("Linux", {"XDG_CACHE_HOME": "HOME/xdg"}, "xdg/nemo_image"),
            ("Linux", {"XDG_CACHE_HOME": "relative"}, ".cache/nemo_image"),
            ("Darwin", {"XDG_CACHE_HOME": "HOME/xdg"}, "Library/Caches/nemo_image"),
            ("Windows", {"LOCALAPPDATA": "HOME/Local"}, "Local/nemo_image"),
            ("Windows", {}, "AppData/Local/nemo_image"),
        ],
    )
    def test_platform_default(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        system: str,
        variables: dict[str, str],
        below_home: str,
    ) -> None:
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        for name in ("NEMO_IMAGE_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value.replace("HOME", str(tmp_path)))
        assert home() == tmp_path / below_home


class TestSha256:
    def test_equals_hashlib_and_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "w"
        path.write_bytes(GOOD)
        assert sha256_file(path) == GOOD_SHA256
        monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert sha256_file(str(path)) == GOOD_SHA256

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        path = tmp_path / "w"
        path.write_bytes(b"one")
        before = sha256_file(path)
        path.write_bytes(b"two")
        found = path.stat()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
        assert sha256_file(path) == hashlib.sha256(b"two").hexdigest() != before

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "none.pth"))):
            sha256_file(tmp_path / "none.pth")


class TestFetch:
    def test_good(self, server: Server, tmp_path: Path) -> None:
        server.body(GOOD)
        path = fetch(server, tmp_path / "new" / "folder", sha256=GOOD_SHA256.upper())
        assert path == tmp_path / "new" / "folder" / "net.pth"
        assert path.read_bytes() == GOOD
        assert files(path.parent) == ["net.pth"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()

    def test_what_is_there_is_not_asked_for_again(self, server: Server, tmp_path: Path) -> None:
        server.body(GOOD)
        assert fetch(server, tmp_path) == fetch(server, tmp_path, sha256=GOOD_SHA256)
        assert server.requests == ["/net.pth"]

    def test_the_default_folder_is_home(self, server: Server, tmp_path: Path) -> None:
        server.body(GOOD)
        source = WeightsSource(server.url("a%2Bb.pth"), "a+b.pth", GOOD_SHA256)
        assert source.fetch() == tmp_path / "home" / "a+b.pth"
        assert server.requests == ["/a%2Bb.pth"]

    @pytest.mark.parametrize("length", [None, -1], ids=["no length", "length"])
    def test_bigger_than_one_piece(self, server: Server, tmp_path: Path, length: int | None) -> None:
        content = saved({"w": torch.arange(700_000, dtype=torch.float32)})
        assert len(content) > 2 * weights.CHUNK
        server.body(content, length=length)
        assert fetch(server, tmp_path).read_bytes() == content

    def test_safetensors(self, server: Server, tmp_path: Path) -> None:
        server.body(safetensors.torch.save(state()))
        path = fetch_weights(server.url(), "net.safetensors", folder=tmp_path)
        assert same(load_state_dict(path), state())

    def test_busy_then_good(self, server: Server, tmp_path: Path) -> None:
        server.body(HTML, status=503)
        server.body(b"", status=429)
        server.body(GOOD)
        assert fetch(server, tmp_path).read_bytes() == GOOD
        assert len(server.requests) == 3

    def test_truncated_then_good(self, server: Server, tmp_path: Path) -> None:
        server.body(GOOD[:100], length=len(GOOD))
        server.hang_up()
        server.body(GOOD)
        assert fetch(server, tmp_path).read_bytes() == GOOD

    def test_waits_double(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[float] = []
        monkeypatch.setattr("time.sleep", waits.append)
        server.body(b"", status=500)
        with pytest.raises(WeightsError):
            fetch(server, tmp_path, retries=3, backoff_s=0.5)
        assert waits == [0.5, 1.0, 2.0]

    @pytest.mark.parametrize(
        ("answer", "requests", "says"),
        [
            (lambda server: server.body(HTML, status=404), 1, "404 Not Found"),
            (lambda server: server.body(HTML, status=403), 1, "403 Forbidden"),
            (lambda server: server.body(HTML), 1, r"an HTML page \(it starts with b'<!DOCTYPE html>"),
            (lambda server: server.body(b"\n <html>x"), 1, "an HTML page"),
            (lambda server: server.body(b'{"error": "no"}'), 1, r"""starts with b'{"error": "no"}'"""),
            (lambda server: server.body(b"version https://git-lfs.github.com/spec/v1\n"), 1, "Git LFS pointer"),
            (lambda server: server.body(b"", status=503), 3, "503 Service Unavailable"),
            (lambda server: server.body(b""), 3, "the answer is empty"),
            (lambda server: server.body(GOOD[:100], length=len(GOOD)), 3, f"broke after 100 of {len(GOOD)} bytes"),
            (lambda server: server.body(GOOD[:100], length=None), 3, "damaged or not a PyTorch file"),
            (lambda server: server.body(saved(state(1))), 3, "SHA-256 [0-9a-f]{64}, the published file has"),
            (lambda server: server.hang_up(), 3, "the connection broke|no connection"),
        ],
    )
    def test_bad_answers(
        self, server: Server, tmp_path: Path, answer: Callable[[Server], None], requests: int, says: str
    ) -> None:
        answer(server)
        sha256 = GOOD_SHA256 if "SHA" in says else None
        with pytest.raises(WeightsError, match=says) as caught:
            fetch(server, tmp_path, sha256=sha256)
        text = str(caught.value)
        assert "\n" not in text
        assert server.url() in text
        assert f"put it at {tmp_path / 'net.pth'}" in text
        assert "model_path=" in text
        assert len(server.requests) == requests
        assert files(tmp_path) == []

    @pytest.mark.parametrize("sent", [b"", GOOD[:50]], ids=["no answer", "half an answer"])
    def test_hanging(self, server: Server, tmp_path: Path, sent: bytes) -> None:
        server.hang(after=sent)
        with pytest.raises(WeightsError, match=r"no answer within 0\.2 s \(2 attempts\)"):
            fetch(server, tmp_path, timeout_s=0.2, retries=1)
        assert files(tmp_path) == []

    def test_offline(self, tmp_path: Path) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/net.pth"
            with pytest.raises(WeightsError, match="no connection") as caught:
                fetch_weights(url, "net.pth", folder=tmp_path, retries=0)
        assert all(part in str(caught.value) for part in (url, str(tmp_path / "net.pth"), "model_path="))

    def test_a_file_put_there_by_hand_serves_offline(self, tmp_path: Path) -> None:
        (tmp_path / "net.pth").write_bytes(GOOD)
        assert fetch_weights("http://127.0.0.1:9/net.pth", "net.pth", GOOD_SHA256, folder=tmp_path).exists()

    def test_a_wrong_file_put_there_stays_and_is_named(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "net.pth").write_bytes(b"mine")
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "net.pth"))):
            fetch(server, tmp_path, sha256=GOOD_SHA256)
        assert (tmp_path / "net.pth").read_bytes() == b"mine"
        assert server.requests == []

    def test_a_folder_that_cannot_be_written_to(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        server.body(GOOD)
        with pytest.raises(WeightsError, match="NEMO_IMAGE_HOME"):
            fetch(server, tmp_path / "file" / "below")

    def test_a_full_disk(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        server.body(GOOD)
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(WeightsError, match="No space left on device"):
            fetch(server, tmp_path)
        assert files(tmp_path) == []

    def test_the_final_name_comes_last_and_at_once(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        fsync, replace = os.fsync, os.replace

        def spy_fsync(descriptor: int) -> None:
            steps.append("fsync")
            fsync(descriptor)

        def spy_replace(source: Path, target: Path) -> None:
            steps.append("replace")
            assert source.read_bytes() == GOOD
            assert not target.exists()
            replace(source, target)

        monkeypatch.setattr("os.fsync", spy_fsync)
        monkeypatch.setattr("os.replace", spy_replace)
        server.body(GOOD)
        assert fetch(server, tmp_path).read_bytes() == GOOD
        assert steps == ["fsync", "replace", "fsync"]

    @pytest.mark.parametrize(
        "arguments",
        [
            {"url": "file:///etc/passwd"},
            {"url": "ftp://127.0.0.1/x"},
            {"filename": "../x.pth"},
            {"filename": "a/b"},
            {"filename": "a\\b"},
            {"filename": ""},
            {"filename": ".."},
            {"retries": -1},
            {"timeout_s": 0},
            {"backoff_s": -1},
        ],
    )
    def test_unusable_arguments(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            fetch_weights(**({"url": "http://127.0.0.1:9/x", "filename": "x", "folder": tmp_path} | arguments))

    def test_leftovers_of_killed_processes_go_and_running_ones_stay(self, server: Server, tmp_path: Path) -> None:
        for name in ("old", "young"):
            (tmp_path / f".net.pth.{name}.tmp").mkdir()
            (tmp_path / f".net.pth.{name}.tmp" / "body").write_bytes(b"PK")
        for entry in (tmp_path / ".net.pth.old.tmp" / "body", tmp_path / ".net.pth.old.tmp"):
            os.utime(entry, (1, 1))
        server.body(GOOD)
        fetch(server, tmp_path)
        assert files(tmp_path) == [".net.pth.young.tmp", "net.pth"]

    def test_killed_in_the_middle_leaves_nothing_under_the_final_name(self, server: Server, tmp_path: Path) -> None:
        server.hang(after=GOOD[:50])
        child = _child(server.url(), tmp_path)
        try:
            # Half of the answer may have arrived or not: nothing may be there in either case.
            assert server.asked.acquire(timeout=60)
        finally:
            child.kill()
            child.wait()
        assert not (tmp_path / "net.pth").exists()

    def test_several_processes_at_once(self, server: Server, tmp_path: Path) -> None:
        count = 3
        everyone = threading.Barrier(count)

        def answer(handler: BaseHTTPRequestHandler) -> None:
            everyone.wait(timeout=60)  # none has the file before all have asked for it
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(GOOD)))
            handler.end_headers()
            handler.wfile.write(GOOD)

        server.answers.append(answer)
        children = [_child(server.url(), tmp_path) for _ in range(count)]
        assert [child.wait(timeout=120) for child in children] == [0] * count
        assert len(server.requests) == count
        assert (tmp_path / "net.pth").read_bytes() == GOOD
        assert files(tmp_path) == ["net.pth"]


class TestZipMember:
    def test_only_the_member_is_taken(self, server: Server, tmp_path: Path) -> None:
        server.body(zipped({"../../evil.py": b"x", "readme": b"y", "inner.pth": GOOD}))
        path = fetch(server, tmp_path / "a" / "b", member="inner.pth", sha256=GOOD_SHA256)
        assert path == tmp_path / "a" / "b" / "net.pth"
        assert path.read_bytes() == GOOD
        assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["net.pth"]

    @pytest.mark.parametrize("name", ["../../up/inner.pth", "/abs/inner.pth", "folder/inner.pth"])
    def test_its_folder_in_the_archive_is_not_used(self, server: Server, tmp_path: Path, name: str) -> None:
        server.body(zipped({name: GOOD, "__MACOSX/._inner.pth": b"junk"}))
        assert fetch(server, tmp_path / "a" / "b", member="inner.pth").read_bytes() == GOOD
        assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["net.pth"]

    def test_an_exact_name_wins(self, server: Server, tmp_path: Path) -> None:
        server.body(zipped({"old/inner.pth": saved(state(1)), "inner.pth": GOOD}))
        assert fetch(server, tmp_path, member="inner.pth").read_bytes() == GOOD

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (zipped({"a/inner.pth": GOOD, "b/inner.pth": GOOD}), "2 files named inner.pth"),
            (zipped({"other.pth": GOOD}), "0 files named inner.pth; it has other.pth"),
            (zipped({}), "no weights file that we know|0 files named inner.pth"),
            (zipped({"inner.pth": HTML}), "an HTML page"),
            (zipped({"inner.pth": b""}), "an empty file"),
            (zipped({"inner.pth": GOOD})[:-40], "the zip archive is damaged"),
            (pickle.dumps({}), "not a zip archive"),
            (HTML, "an HTML page"),
        ],
    )
    def test_bad_archives(self, server: Server, tmp_path: Path, content: bytes, says: str) -> None:
        server.body(content)
        with pytest.raises(WeightsError, match=says) as caught:
            fetch(server, tmp_path, member="inner.pth")
        assert "take inner.pth out of it" in str(caught.value)
        assert str(tmp_path / ".net") not in str(caught.value)
        assert files(tmp_path) == []

    def test_flipped_bits_in_the_member(self, server: Server, tmp_path: Path) -> None:
        content = bytearray(zipped({"inner.pth": GOOD}))
        content[len(content) // 2] ^= 0xFF
        server.body(bytes(content))
        with pytest.raises(WeightsError, match="the zip archive is damaged"):
            fetch(server, tmp_path, member="inner.pth")


class Bomb:
    """Unpickling it would make the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class TestLoadStateDict:
    @pytest.mark.parametrize("zip_format", [True, False])
    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}], ids=["plain", "wrapped"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_what_torch_saves(self, tmp_path: Path, zip_format: bool, wrap: Callable[[Any], Any], prefix: str) -> None:
        path = tmp_path / "w.pth"
        content = wrap({prefix + name: value for name, value in state().items()})
        path.write_bytes(saved(content, _use_new_zipfile_serialization=zip_format))
        assert same(load_state_dict(path), state())

    def test_a_prefix_that_not_all_names_share_stays(self, tmp_path: Path) -> None:
        torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pt")
        assert list(load_state_dict(tmp_path / "w.pt")) == ["module.a", "b"]

    def test_a_module_is_loaded_as_it_was_saved(self, tmp_path: Path) -> None:
        net = torch.nn.Linear(3, 2)
        torch.save(net.state_dict(), tmp_path / "w.pt")
        assert same(load_state_dict(str(tmp_path / "w.pt")), dict(net.state_dict()))

    def test_parameters_count_as_tensors(self, tmp_path: Path) -> None:
        torch.save(dict(torch.nn.Linear(3, 2).named_parameters()), tmp_path / "w.pt")
        assert list(load_state_dict(tmp_path / "w.pt")) == ["weight", "bias"]

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
    def test_safetensors_by_content(self, tmp_path: Path, name: str) -> None:
        safetensors.torch.save_file(state(), tmp_path / name)
        assert same(load_state_dict(tmp_path / name), state())

    def test_a_large_safetensors_header(self, tmp_path: Path) -> None:
        many = {f"layer.{number}.weight": torch.full((2,), float(number)) for number in range(3000)}
        safetensors.torch.save_file(many, tmp_path / "w.safetensors")
        assert load_state_dict(tmp_path / "w.safetensors")["layer.2999.weight"].tolist() == [2999.0, 2999.0]

    @pytest.mark.parametrize("zip_format", [True, False])
    def test_a_pickle_bomb_does_not_go_off(self, tmp_path: Path, zip_format: bool) -> None:
        path, mark = tmp_path / "w.pth", tmp_path / "boom"
        path.write_bytes(saved({"a": torch.ones(1), "b": Bomb(mark)}, _use_new_zipfile_serialization=zip_format))
        with pytest.raises(WeightsError, match=r"holds \w+\.mkdir, not only tensors") as caught:
            load_state_dict(path)
        assert str(path) in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert not mark.exists()

    @pytest.mark.parametrize("protocol", range(6))
    def test_a_bare_pickle_bomb_does_not_go_off(self, tmp_path: Path, protocol: int) -> None:
        path, mark = tmp_path / "w.pth", tmp_path / "boom"
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            load_state_dict(path)
        assert not mark.exists()

    def test_the_bomb_is_a_bomb(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
        assert (tmp_path / "boom").exists()

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "an empty file"),
            (HTML, "an HTML page"),
            (b'<?xml version="1.0"?><Error/>', "an XML document"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "Git LFS pointer"),
            (b"hello", "starts with b'hello'"),
            (GOOD[:200], "damaged or not a PyTorch file"),
            (GOOD[:-100], "damaged or not a PyTorch file"),
            (zipped({"inner.pth": GOOD}), "damaged or not a PyTorch file"),
            (safetensors.torch.save(state())[:-4], "damaged safetensors"),
            (safetensors.torch.save(state())[:20], "damaged safetensors"),
            (saved([1, 2]), "holds list, not a state dict"),
            (saved({}), "not a state dict"),
            (saved({"state_dict": {}}), "not a state dict"),
            (saved({"a": torch.ones(1), "lr": 0.1}), "its entry 'lr' is not a tensor"),
            (saved({1: torch.ones(1)}), "its entry 1 is not a tensor"),
            (saved(torch.ones(3)), "holds Tensor"),
            (saved(torch.nn.Linear(2, 2)), "holds torch.nn.modules.linear.Linear, not only tensors"),
        ],
    )
    def test_other_content(self, tmp_path: Path, content: bytes, says: str) -> None:
        path = tmp_path / "w.pth"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=says) as caught:
            load_state_dict(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", (40).to_bytes(8, "little") + b"{"])
    def test_random_bytes(self, tmp_path: Path, start: bytes) -> None:
        rng = random.Random(0)
        path = tmp_path / "w.pth"
        for _ in range(40):
            path.write_bytes(start + rng.randbytes(rng.randrange(1, 400)))
            with pytest.raises(WeightsError, match=re.escape(str(path))):
                load_state_dict(path)

    def test_mutated_files_load_or_are_refused(self, tmp_path: Path) -> None:
        rng = random.Random(1)
        path = tmp_path / "w.pth"
        for _ in range(100):
            content = bytearray(GOOD)
            for _ in range(3):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content)
            # Anything but a WeightsError fails the test.
            with contextlib.suppress(WeightsError):
                assert all(isinstance(value, torch.Tensor) for value in load_state_dict(path).values())

    @pytest.mark.parametrize("name", ["", "none.pth"], ids=["folder", "missing"])
    def test_no_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path / name))):
            load_state_dict(tmp_path / name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _child(url: str, folder: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from nemo_image.engine.weights import fetch_weights; "
        "fetch_weights(sys.argv[1], 'net.pth', folder=sys.argv[2], retries=0, timeout_s=90)"
    )
    root = str(Path(weights.__file__).parents[2])
    return subprocess.Popen([sys.executable, "-c", code, url, str(folder)], env=os.environ | {"PYTHONPATH": root})
