"""The parent's side of the child process that decodes: start it, have it fork a decoder, learn how that ended.

Not `multiprocessing`: Dask's workers are daemons and may have no children of that kind, and the user's ``__main__``
must not run again.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from nemo_image.engine.decoding import wire
from nemo_image.errors import ShardError

SECONDS_TO_START = 300.0
"""Longest time for a child to import torch: seconds on a local disk, minutes on a network one that is busy."""

IDLE_SECONDS = 60.0
"""How long a server is kept for the next who needs one: it takes seconds to start, and half a GiB."""

_START = (
    "import sys; sys.path[:] = {path!r}; from nemo_image.engine.decoding.child import main; "
    "main({descriptor}, {modules!r})"
)


def _here() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # removed
        return os.sep


class DecoderDeathError(Exception):
    """A decoder ended, or was ended, before it gave an answer.

    Attributes
    ----------
    reason : str
        ``"crashed: …"`` or ``"hung: …"``, for `image_error`; the same for the same end.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DecodeServer:
    """A child process that forks decoders, one at a time; it ends with this process, whatever happens to that.

    It starts in the background when it is made, and is waited for when it is first needed. See `borrow_server`.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._control = ours
        self._pid = os.getpid()
        self._ready = False
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()
        path = [os.path.join(_here(), one) for one in sys.path if isinstance(one, str)]
        modules = [name for name in list(sys.modules) if name.startswith("nemo_image.")]  # decoders are of these
        code = _START.format(path=path, descriptor=theirs.fileno(), modules=modules)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what libraries print there would come among the user's own output
                pass_fds=[theirs.fileno()],
                cwd=os.sep,  # ours may be removed while the child is kept, and libraries ask for it
                start_new_session=True,  # an interrupt from the keyboard must not look like a crash
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its threads would be idle, and lost in a fork
            )

    @property
    def alive(self) -> bool:
        """Whether the child process runs, and is this process's own: a fork of this one has no part in it."""
        return self._pid == os.getpid() and self._process.poll() is None

    def ask(self, pickled: bytes, memory: int, blobs: Sequence[bytes | None], seconds: float) -> tuple[str, Any]:
        """Have the present decoder decode a batch, or a new one if there is none.

        Parameters
        ----------
        pickled : bytes
            The function that a new decoder calls.
        memory : int
            Bytes that a new decoder may allocate.
        seconds : float
            Time limit.

        Returns
        -------
        kind, value
            ``"batch"`` and what the function returned, ``"memory"``, ``"hung"``, or ``"error"`` and the exception.

        Raises
        ------
        DecoderDeathError
            If the decoder dies, or does not answer in time. It is gone then.
        ShardError
            If no child process can be started.
        """
        with self._lock:
            try:
                channel = self._channel or self._fork(pickled, memory)
                channel.settimeout(seconds)
                wire.send(channel, list(blobs))
                answer: tuple[str, Any] = wire.receive(channel)
            except TimeoutError:
                self._end()
                raise DecoderDeathError(f"hung: no result within {seconds:g} s") from None
            except (EOFError, OSError):
                raise DecoderDeathError(f"crashed: the decoder ended with {_ending(self._end())}") from None
            return answer

    def end_decoder(self) -> None:
        """End the present decoder, if there is one."""
        with self._lock:
            self._end()

    def close(self) -> None:
        """End the child process; may be called while another thread waits for an answer, which is told of a death."""
        if self._pid == os.getpid():
            self._process.kill()
            self._process.wait()
        with self._lock:
            self._control.close()
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def _fork(self, pickled: bytes, memory: int) -> socket.socket:
        self._await_start()
        self._channel, theirs = socket.socketpair()
        with theirs:
            wire.send(self._control, (pickled, memory), theirs.fileno())
        # The function may have to be imported first, which is no picture's fault.
        self._control.settimeout(SECONDS_TO_START)
        try:
            failure: str | None = wire.receive(self._control)
        except TimeoutError:
            failure = f"it is not ready after {SECONDS_TO_START:g} s"
        if failure is not None:
            self._channel.close()
            self._channel = None
            self._process.kill()
            raise ShardError(f"no decoder can be started in a child process: {failure}")
        self._control.settimeout(None)
        return self._channel

    def _await_start(self) -> None:
        if self._ready:
            return
        self._control.settimeout(SECONDS_TO_START)
        try:
            wire.receive(self._control)
        except (EOFError, OSError) as error:
            self._process.kill()
            raise ShardError(
                f"no child process to decode in: {sys.executable} ended with {_ending(self._process.wait())} before it "
                "was ready; its messages are in this process's standard error"
            ) from error
        self._control.settimeout(None)
        self._ready = True

    def _end(self) -> int:
        """End the present decoder, if there is one; return its exit status, negative for a signal."""
        if self._channel is None:
            return 0
        self._channel.close()
        self._channel = None
        try:
            wire.send(self._control, "end")
            status: int = wire.receive(self._control)
        except (EOFError, OSError):
            return self._process.wait()  # the child process died first, and its decoder with it
        return status


# ------------------------------------------------------------------------------------------------------ idle servers

_idle: dict[DecodeServer, threading.Timer] = {}
_idle_lock = threading.Lock()


def borrow_server() -> DecodeServer:
    """Return a server for the caller alone: an idle one of this process, or a new one."""
    with _idle_lock:
        while _idle:
            server, timer = _idle.popitem()
            timer.cancel()
            if server.alive:
                return server
            server.close()
    return DecodeServer()


def give_back(server: DecodeServer) -> None:
    """Keep a server for the next who needs one; it is ended after `IDLE_SECONDS`."""
    server.end_decoder()
    timer = threading.Timer(IDLE_SECONDS, _end_idle, [server])
    timer.daemon = True
    with _idle_lock:
        _idle[server] = timer
    timer.start()


def start_ahead() -> None:
    """Have a server start in the background, if none is idle: whoever borrows it soon needs not wait as long."""
    give_back(borrow_server())


def _end_idle(server: DecodeServer) -> None:
    with _idle_lock:
        timer = _idle.pop(server, None)
    if timer is not None:
        timer.cancel()
        server.close()


@atexit.register
def _end_all_idle() -> None:
    for server in list(_idle):
        _end_idle(server)


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
