"""Pictures as batches for a model: those of a tar, read and decoded ahead of it, and those that a caller has."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, overload

import numpy as np
from PIL import Image, ImageOps

from nemo_image.embedders.preprocess import PreprocessedBatch, Preprocessor, preprocess_pixels
from nemo_image.engine.in_order import map_in_order
from nemo_image.errors import ArgumentError, ImageError
from nemo_image.shards import files
from nemo_image.shards.index import Member
from nemo_image.shards.pixels import to_rgb
from nemo_image.shards.read import ShardReader

BATCHES_AT_ONCE = 2
"""Batches under way: while the last pictures of one are decoded, the next one is read and its first are begun."""

Picture = str | os.PathLike[str] | bytes | Image.Image

_Texts = list[tuple[bytes, ...]]


def prepared_batches(
    reader: ShardReader,
    members: Sequence[Member],
    prepare: Preprocessor,
    size: int,
    *,
    pin: bool = False,
    beside: Sequence[Sequence[Member]] | None = None,
) -> Generator[tuple[range, PreprocessedBatch, _Texts], None, None]:
    """Yield batches of pictures, ready for a model, in order.

    Which pictures make a batch depends on `members` and `size` alone, so that results repeat to the last bit. At most
    three batches are ahead of the one that is worked on. Pictures of a local tar are read by the threads that decode
    them, after the kernel was asked for the batch; those of a remote one by a request or a few for each batch.

    Parameters
    ----------
    reader : ShardReader
    members : sequence of Member
        The pictures.
    prepare : Preprocessor
    size : int
        Pictures in a batch.
    pin : bool
        Put pixels that are not on a GPU yet into pinned memory, from which they are copied to it in the background.
    beside : sequence of sequence of Member, optional
        For each picture, further members to read along with it.

    Yields
    ------
    places : range
        Where the batch's pictures stand in `members`.
    batch : PreprocessedBatch
    texts : list of tuple of bytes
        For each picture, the bytes of the members `beside` it.
    """

    def one(places: range) -> tuple[range, PreprocessedBatch, _Texts]:
        pictures = members[places.start : places.stop]
        others = [()] * len(places) if beside is None else beside[places.start : places.stop]
        blobs: Sequence[bytes]
        if reader.is_local:
            reader.fetch_ahead(pictures)
            blobs, texts = _Unread(reader, pictures), _read_texts(reader, others)
        else:
            blobs, texts = _read(reader, pictures, others)
        batch = prepare(blobs)
        if pin and not batch.pixels.is_cuda:
            batch = replace(batch, pixels=batch.pixels.pin_memory())
        return places, batch, texts

    starts = range(0, len(members), size)
    cuts = (range(start, min(start + size, len(members))) for start in starts)
    return map_in_order(one, cuts, BATCHES_AT_ONCE)


class _Unread(Sequence[bytes]):
    """Pictures that are read when they are asked for, each by the thread that decodes it.

    The bytes are then in that processor's cache, and in memory that the picture before has left.
    """

    def __init__(self, reader: ShardReader, members: Sequence[Member]) -> None:
        self._reader = reader
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(row, slice):
            return _Unread(self._reader, self._members[row])
        return self._reader.read(self._members[row])


def _read_texts(reader: ShardReader, others: Sequence[Sequence[Member]]) -> _Texts:
    blobs = reader.read_many([member for more in others for member in more])
    return [tuple(next(blobs) for _ in more) for more in others]


def _read(
    reader: ShardReader, pictures: Sequence[Member], others: Sequence[Sequence[Member]]
) -> tuple[list[bytes], _Texts]:
    """Read pictures and what belongs to them in one go: they are neighbours, and a remote read brings both."""
    wanted = [member for picture, more in zip(pictures, others, strict=True) for member in (picture, *more)]
    order = sorted(range(len(wanted)), key=lambda place: wanted[place].offset)
    found = dict(zip(order, reader.read_many([wanted[place] for place in order]), strict=True))
    blobs, texts, place = [], [], 0
    for more in others:
        blobs.append(found[place])
        texts.append(tuple(found[place + number] for number in range(1, 1 + len(more))))
        place += 1 + len(more)
    return blobs, texts


class _Prepares(Protocol):
    """What an embedder has that pictures are prepared with."""

    device: str
    num_threads_per_worker: int

    def preprocessor(self, device: str, num_threads: int) -> Preprocessor: ...

    @property
    def transform(self) -> object: ...


def prepared_pictures(pictures: Sequence[Picture], embedder: _Prepares, size: int) -> Iterator[PreprocessedBatch]:
    """Yield a caller's pictures as batches of at most `size`, ready for a model, in order.

    Raises
    ------
    ArgumentError
        If one is no picture, or there is no such file.
    ImageError
        If one cannot be decoded; says which.
    """
    if isinstance(pictures, str | bytes | os.PathLike | Image.Image):
        raise ArgumentError("pictures must be a list of pictures, not one: put it in brackets")
    prepare = embedder.preprocessor(embedder.device, embedder.num_threads_per_worker)
    run: list[bytes] = []
    for number, picture in enumerate(pictures):
        if isinstance(picture, Image.Image):
            if run:
                yield _good(prepare(run), pictures, number - len(run))
                run = []
            pixels = np.asarray(to_rgb(ImageOps.exif_transpose(picture)))
            yield _good(preprocess_pixels(embedder.transform, [pixels]), pictures, number)  # type: ignore[arg-type]
            continue
        run.append(_bytes_of(picture, number))
        if len(run) == size:
            yield _good(prepare(run), pictures, number + 1 - size)
            run = []
    if run:
        yield _good(prepare(run), pictures, len(pictures) - len(run))


def _bytes_of(picture: object, number: int) -> bytes:
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | os.PathLike):
        try:
            return files.read_bytes(picture)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ArgumentError(f"pictures[{number}]: there is no file {os.fspath(picture)}") from error
    raise ArgumentError(
        f"pictures[{number}] is of type {type(picture).__name__}: give a path, a file's bytes, or a PIL picture"
    )


def _good(batch: PreprocessedBatch, pictures: Sequence[Picture], first: int) -> PreprocessedBatch:
    for place, reason in enumerate(batch.errors):
        if reason is not None:
            picture = pictures[first + place]
            name = f" ({os.fspath(picture)})" if isinstance(picture, str | os.PathLike) else ""
            category, _, detail = reason.partition(": ")
            raise ImageError(category, f"pictures[{first + place}]{name}: {detail}")
    return batch
