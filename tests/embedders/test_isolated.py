"""Decoders in a child process: what they give, and what becomes of pictures that crash or hang them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.embedders import autocast as autocast_module
from nemo_image.embedders import network as network_module
from nemo_image.embedders import prepared as prepared_module
from nemo_image.embedders.preprocess import (
    GuardedPreprocessor,
    IsolatedPreprocessor,
    PreprocessedBatch,
    Preprocessor,
    PreprocessSpec,
    TorchvisionPreprocessor,
    make_preprocessor,
    start_ahead,
)
from nemo_image.engine.decoding import isolated, pool, server
from nemo_image.engine.isolation import isolate
from nemo_image.errors import ArgumentError, ShardError
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, sample, write_rows, write_tar

HALF = (0.5, 0.5, 0.5)
SPEC = PreprocessSpec("shortest", (36, 36), (32, 32), HALF, HALF)
GOOD = [encoded(picture(seed), quality=90) for seed in range(6)]
CUT = GOOD[0][:200]
LIMIT = 5.0
"""Seconds for a picture that hangs; good ones need a hundredth of one."""


def odd(inner: Preprocessor, act: Callable[[bytes], None]) -> Preprocessor:
    """Return a preprocessor that first acts on each picture. Its class is local, so that it is pickled by value."""

    class Odd:
        @property
        def spec(self) -> PreprocessSpec | None:
            return inner.spec

        def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
            for blob in blobs:
                if blob is not None:
                    act(blob)
            return inner(blobs)

    return Odd()


def misbehave(blob: bytes) -> None:
    """Do what the picture's tail says: behind the end of a JPEG, good decoders do not look."""
    tail = blob[-8:]
    if tail == b"segfault":
        ctypes.string_at(0)
    elif tail == b"  aborts":
        os.abort()
    elif tail == b"   exits":
        os._exit(7)
    elif tail == b"   hangs":
        threading.Event().wait()
    elif tail == b"   eats ":
        bytearray(2**31)
    elif tail == b"  talks ":
        os.write(1, b"noise on stdout")
        print("more of it")


