"""A value of each picture, or the reason why there is none: decoded in threads, guarded, a batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from nemo_image.engine import threads
from nemo_image.engine.decoding.isolated import Guarded, Isolated, Parts
from nemo_image.engine.decoding.pool import for_each_row
from nemo_image.engine.prefetch import prefetch
from nemo_image.errors import ImageError
from nemo_image.shards.failures import as_image_errors

BATCH = 64
"""Pictures that are decoded together."""

Value = TypeVar("Value")

_MISSING = ImageError("missing", "the sample has no picture")


def value_of_each(
    blobs: Iterable[bytes], function: Callable[[bytes], Value], num_threads: int
) -> Generator[Value | ImageError, None, None]:
    """Yield what a function makes of each picture, in their order.

    Parameters
    ----------
    blobs : iterable of bytes
        Pictures, read ahead by a thread.
    function : callable
        From a picture to a value; picklable by `cloudpickle`. What it raises is turned into an `ImageError`.
    num_threads : int
        Pictures that are decoded at the same time, if the task may use so many cores.
    """
    decoder = _Decoder(function, min(num_threads, threads.task_share()))
    with (
        Guarded(decoder, lambda: Isolated(decoder, _merged)) as guarded,
        closing(prefetch(_batches(blobs))) as batches,
    ):
        for batch in batches:
            yield from guarded(batch).outcomes


@dataclass(frozen=True)
class _Outcomes(Generic[Value]):
    """The value of each of several pictures, or why there is none."""

    outcomes: list[Value | ImageError]

    @property
    def errors(self) -> list[str | None]:
        """The reason of each picture that has no value."""
        return [outcome.reason if isinstance(outcome, ImageError) else None for outcome in self.outcomes]


@dataclass(frozen=True)
class _Decoder(Generic[Value]):
    """Calls a function with each of several pictures, in threads."""

    function: Callable[[bytes], Value]
    num_threads: int

    def __call__(self, blobs: Sequence[bytes | None]) -> _Outcomes[Value]:
        """Return the value of each picture.

        Raises
        ------
        DecoderStalledError
            If a picture takes longer than its time limit.
        """
        outcomes: list[Value | ImageError] = [_MISSING] * len(blobs)

        def one(row: int) -> None:
            blob = blobs[row] or b""
            try:
                with as_image_errors(blob):
                    outcomes[row] = self.function(blob)
            except ImageError as error:
                outcomes[row] = error.with_traceback(None)  # its frames would keep the picture alive

        for_each_row(one, len(blobs), self.num_threads)
        return _Outcomes(outcomes)


def _merged(count: int, parts: Parts[_Outcomes[Any]]) -> _Outcomes[Any]:
    outcomes: list[Any] = [_MISSING] * count
    for rows, part in parts:
        made = [_as_error(part)] if isinstance(part, str) else part.outcomes
        for row, outcome in zip(rows, made, strict=True):
            outcomes[row] = outcome
    return _Outcomes(outcomes)


def _as_error(reason: str) -> ImageError:
    category, _, detail = reason.partition(": ")
    return ImageError(category, detail)


def _batches(blobs: Iterable[bytes]) -> Iterator[list[bytes]]:
    waiting = iter(blobs)
    while some := list(islice(waiting, BATCH)):
        yield some
