"""What runs in the child process of a `DecodeServer`: it forks a decoder whenever it is asked to.

The server itself decodes nothing, so no picture can crash or hang it. It imports what decoders need once, which takes
seconds; a fork of it takes some 30 ms, so that each suspicious picture can have a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import resource
import signal
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nemo_image.engine.decoding import wire
from nemo_image.engine.decoding.pool import DecoderStalledError

Decode = Callable[[list[bytes | None]], Any]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Serve until the other end of the socket is closed, which happens when its process ends, however it ends.

    For each request, ``(pickled function, bytes of memory)`` with the descriptor of a socket, a decoder is forked that
    answers on that socket. None goes back when it has begun, or a text where it could not. The next message ends it;
    its wait status goes back.

    Parameters
    ----------
    modules : sequence of str
        What to import first; not all of it may be there.
    """
    # The last is what the first picture would import, and every fork again.
    for name in (*modules, "torchvision.transforms.v2.functional"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    control = socket.socket(fileno=descriptor)
    loaded: tuple[bytes, Any] = (b"", None)
    gc.freeze()  # so that the forks' collectors leave the shared pages alone
    with contextlib.suppress(EOFError, ConnectionError):
        wire.send(control, "ready")
        while True:
            (pickled, memory), channel = wire.receive_with_descriptor(control)
            try:
                if pickled != loaded[0]:
                    loaded = (pickled, pickle.loads(pickled))
                decoder = _fork(control, channel, loaded[1], memory)
            except Exception as error:
                os.close(channel)
                wire.send(control, f"{type(error).__name__}: {error}")
                continue
            os.close(channel)
            wire.send(control, None)
            try:
                wire.receive(control)
            finally:
                os.kill(decoder, signal.SIGKILL)  # it may hang; a status that it has already stays
                status = os.waitstatus_to_exitcode(os.waitpid(decoder, 0)[1])
            wire.send(control, status)


def _fork(control: socket.socket, channel: int, decode: Decode, memory: int) -> int:
    server = os.getpid()
    with warnings.catch_warnings():
        # Python warns of forking with threads: those of libraries (Arrow's) that decoders do not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        decoder = os.fork()
    if decoder:
        return decoder
    try:
        control.close()
        _restrict(server, memory)
        _serve(socket.socket(fileno=channel), decode)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _restrict(server: int, memory: int) -> None:
    """End with the server; take no more memory than allowed; leave no core file."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Private writable memory only: libraries map far more than they use, so that RLIMIT_AS would measure them.
    limit, hard = _private_bytes() + memory, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # short of memory, the kernel takes this process first


def _private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


def _serve(channel: socket.socket, decode: Decode) -> NoReturn:
    while True:
        try:
            blobs = wire.receive(channel)
        except (EOFError, ConnectionError):
            os._exit(0)
        wire.send(channel, _answer(decode, blobs))


def _answer(decode: Decode, blobs: list[bytes | None]) -> tuple[str, Any]:
    """Return what became of a batch: ``batch``, ``memory``, ``hung`` or ``error``, and its value."""
    try:
        return "batch", decode(blobs)
    except DecoderStalledError:
        return "hung", None
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
            return "memory", None
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception of a library, with a constructor of its own
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return "error", error
