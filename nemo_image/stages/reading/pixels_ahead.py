"""What the reader makes of pictures before any stage asks: their pixels, or the inputs of models."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from nemo_image.embedders.preprocess import GuardedPreprocessor
from nemo_image.engine.decoding.isolated import Guarded, Isolated, Parts
from nemo_image.engine.decoding.pool import for_each_row
from nemo_image.errors import ImageError
from nemo_image.shards.decode import MAX_PIXELS, ImageHeader, decode_rgb, read_header

if TYPE_CHECKING:
    from nemo_image.stages.image_object import ImageObject, Pixels
    from nemo_image.stages.model_input import ModelInput

PIXEL_BYTES = 2**29
"""Bytes of decoded pixels that are held at once. One picture may be larger."""

How = Literal["headers", "check", "pixels"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Wanted:
    """What later stages want of pictures.

    Attributes
    ----------
    pictures : {"nothing", "check", "pixels"}
        With ``"check"``, pictures are decoded to find the bad ones, with ``"pixels"`` to be held.
    inputs : tuple of ModelInput
        Inputs of models to make. They find the bad pictures, too.
    max_pixels : int
        Largest picture, in pixels.
    """

    pictures: Literal["nothing", "check", "pixels"] = "nothing"
    inputs: tuple[ModelInput, ...] = ()
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Pictures:
    """What became of several pictures.

    Attributes
    ----------
    sizes : list of (tuple of int, or None)
        Width and height of the stored pictures, in pixels; None where there is an error.
    errors : list of (str or None)
        `ImageError.reason`, or None where the picture is good.
    pixels : list of (ndarray of uint8, shape (height, width, 3), or None)
        Upright RGB, where it was asked for.
    """

    sizes: list[Size | None]
    errors: list[str | None]
    pixels: list[Pixels | None]


@dataclass(frozen=True)
class ReadPictures:
    """Reads pictures, in threads.

    Attributes
    ----------
    how : {"headers", "check", "pixels"}
        Whether to read headers only, to decode and forget, or to give the pixels.
    num_threads : int
    max_pixels : int
    """

    how: How
    num_threads: int
    max_pixels: int

    def __call__(self, blobs: Sequence[bytes | None]) -> Pictures:
        """Read pictures from the bytes of their files."""
        found = Pictures([None] * len(blobs), [None] * len(blobs), [None] * len(blobs))

        def one(row: int) -> None:
            try:
                header, found.pixels[row] = self._read(blobs[row] or b"")
            except ImageError as error:
                found.errors[row] = error.reason
            else:
                found.sizes[row] = header.width, header.height

        for_each_row(one, len(blobs), self.num_threads)
        return found

    def _read(self, blob: bytes) -> tuple[ImageHeader, Pixels | None]:
        if self.how == "headers":
            return read_header(blob, self.max_pixels), None
        header, pixels = decode_rgb(blob, max_pixels=self.max_pixels)
        return header, pixels.permute(1, 2, 0).numpy() if self.how == "pixels" else None


class PixelsAhead:
    """Fills in images what is wanted of their pictures; use it in a ``with`` block, and in one thread.

    Pictures are decoded in the process's pool of decoding threads; where a picture hangs its decoder, or the task must
    keep decoders away from its process, in a child process (see :mod:`nemo_image.engine.decoding.isolated`).

    Parameters
    ----------
    wanted : Wanted
    num_threads : int
        Pictures that are decoded at the same time.
    """

    def __init__(self, wanted: Wanted, num_threads: int) -> None:
        self._holds_pixels = wanted.pictures == "pixels"
        with ExitStack() as stack:

            def guarded(how: How) -> Guarded[Pictures]:
                read = ReadPictures(how, num_threads, wanted.max_pixels)
                return stack.enter_context(Guarded(read, lambda: Isolated(read, merge_pictures)))

            # Sizes must be known before pixels are held; and models' preprocessors have a limit of their own.
            is_limited = wanted.pictures == "nothing" and wanted.max_pixels < MAX_PIXELS
            self._headers = guarded("headers") if self._holds_pixels or is_limited else None
            self._pictures = None if wanted.pictures == "nothing" else guarded(wanted.pictures)
            self._inputs = {
                one.key: stack.enter_context(GuardedPreprocessor(one.preprocessor(num_threads)))
                for one in wanted.inputs
            }
            self._open = stack.pop_all()

    def __enter__(self) -> PixelsAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def fill(self, images: list[ImageObject]) -> Iterator[list[ImageObject]]:
        """Take the images out of the list, and yield them in order, filled, as many at once as may be held.

        Those with an `image_error` pass through. Bad pictures get one.
        """
        if self._headers is not None:
            _fill_in(images, self._headers)
        parts = deque(self._parts(images))
        images.clear()  # so that nothing here holds the pixels of parts that are given away
        while parts:
            yield self._filled(parts.popleft())

    def _parts(self, images: list[ImageObject]) -> list[list[ImageObject]]:
        """Cut images where their pixels would take more than `PIXEL_BYTES`: a function of the pictures alone."""
        if not self._holds_pixels:
            return [list(images)]
        parts: list[list[ImageObject]] = [[]]
        held = 0
        for image in images:
            more = 0 if image.width is None or image.height is None else image.width * image.height * 3
            if parts[-1] and held + more > PIXEL_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(image)
            held += more
        return parts

    def _filled(self, images: list[ImageObject]) -> list[ImageObject]:
        if self._pictures is not None:
            _fill_in(images, self._pictures)
        for key, prepare in self._inputs.items():
            _fill_in_input(images, key, prepare)
        return images


def merge_pictures(count: int, parts: Parts[Pictures]) -> Pictures:
    """Put parts together; each says which rows it is of, and later ones count."""
    merged = Pictures([None] * count, [None] * count, [None] * count)
    for rows, part in parts:
        if isinstance(part, str):
            merged.sizes[rows[0]], merged.errors[rows[0]], merged.pixels[rows[0]] = None, part, None
            continue
        for place, row in enumerate(rows):
            merged.sizes[row], merged.errors[row] = part.sizes[place], part.errors[place]
            merged.pixels[row] = part.pixels[place]
    return merged


def _fill_in(images: Sequence[ImageObject], read: Guarded[Pictures]) -> None:
    good = _good(images)
    if not good:
        return
    found = read(_bytes(good))
    for image, size, error, pixels in zip(good, found.sizes, found.errors, found.pixels, strict=True):
        image.width, image.height = size or (None, None)
        image.image_error = error
        if pixels is not None:
            image.hold_pixels(pixels)


def _fill_in_input(images: Sequence[ImageObject], key: str, prepare: GuardedPreprocessor) -> None:
    good = _good(images)
    if not good:
        return
    batch = prepare(_bytes(good))
    for row, image in enumerate(good):
        image.width, image.height, image.image_error = batch.widths[row], batch.heights[row], batch.errors[row]
    for place, row in enumerate(batch.rows):
        good[row].prepared[key] = batch.pixels[place]


def _good(images: Sequence[ImageObject]) -> list[ImageObject]:
    return [image for image in images if image.image_error is None]


def _bytes(images: Sequence[ImageObject]) -> list[bytes | None]:
    return [image.files[image.image_extension] for image in images]
