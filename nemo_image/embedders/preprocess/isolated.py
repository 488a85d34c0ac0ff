"""Preprocessing where no picture can do harm: in a child process, with a limit on time and on memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

import cloudpickle
import torch

from nemo_image.embedders.preprocess.batch import PreprocessedBatch, Preprocessor, empty_pixels
from nemo_image.embedders.preprocess.pool import DecoderStalledError
from nemo_image.embedders.preprocess.server import DecoderDeathError, DecodeServer, borrow_server, give_back
from nemo_image.embedders.preprocess.spec import PreprocessSpec
from nemo_image.engine import isolation
from nemo_image.errors import ArgumentError, ShardError

SECONDS_A_PICTURE = 60.0
"""Longest time for a picture that has a process of its own."""

SECONDS_MORE_IN_BATCH = 1.0
"""What each picture of a batch adds to that. A batch that is merely slow is done again, picture by picture."""

MEMORY = 4 * 2**30
"""Bytes that a decoder may allocate. Of the largest pictures that we take, a TIFF of floats needs most: over 2 GiB."""

_log = logging.getLogger("nemo_image")


class IsolatedPreprocessor:
    """Do what a preprocessor does, in a child process, and name the pictures that crash or hang it.

    A batch goes to one decoder. If that dies or hangs, each picture of the batch is decoded again in a process of its
    own. If it does not, each that had an error is decoded again by itself. So a reason depends on the picture alone,
    not on its neighbours.

    Parameters
    ----------
    preprocessor : Preprocessor
        What the child does; it must be picklable (by `cloudpickle`).
    seconds : float, optional
        Longest time for one picture; `SECONDS_A_PICTURE` by default.
    memory : int, optional
        Bytes that a decoder may allocate, for all the pictures that it decodes at the same time; `MEMORY` by default.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        *,
        seconds: float | None = None,
        memory: int | None = None,
    ) -> None:
        self.preprocessor = preprocessor
        self.seconds = SECONDS_A_PICTURE if seconds is None else seconds
        self.memory = MEMORY if memory is None else memory
        self._pickled = cloudpickle.dumps(preprocessor)
        self._server = borrow_server()
        self._closed = False
        self._lock = threading.Lock()

    @property
    def spec(self) -> PreprocessSpec | None:
        """How to normalise what comes out; None if that is done."""
        return self.preprocessor.spec

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture.

        Raises
        ------
        ShardError
            If there can be no child process, or this object has been closed.
        Exception
            What the preprocessor itself raises.
        """
        with self._lock:
            whole = self._outcome(blobs, self.seconds + SECONDS_MORE_IN_BATCH * len(blobs))
            if isinstance(whole, str):
                _log.warning("%s in a batch of %d pictures: each of them is decoded again alone", whole, len(blobs))
                return self._merged(len(blobs), [([row], self._alone(blob)) for row, blob in enumerate(blobs)])
            suspects = [row for row, error in enumerate(whole.errors) if error and blobs[row] is not None]
            if not suspects:
                return whole
            again = [([row], self._again(blobs[row])) for row in suspects]
            return self._merged(len(blobs), [(list(range(len(blobs))), whole), *again])

    def _again(self, blob: bytes | None) -> PreprocessedBatch:
        """Decode a picture without those of its batch, which may have taken the memory that it needed."""
        outcome = self._outcome([blob], self.seconds)
        if isinstance(outcome, str) or str(outcome.errors[0]).startswith("memory:"):
            return self._alone(blob)
        return outcome

    def _alone(self, blob: bytes | None) -> PreprocessedBatch:
        """Decode one picture in a process of its own."""
        self._server.end_decoder()
        outcome = self._outcome([blob], self.seconds)
        self._server.end_decoder()
        if isinstance(outcome, PreprocessedBatch):
            return outcome
        _log.warning("a picture is given up: %s", outcome)
        return PreprocessedBatch(torch.empty(0), [], [outcome], [None], [None])

    def _outcome(self, blobs: Sequence[bytes | None], seconds: float) -> PreprocessedBatch | str:
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
            pixels, *rest = value
            return PreprocessedBatch(torch.from_numpy(pixels), *rest)
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

    def _merged(self, count: int, parts: Sequence[tuple[list[int], PreprocessedBatch]]) -> PreprocessedBatch:
        """Put parts together; each says which rows it is of, and later ones count."""
        errors: list[str | None] = [None] * count
        widths: list[int | None] = [None] * count
        heights: list[int | None] = [None] * count
        pictures: dict[int, torch.Tensor] = {}
        for rows, part in parts:
            for place, row in enumerate(rows):
                errors[row], widths[row], heights[row] = part.errors[place], part.widths[place], part.heights[place]
            pictures |= {rows[place]: part.pixels[index] for index, place in enumerate(part.rows)}
        shapes = {tuple(picture.shape) for picture in pictures.values()}
        if len(shapes) > 1:
            raise ArgumentError(f"transform: its tensors have several shapes, {sorted(shapes)}; it must end in a crop")
        if pictures:
            pixels = torch.stack([pictures[row] for row in sorted(pictures)])
        else:
            pixels = torch.empty(0) if self.spec is None else empty_pixels(0, self.spec)
        normalized = any(part.normalized for _, part in parts)
        return PreprocessedBatch(pixels, sorted(pictures), errors, widths, heights, normalized)

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

    def __enter__(self) -> IsolatedPreprocessor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GuardedPreprocessor:
    """Run a preprocessor in this process until a picture hangs it; from then on, isolated.

    In a task that must keep decoders away (`nemo_image.engine.isolation`), it is isolated from the start.

    Parameters
    ----------
    preprocessor : Preprocessor
        What to run.
    """

    def __init__(self, preprocessor: Preprocessor) -> None:
        self.preprocessor = preprocessor
        self._isolated = IsolatedPreprocessor(preprocessor) if isolation.isolated() else None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def spec(self) -> PreprocessSpec | None:
        """How to normalise what comes out; None if that is done."""
        return self.preprocessor.spec

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture."""
        if self._isolated is None:
            try:
                return self.preprocessor(blobs)
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
                self._isolated = IsolatedPreprocessor(self.preprocessor)

    def close(self) -> None:
        """End the child process, if there is one."""
        with self._lock:
            self._closed = True
            if self._isolated is not None:
                self._isolated.close()

    def __enter__(self) -> GuardedPreprocessor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