def by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function of this module that the child, who cannot import it, can unpickle."""
    return type(function)(function.__code__, {**globals(), "__name__": "__main__"}, function.__name__)


def misbehaving() -> Preprocessor:
    return odd(TorchvisionPreprocessor(SPEC, 2), by_value(misbehave))


def same(one: PreprocessedBatch, other: PreprocessedBatch) -> bool:
    assert torch.equal(one.pixels, other.pixels)
    assert one.pixels.dtype == other.pixels.dtype
    names = ("rows", "errors", "widths", "heights", "normalized")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def no_idle_server() -> Iterator[None]:
    server._end_all_idle()
    yield
    server._end_all_idle()


# --------------------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize("decoder", ["torchvision", "pillow", "dali"])
def test_the_same_as_without_a_child(decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    inner = make_preprocessor(SPEC, decoder=decoder, num_threads=2)  # type: ignore[arg-type]
    with IsolatedPreprocessor(inner) as child:
        assert child.spec is SPEC
        for blobs in (GOOD, [*GOOD[:2], None, CUT, b"", b"<html>", *GOOD[2:]], [None, CUT], [None], []):
            assert same(child(blobs), inner(blobs))


def test_a_transform_that_does_not_convert() -> None:
    size = 20
    inner = make_preprocessor(lambda image: torch.full((3, size, size), image.width / 3), decoder="pillow")
    with IsolatedPreprocessor(inner) as child:
        assert child.spec is None
        for blobs in ([*GOOD, CUT], [CUT]):
            assert same(child(blobs), inner(blobs))


def test_culprits_are_named_and_cost_themselves_only() -> None:
    tails = [b"segfault", b"  aborts", b"   exits", b"   hangs", b"  talks "]
    blobs: list[bytes | None] = [None, CUT]
    for number, tail in enumerate(tails):
        blobs += [GOOD[number], GOOD[number] + tail]
    reasons = {
        3: "crashed: the decoder ended with SIGSEGV",
        5: "crashed: the decoder ended with SIGABRT",
        7: "crashed: the decoder ended with exit status 7",
        9: "hung: no result within 5 s",
    }
    expected = TorchvisionPreprocessor(SPEC, 2)([None if row in reasons else blob for row, blob in enumerate(blobs)])
    with IsolatedPreprocessor(misbehaving(), seconds=LIMIT) as child:
        found = child(blobs)
    assert torch.equal(found.pixels, expected.pixels)
    assert (found.rows, found.widths, found.heights) == (expected.rows, expected.widths, expected.heights)
    assert found.errors == [reasons.get(row, error) for row, error in enumerate(expected.errors)]
    assert found.errors[0] == "missing: the sample has no picture"
    assert found.rows == [2, 4, 6, 8, 10, 11]


def test_a_batch_of_culprits_only() -> None:
    with IsolatedPreprocessor(misbehaving()) as child:
        found = child([GOOD[0] + b"segfault", GOOD[1] + b"   exits"])
    assert (found.rows, tuple(found.pixels.shape)) == ([], (0, 3, 32, 32))
    assert [str(error).partition(":")[0] for error in found.errors] == ["crashed", "crashed"]


def test_the_batches_after_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    with IsolatedPreprocessor(misbehaving()) as child, caplog.at_level(logging.WARNING):
        child([GOOD[0], GOOD[1] + b"segfault"])
        assert same(child(GOOD), TorchvisionPreprocessor(SPEC)(GOOD))
    assert caplog.text.count("in a batch of 2 pictures") == 1


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_has_a_ceiling() -> None:
    with IsolatedPreprocessor(misbehaving(), memory=2**30) as child:
        found = child([GOOD[0], GOOD[1] + b"   eats "])
    assert found.errors == [None, "memory: decoding it takes more than 1 GiB"]


def test_a_real_picture_above_the_ceiling_is_named_and_its_neighbours_are_not() -> None:
    large = encoded(picture(1, 6000, 6000), "PNG", compress_level=1)
    inner = TorchvisionPreprocessor(SPEC, 2)
    with IsolatedPreprocessor(inner, memory=64 * 2**20) as child:
        found = child([GOOD[0], large, GOOD[1]])
    assert found.rows == [0, 2]
    assert str(found.errors[1]).startswith("memory: ")
    with IsolatedPreprocessor(inner) as child:
        assert child([GOOD[0], large, GOOD[1]]).rows == [0, 1, 2]


def test_an_error_that_only_neighbours_cause() -> None:
    class Crowded:
        spec = SPEC

        def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
            kept = [blob if row == 0 or len(blobs) == 1 else b"" for row, blob in enumerate(blobs)]
            return TorchvisionPreprocessor(SPEC, 1)(kept)

    with IsolatedPreprocessor(Crowded()) as child:
        assert same(child(GOOD), TorchvisionPreprocessor(SPEC)(GOOD))


def spoilt_by(event: bytes, reason: str) -> Preprocessor:
    """Return a preprocessor whose process gives nothing but a reason once it has seen a picture with that tail."""
    inner, act = TorchvisionPreprocessor(SPEC, 1), by_value(misbehave)

    class Spoilt:
        spec = SPEC
        spoilt = False

        def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
            batch = inner([b"" if self.spoilt else blob for blob in blobs])
            if self.spoilt:
                batch.errors[:] = [reason] * len(blobs)
            for blob in blobs:
                self.spoilt = self.spoilt or str(blob)[-len(event) - 1 : -1] == event.decode()
                act(blob or b"")
            return batch

    return Spoilt()


def test_after_a_crash_no_picture_sees_what_another_did_to_its_process() -> None:
    blobs = [GOOD[0] + b"  spoils", GOOD[1], GOOD[2] + b"segfault"]
    with IsolatedPreprocessor(spoilt_by(b"spoils", "corrupt: not this one's fault")) as child:
        assert child(blobs).errors == [None, None, "crashed: the decoder ended with SIGSEGV"]


def test_memory_that_earlier_pictures_took_is_no_picture_s_fault() -> None:
    with IsolatedPreprocessor(spoilt_by(b"spoils", "memory: leaked by another")) as child:
        assert child([GOOD[0] + b"  spoils"]).errors == [None]
        assert child([GOOD[1], GOOD[2]]).errors == [None, None]


# --------------------------------------------------------------------------------------------- exceptions, not pictures


def test_what_the_preprocessor_raises_is_raised() -> None:
    inner = make_preprocessor(lambda image: torch.zeros(3, image.width, 4), decoder="pillow")
    blobs = [GOOD[0], encoded(picture(1, 80, 48))]
    with IsolatedPreprocessor(inner) as child, pytest.raises(ArgumentError, match="several shapes"):
        child(blobs)


def test_shapes_that_differ_are_seen_when_pictures_are_decoded_alone() -> None:
    inner = make_preprocessor(lambda image: torch.zeros(3, image.width, 4), decoder="pillow")
    blobs = [GOOD[0], encoded(picture(1, 80, 48)), GOOD[0] + b"segfault"]
    with (
        IsolatedPreprocessor(odd(inner, by_value(misbehave))) as child,
        pytest.raises(ArgumentError, match="several shapes"),
    ):
        child(blobs)


def test_an_exception_that_cannot_be_pickled() -> None:
    def act(blob: bytes) -> None:
        class PickyError(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__(f"{one} and {two}")

        raise PickyError(1, 2)

    with IsolatedPreprocessor(odd(TorchvisionPreprocessor(SPEC), act)) as child:
        with pytest.raises(RuntimeError, match="PickyError: 1 and 2"):
            child(GOOD)
        with pytest.raises(RuntimeError, match="PickyError: 1 and 2"):
            child(GOOD)


def test_a_preprocessor_that_the_child_cannot_build() -> None:
    class Unbuildable:
        spec = None

        def __reduce__(self) -> tuple[Any, ...]:
            return int, ("no number",)

    with IsolatedPreprocessor(Unbuildable()) as child, pytest.raises(ShardError, match="invalid literal"):  # type: ignore[arg-type]
        child(GOOD)


@pytest.mark.usefixtures("no_idle_server")
def test_a_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.sys, "executable", "/bin/false")
    with IsolatedPreprocessor(misbehaving()) as child, pytest.raises(ShardError, match="exit status 1 before it was"):
        child(GOOD)


@pytest.mark.usefixtures("no_idle_server")
def test_a_current_folder_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = AsksForFolder(make_preprocessor(SPEC, decoder="pillow"))
    here = tmp_path / "here"
    here.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(here)
        start_ahead()
        with IsolatedPreprocessor(inner) as child:  # type: ignore[arg-type]
            assert child(GOOD).errors == [None] * len(GOOD)
            here.rmdir()
            child._server.end_decoder()
            assert child(GOOD).errors == [None] * len(GOOD)
        server._end_all_idle()
        with IsolatedPreprocessor(inner) as child:  # type: ignore[arg-type]  # a child that starts without a folder
            assert child(GOOD).errors == [None] * len(GOOD)


class AsksForFolder:
    """Decodes, and asks for the current folder, as libraries do."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.spec = inner.spec

    def __call__(self, blobs: Any) -> Any:
        os.path.abspath("x")
        return self.inner(blobs)


