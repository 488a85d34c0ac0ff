"""The members of an image's sample as they are to be written."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from nemo_image.errors import ArgumentError
from nemo_image.export.rewrite import rewritten_json
from nemo_image.schema import KEY
from nemo_image.shards.index import Member
from nemo_image.shards.keys import IMAGE_EXTENSIONS, own_extension, split_member_name
from nemo_image.shards.read import ShardReader
from nemo_image.shards.write import TarWriter
from nemo_image.stages.image_object import ImageObject, SampleSource

AT_ONCE = 4 * 2**20
"""Bytes: larger members are copied piece by piece."""


class Content(NamedTuple):
    """A member to write.

    Attributes
    ----------
    extension : str
        As the source's name has it.
    size : int
        In bytes.
    chunks : iterable of bytes
    """

    extension: str
    size: int
    chunks: Iterable[bytes]


class SourceReaders:
    """Gives the open tar of a sample; the one used last stays open, because neighbours come from one tar."""

    def __init__(self) -> None:
        self._reader: ShardReader | None = None

    def of(self, source: SampleSource) -> ShardReader:
        """Return the reader of a sample's tar."""
        if self._reader is None or self._reader.tar_url != source.tar_url:
            self.close()
            self._reader = ShardReader(source.tar_url, source.storage_options)
        return self._reader

    def close(self) -> None:
        """Close what is open."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> SourceReaders:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_sample(writer: TarWriter, key: str, old_key: str, contents: Iterable[Content]) -> None:
    """Write a sample's members under a key; where that is another one, its JSON says the new one too.

    JSON that is no object is copied as it is.
    """
    for content in contents:
        name = f"{key}.{content.extension}"
        if key == old_key or content.extension.lower() != "json":
            writer.add_from(name, content.size, content.chunks)
            continue
        data = b"".join(content.chunks)
        changed = rewritten_json(data, {KEY: key}, old_key, key)
        writer.add(name, data if changed is None else changed)


def contents_of(image: ImageObject, readers: SourceReaders) -> Iterator[Content]:
    """Yield the members of an image's sample, in the sample's order, then those that were added to it.

    What is in ``image.files`` is taken from there, the rest from the source. A caption that a stage changed, or that of
    an image without a source, makes the ``txt`` member. Pixels are stored, as PNG, only of an image without a file.

    Raises
    ------
    ArgumentError
        If there is nothing to write, or an added file's extension is none.
    """
    stored = () if image.source is None else image.source.sample.members
    there = {member.extension for member in stored}
    added = {extension: _file(image, extension) for extension in image.files if extension not in there}
    changed = image.caption != image.original_caption
    if changed or (image.source is None and "txt" not in added):
        added.pop("txt", None)
        if image.caption is not None and "txt" not in there:
            added["txt"] = _content("txt", _text(image.caption))
    if image.has_own_pixels and not IMAGE_EXTENSIONS & (there | added.keys()):
        added = {"png": _content("png", _png(image)), **added}
    if not stored and not added:
        raise ArgumentError(
            f"image {image.image_id!r} ({image.image_path!r}) has neither a stored file nor pixels to write: keep its "
            "source, or assign image_bytes or image_data (which remove_image_data=True on a stage frees)"
        )
    from_source: Iterator[Content] = iter(())
    if image.source is not None:
        missing = [member for member in stored if member.extension not in image.files]
        from_source = copied(readers.of(image.source), missing)
    for member in stored:
        if member.extension in image.files:
            content = _content(own_extension(member.name), image.files[member.extension])
        else:
            content = next(from_source)
        if member.extension != "txt" or not changed:
            yield content
        elif image.caption is not None:
            yield _content(own_extension(member.name), _text(image.caption))
    yield from added.values()


def copied(reader: ShardReader, members: Sequence[Member]) -> Iterator[Content]:
    """Yield members of a tar, neighbours read together; of a large one, only a piece is in memory."""
    for is_large, some in groupby(members, lambda member: member.size > AT_ONCE):
        run = list(some)
        datas = (reader.read_chunks(member) for member in run) if is_large else ([one] for one in reader.read_many(run))
        for member, chunks in zip(run, datas, strict=True):
            yield Content(own_extension(member.name), member.size, chunks)


def _file(image: ImageObject, extension: str) -> Content:
    if split_member_name(f"x.{extension}") != ("x", extension):
        raise ArgumentError(
            f"image {image.image_id!r}: files[{extension!r}] cannot be a member of a tar: give a lower-cased extension "
            "without a leading dot, such as 'seg.png'"
        )
    return _content(extension, image.files[extension])


def _content(extension: str, data: bytes) -> Content:
    return Content(extension, len(data), [data])


def _text(caption: str) -> bytes:
    return caption.encode("utf-8", "replace")


def _png(image: ImageObject) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(image.image_data)).save(out, "PNG")
    return out.getvalue()
