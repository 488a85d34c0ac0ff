"""Decoding where no picture can do harm: in a child process, with a limit on time and on memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import cloudpickle

from nemo_image.engine import isolation
from nemo_image.engine.decoding.pool import DecoderStalledError
from nemo_image.engine.decoding.server import DecoderDeathError, DecodeServer, borrow_server, give_back
from nemo_image.errors import ShardError

SECONDS_A_PICTURE = 60.0
"""Longest time for a picture that has a process of its own."""

SECONDS_MORE_IN_BATCH = 1.0
"""What each picture of a batch adds to that. A batch that is merely slow is done again, picture by picture."""

MEMORY = 4 * 2**30
"""Bytes that a decoder may allocate. Of the largest pictures that we take, a TIFF of floats needs most: over 2 GiB."""

_log = logging.getLogger("nemo_image")


class DecodedBatch(Protocol):
    """What is made of several pictures; it can be pickled."""

    @property
    def errors(self) -> Sequence[str | None]:
        """For each picture, the reason why there is nothing, or None."""


Batch = TypeVar("Batch", bound=DecodedBatch)
Decode = Callable[[Sequence[bytes | None]], Batch]
Parts = Sequence[tuple[Sequence[int], Batch | str]]
Merge = Callable[[int, Parts[Batch]], Batch]


class Isolated(Generic[Batch]):
    """Call a function that decodes pictures in a child process, and name the pictures that crash or hang it.

    A batch goes to one decoder. If that dies or hangs, each picture of the batch is decoded again in a process of its
    own. If it does not, each that had an error is decoded again by itself. So a reason depends on the picture alone,
    not on its neighbours.

    Parameters
    ----------
    decode : callable
        What the child does with the bytes of several pictures; it must be picklable (by `cloudpickle`).
    merge : callable
        Makes one batch, of as many pictures as its first argument says, of parts. Each part says which rows it is of,
        and is a batch, or the reason why there is nothing of its only row. Later parts count.
    seconds : float, optional
        Longest time for one picture; `SECONDS_A_PICTURE` by default.
    memory : int, optional
        Bytes that a decoder may allocate, for all the pictures that it decodes at the same time; `MEMORY` by default.
    """

    def __init__(
        self, decode: Decode[Batch], merge: Merge[Batch], *, seconds: float | None = None, memory: int | None = None
    ) -> None:
        self.merge = merge
        self.seconds = SECONDS_A_PICTURE if seconds is None else seconds
        self.memory = MEMORY if memory is None else memory
        self._pickled = cloudpickle.dumps(decode)
        self._server = borrow_server()
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, blobs: Sequence[bytes | None]) -> Batch:
        """Decode pictures; None stands for a sample without one.

        Raises
        ------
        ShardError
            If there can be no child process, or this object has been closed.
        Exception
            What the function itself raises.
        """
        with self._lock:
            whole = self._outcome(blobs, self.seconds + SECONDS_MORE_IN_BATCH * len(blobs))
            if isinstance(whole, str):
                _log.warning("%s in a batch of %d pictures: each of them is decoded again alone", whole, len(blobs))
                return self.merge(len(blobs), [([row], self._alone(blob)) for row, blob in enumerate(blobs)])
            suspects = [row for row, error in enumerate(whole.errors) if error and blobs[row] is not None]
            if not suspects:
                return whole
            again = [([row], self._again(blobs[row])) for row in suspects]
            return self.merge(len(blobs), [(range(len(blobs)), whole), *again])

    def _again(self, blob: bytes | None) -> Batch | str:
        """Decode a picture without those of its batch, which may have taken the memory that it needed."""
        outcome = self._outcome([blob], self.seconds)
        if isinstance(outcome, str) or str(outcome.errors[0]).startswith("memory:"):
            return self._alone(blob)
        return outcome

    def _alone(self, blob: bytes | None) -> Batch | str:
        """Decode one picture in a process of its own."""
        self._server.end_decoder()
        outcome = self._outcome([blob], self.seconds)
        self._server.end_decoder()
        if isinstance(outcome, str):
            _log.warning("a picture is given up: %s", outcome)
        return outcome

    def _outcome(self, blobs: Sequence[bytes | None], seconds: float) -> Batch | str:
        """Return a batch, or the reason why there is none."""
        try:
            kind, value = self._living_server().ask(self._pickled, self.memory, blobs, seconds)
        except DecoderDeathError as error:
            if self._closed:
                raise ShardError("the child process that decodes was closed while it was needed") from error
            return error.reason
        if kind == "error":
            raise value
        if kind == "batch":
            batch: Batch = value
            return batch
        if kind == "hung":
            return f"hung: no result within {seconds:g} s"
        return f"memory: decoding it takes more than {self.memory / 2**30:g} GiB"

    def _living_server(self) -> DecodeServer:
        if self._closed:
            raise ShardError("the child process that decodes is closed")
        if not self._server.alive:
            self._server.close()
            self._server = borrow_server()
        return self._server

    def close(self) -> None:
        """Give up the child process; a call that is under way in another thread then raises."""
        if self._closed:
            return
        self._closed = True
        if self._lock.acquire(blocking=False):
            give_back(self._server)
            self._lock.release()
        else:
            self._server.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Guarded(Generic[Batch]):
    """Call a function that decodes pictures in this process until one hangs it; from then on, isolated.

    In a task that must keep decoders away (`nemo_image.engine.isolation`), it is isolated from the start.

    Parameters
    ----------
    decode : callable
        What to call.
    isolate : callable
        Makes the isolated one.
    """

    def __init__(self, decode: Decode[Batch], isolate: Callable[[], Isolated[Batch]]) -> None:
        self._decode = decode
        self._make_isolated = isolate
        self._isolated = isolate() if isolation.isolated() else None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, blobs: Sequence[bytes | None]) -> Batch:
        """Decode pictures; None stands for a sample without one."""
        if self._isolated is None:
            try:
                return self._decode(blobs)
            except DecoderStalledError as error:
                self._isolate(error)
        assert self._isolated is not None
        return self._isolated(blobs)

    def _isolate(self, error: DecoderStalledError) -> None:
        with self._lock:
            if self._closed:
                raise error
            if self._isolated is None:
                _log.warning("%s: this batch and the next ones are decoded in a child process", error)
                self._isolated = self._make_isolated()

    def close(self) -> None:
        """End the child process, if there is one."""
        with self._lock:
            self._closed = True
            if self._isolated is not None:
                self._isolated.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