# ---------------------------------------------------------------------------------------------------- life of the child


@pytest.mark.usefixtures("no_idle_server")
def test_a_child_is_kept_for_the_next_and_then_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    start_ahead()
    pids = []
    for _ in range(2):
        with IsolatedPreprocessor(misbehaving()) as child:
            child(GOOD)
            pids.append(child._server._process.pid)
    assert pids[0] == pids[1]
    assert runs(pids[0])
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.0)
    start_ahead()
    assert eventually(lambda: not runs(pids[0]))


def test_two_at_the_same_time_do_not_share() -> None:
    other_spec = PreprocessSpec("exact", (8, 8), (8, 8), HALF, HALF)
    with IsolatedPreprocessor(misbehaving()) as one:
        with IsolatedPreprocessor(TorchvisionPreprocessor(other_spec)) as other:
            for _ in range(2):
                assert same(one(GOOD), TorchvisionPreprocessor(SPEC)(GOOD))
                assert same(other(GOOD), TorchvisionPreprocessor(other_spec)(GOOD))
        # A child process that was given back serves the next one's preprocessor.
        with IsolatedPreprocessor(TorchvisionPreprocessor(SPEC)) as third:
            assert same(third(GOOD), one(GOOD))


def test_a_keyboard_interrupt_does_not_reach_it() -> None:
    with IsolatedPreprocessor(misbehaving()) as child:
        child(GOOD)
        assert os.getsid(child._server._process.pid) != os.getsid(0)


