"""Sizes of images from their headers: nothing is decoded, and of most files only the first bytes are read."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ImageError
from nemo_image.filters.image_columns import ImageColumns, Measured, Values, add_image_columns
from nemo_image.shards.decode import MAX_PIXELS, read_header
from nemo_image.shards.index import Member
from nemo_image.shards.jpeg import JPEG_SIGNATURE, scan_jpeg
from nemo_image.shards.read import ShardReader

ASPECT_RATIO = "aspect_ratio"
"""The longer side of the stored image over the shorter one (float32), at least 1."""

SIZES = {schema.WIDTH: "int32", schema.HEIGHT: "int32", ASPECT_RATIO: "float32"}

HEADS = (2**12, 2**16)
"""Bytes that are read of a file: first, and where these do not hold the header. After that, all of it."""

_HEADER_FIRST = (b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
"""Formats that Pillow opens without looking further than their header; WebP, TIFF and AVIF need the whole file."""


class ImageSizeStats:
    """Adds the size of each stored image in pixels, and its aspect ratio, without decoding it.

    Adds ``width`` and ``height`` (int32, before the EXIF orientation is applied; columns of these names that came with
    the data stay as they are), ``aspect_ratio`` (float32, the longer side over the shorter one) and ``image_error``,
    for files whose header cannot be read. A file that is damaged behind its header has a size here.

    Of most files the first 4 KiB are read, of some 64 KiB; WebP, AVIF and TIFF are read whole.
    """

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the columns added, lazily."""
        return add_image_columns(dataset, SizeColumns, SIZES, {"operator": "ImageSizeStats"})

    def __repr__(self) -> str:
        return "ImageSizeStats()"


class SizeColumns(ImageColumns):
    """Reads the headers of a partition's images."""

    names = tuple(SIZES)

    def measure(self, reader: ShardReader, members: Sequence[Member]) -> Measured:
        """Yield width, height and aspect ratio of each image, in the tar's order."""
        heads = reader.read_many([_head(member, HEADS[0]) for member in members])
        for member, head in zip(members, heads, strict=True):
            yield _size_of_member(reader, member, head)


def _head(member: Member, size: int) -> Member:
    return member._replace(size=min(size, member.size))


def _size_of_member(reader: ShardReader, member: Member, head: bytes) -> Values | ImageError:
    steps = HEADS[1:] if head.startswith((JPEG_SIGNATURE, *_HEADER_FIRST)) else ()
    for longer in (*steps, member.size):
        if len(head) == member.size:
            break
        size = size_from_head(head)
        if size is not None:
            return with_ratio(*size)
        head = reader.read(_head(member, longer))
    try:
        return with_ratio(*size_from_file(head))
    except ImageError as error:
        return error.with_traceback(None)


def with_ratio(width: int, height: int) -> Values:
    """Return width, height and aspect ratio."""
    return width, height, max(width, height) / max(1, min(width, height))


def size_from_head(head: bytes) -> tuple[int, int] | None:
    """Return width and height if the first bytes of a file say them beyond doubt, else None.

    For what it returns, the whole file's header says the same.
    """
    if head.startswith(JPEG_SIGNATURE):
        scan = scan_jpeg(head)
        if scan.ordinary and scan.start < len(head) and scan.components in (1, 3, 4):
            ((width, height),) = scan.sizes
            if 0 < width * height <= MAX_PIXELS:
                return width, height
        return None
    if not head.startswith(_HEADER_FIRST):
        return None
    try:
        header = read_header(head)
    except ImageError:
        return None
    return header.width, header.height


def size_from_file(data: bytes) -> tuple[int, int]:
    """Return width and height of a whole file.

    Raises
    ------
    ImageError
        If its header cannot be read, or tells of more pixels than are ever decoded.
    """
    size = size_from_head(data)
    if size is None:
        header = read_header(data)
        size = header.width, header.height
    return size