def test_the_child_itself_is_killed() -> None:
    with IsolatedPreprocessor(misbehaving()) as child:
        child(GOOD)
        os.kill(child._server._process.pid, signal.SIGKILL)
        # The batch is lost with its decoder; its pictures are then decoded alone.
        assert same(child(GOOD), TorchvisionPreprocessor(SPEC)(GOOD))


def test_closing_ends_what_another_thread_waits_for(tmp_path: Path) -> None:
    begun = str(tmp_path / "begun")

    def hang(blob: bytes) -> None:
        open(begun, "w").close()
        threading.Event().wait()

    child = IsolatedPreprocessor(odd(TorchvisionPreprocessor(SPEC), hang))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            child(GOOD)
        except BaseException as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert eventually(lambda: os.path.exists(begun))
    child.close()
    asking.join(60)
    assert not asking.is_alive()
    assert [type(error) for error in errors] == [ShardError]
    with pytest.raises(ShardError, match="closed"):
        child(GOOD)


def test_it_ends_with_its_parent_though_it_hangs(tmp_path: Path) -> None:
    code = f"""
import os, threading
from nemo_image.embedders.preprocess import IsolatedPreprocessor, PreprocessSpec
def hang(blobs):
    with open({str(tmp_path / "begun")!r}, "w") as file:
        file.write(f"{{os.getpid()}} {{os.getppid()}}")
    os.rename({str(tmp_path / "begun")!r}, {str(tmp_path / "pids")!r})
    threading.Event().wait()
hang.spec = None
IsolatedPreprocessor(hang)([b"x"])
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        assert eventually((tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(runs(pid) for pid in pids)
        parent.kill()
    assert eventually(lambda: not any(runs(pid) for pid in pids))


# ----------------------------------------------------------------------------------------------------- where it is used


def reasons_of_odd_pictures(preprocessor: Any, blobs: Any) -> list[str | None]:
    with IsolatedPreprocessor(preprocessor) as child:
        return list(child(blobs).errors)


@pytest.mark.parametrize("where", ["thread", "worker"])
def test_in_a_thread_and_in_a_worker(where: str, request: pytest.FixtureRequest) -> None:
    blobs = [GOOD[0], GOOD[1] + b"segfault", GOOD[2]]
    found: list[Any] = []
    if where == "thread":
        thread = threading.Thread(target=lambda: found.append(reasons_of_odd_pictures(misbehaving(), blobs)))
        thread.start()
        thread.join()
    else:
        cluster = request.getfixturevalue("cluster")
        function = by_value(reasons_of_odd_pictures)
        before = cluster.run(os.getpid)
        found.append(cluster.submit(function, misbehaving(), blobs).result(timeout=120))
        assert cluster.run(os.getpid) == before
    assert found == [[None, "crashed: the decoder ended with SIGSEGV", None]]


@pytest.mark.slow
def test_a_guard_leaves_decoding_here_until_a_picture_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "hangs"
    flag.touch()
    name, here = str(flag), os.getpid()

    class Hanging(TorchvisionPreprocessor):
        """A picture that says so hangs for as long as a file is there."""

        def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
            def one(row: int) -> None:
                if (blobs[row] or b"").endswith(b"   hangs"):
                    while os.path.exists(name):
                        time.sleep(0.01)

            pool.for_each_row(one, len(blobs), 2)
            batch = super().__call__(blobs)
            return PreprocessedBatch(
                batch.pixels, batch.rows, batch.errors, [os.getpid()] * len(blobs), batch.heights, batch.normalized
            )

    Hanging(SPEC, 2)(GOOD)  # the first picture of all imports what it needs
    monkeypatch.setattr(pool, "SECONDS_A_PICTURE", 1.0)
    monkeypatch.setattr(isolated, "SECONDS_A_PICTURE", LIMIT)
    try:
        with GuardedPreprocessor(Hanging(SPEC, 2)) as guard, caplog.at_level(logging.WARNING):
            assert guard(GOOD).widths == [here] * len(GOOD)
            found = guard([GOOD[0], GOOD[1] + b"   hangs", GOOD[2]])
            assert found.errors == [None, "hung: no result within 5 s", None]
            assert here not in guard(GOOD).widths
        assert caplog.text.count("and the next ones are decoded in a child process") == 1
        with GuardedPreprocessor(Hanging(SPEC, 2)) as guard:
            assert guard(GOOD).widths == [here] * len(GOOD)
    finally:
        flag.unlink()


def test_a_guard_isolates_at_once_where_the_task_says_so() -> None:
    with isolate(), GuardedPreprocessor(misbehaving()) as guard:
        assert guard([GOOD[0] + b"segfault"]).errors == ["crashed: the decoder ended with SIGSEGV"]


# --------------------------------------------------------------------------------------------------------- the embedder


def odd_dataset(folder: Path, tail: bytes) -> ImageTextPairDataset:
    """Write a shard of five pictures, the third of which misbehaves."""
    samples = [sample(seed, f"{seed:03d}") for seed in range(5)]
    samples[2][1]["jpg"] += tail
    write_tar(folder / "a.tar", samples)
    write_rows(folder / "a.parquet", {"key": [key for key, _ in samples]})
    return ImageTextPairDataset.from_webdataset(str(folder))


def odd_embedder(**options: Any) -> TimmImageEmbedder:
    embedder = TimmImageEmbedder(TINY_MODEL, batch_size=2, **options)
    own = embedder.preprocessor
    act = by_value(misbehave)
    embedder.preprocessor = lambda device, num_threads: odd(own(device, num_threads), act)  # type: ignore[method-assign]
    return embedder


def plain_frame(tmp_path: Path) -> Any:
    plain = TimmImageEmbedder(TINY_MODEL, batch_size=2, autocast=False)
    return plain(odd_dataset(tmp_path / "plain", b"")).metadata.compute()


def test_embedding_an_isolated_shard(tmp_path: Path) -> None:
    dataset = odd_dataset(tmp_path / "odd", b"segfault")
    prepared = odd_embedder(autocast=False).prepare(dataset)
    with isolate():
        found = prepared.embed_rows(dataset.source, "a", [f"{seed:03d}" for seed in range(5)])
    assert found.errors == {2: "crashed: the decoder ended with SIGSEGV"}
    assert found.rows.tolist() == [0, 1, 3, 4]
    expected = plain_frame(tmp_path)
    for row, vector in zip(found.rows.tolist(), found.matrix, strict=True):
        # Batches of other sizes round differently.
        assert vector.tolist() == pytest.approx(list(expected["image_embedding"].iloc[row]), abs=1e-6)
    assert found.widths == dict.fromkeys([0, 1, 3, 4], 64)


@pytest.mark.slow
def test_a_picture_that_kills_its_worker_costs_itself_only(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    embedder = odd_embedder(autocast=False)
    dataset = embedder(odd_dataset(tmp_path / "odd", b"segfault"))
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        before = set(cluster.scheduler_info["workers"])
        frame = dataset.save_metadata(tmp_path / "out").metadata.compute()
        assert set(cluster.scheduler_info["workers"]) != before
    assert frame["image_error"].dropna().to_dict() == {2: "crashed: the decoder ended with SIGSEGV"}
    assert frame["image_embedding"].notna().tolist() == [True, True, False, True, True]
    assert list((tmp_path / "out" / "_nemo_image" / "attempts").glob("*")) == []


def test_the_probe_does_not_crash_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []

    def probe(forward: Any, pixels: torch.Tensor, device: str) -> str:
        probed.append(len(pixels))
        return "float32"

    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(autocast_module, "probe_dtype", probe)
    odd_embedder().prepare(odd_dataset(tmp_path, b"segfault"))
    assert probed == [4]


def test_nothing_is_decoded_for_a_probe_without_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: None)
    monkeypatch.setattr(network_module, "start_ahead", lambda: pytest.fail("a child process for nothing"))
    monkeypatch.setattr(prepared_module, "IsolatedPreprocessor", lambda *_: pytest.fail("pictures decoded for nothing"))
    make_dataset(tmp_path, {"a": 2})
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    assert TimmImageEmbedder(TINY_MODEL).prepare(dataset).dtype == "float32"
