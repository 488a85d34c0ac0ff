"""From a tar to image objects: its samples in the tar's order, some at a time, with their bytes and metadata."""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import pyarrow as pa

from nemo_image import schema
from nemo_image.errors import ShardError
from nemo_image.shards.index import Member, Sample
from nemo_image.shards.read import ShardReader
from nemo_image.stages.image_object import ImageObject, SampleSource
from nemo_image.stages.reading.sample_rows import rows_beside
from nemo_image.stages.tasks import FileGroup

logger = logging.getLogger("nemo_image")

SMALL = 2**20
"""Bytes: larger members are left in the tar, but for the image."""

SMALL_TEXT = 2**24
"""Bytes: the same for a caption and for JSON, which are parsed."""

CHUNK_BYTES = 2**27
"""Bytes that are read at once. One image may be larger."""

_Row = dict[str, Any] | None
_Numbered = tuple[int, Sample, _Row]


@dataclass
class Chunk:
    """Some neighbours among a tar's samples.

    Attributes
    ----------
    group : FileGroup
        Whose tar it is.
    shard : str
        The tar's path below the group's root, without ``.tar``.
    first : int
        The number of the first sample in the tar.
    images : list of ImageObject
        Not decoded. One without a picture has an `image_error`.
    fields : pyarrow.Schema
        Types of the metadata's fields.
    counts : dict of str to int
        In a tar's first chunk, what there is to say of the tar.
    """

    group: FileGroup
    shard: str
    first: int
    images: list[ImageObject]
    fields: pa.Schema
    counts: dict[str, int] = field(default_factory=dict)


def tar_chunks(url: str, group: FileGroup, *, size: int, id_col: str, use_index_file: bool = False) -> Iterator[Chunk]:
    """Yield a tar's samples; at least one chunk, also of a tar without samples.

    Parameters
    ----------
    url : str
        The tar.
    group : FileGroup
        To which it belongs.
    size : int
        Samples of a chunk, at most.
    id_col : str
        The column of the Parquet file beside the tar that names a row's sample.
    use_index_file : bool
        As for :class:`~nemo_image.shards.read.ShardReader`.

    Raises
    ------
    TarError
        If the tar is unreadable.
    MetadataFileError, IdMismatchError
        If the Parquet file beside it is unreadable, or does not fit it.
    ShardError
        If it is no tar by its name, or lies elsewhere than the group.
    """
    shard = shard_name(url, group.root)
    with ShardReader(url, group.storage_options, use_index_file) as reader:
        index = reader.index
        rows = rows_beside(reader, id_col)
        counts = {"repeated_members": len(index.repeated), "tars_without_end_mark": int(not index.has_end)}
        if not index.has_end:
            logger.warning("%s has no end mark: it may have been cut off between two members", url)
        if rows is not None:
            counts |= {
                "rows_without_sample": rows.without_sample,
                "repeated_rows": rows.repeated,
                "samples_without_row": rows.missing,
            }
        chunk = Chunk(group, shard, 0, [], pa.schema([]) if rows is None else rows.fields, counts)
        metadata: Iterable[_Row] = repeat(None, len(index)) if rows is None else rows.in_order()
        for some in _cut(zip(range(len(index)), index.samples, metadata, strict=True), size):
            chunk.first = some[0][0]
            chunk.images = _read(reader, shard, some)
            yield chunk
            chunk = Chunk(group, shard, 0, [], chunk.fields)
        if not len(index):
            yield chunk


def shard_name(url: str, root: str) -> str:
    """Return a tar's path below the root, without ``.tar``; its base name where there is no root.

    Raises
    ------
    ShardError
        If the name does not end in ``.tar``, or the tar does not lie below the root.
    """
    if not url.lower().endswith(".tar"):
        raise ShardError(f"{url} does not end in .tar: the reader takes tars, give file_extensions=['.tar']")
    inside = root.rstrip("/") + "/"
    if not root:
        name = posixpath.basename(url)
    elif root == ".":
        name = url.removeprefix("./")
    elif url.startswith(inside):
        name = url.removeprefix(inside)
    else:
        raise ShardError(f"{url} does not lie below {root}, the root of its file group: give the folder of both")
    return name[: -len(".tar")]


def _cut(samples: Iterable[_Numbered], size: int) -> Iterator[list[_Numbered]]:
    """Cut samples into lists of `size` at most, that have `CHUNK_BYTES` to read at most."""
    some: list[_Numbered] = []
    held = 0
    for one in samples:
        more = sum(member.size for member in _wanted(one[1]))
        if some and (len(some) == size or held + more > CHUNK_BYTES):
            yield some
            some, held = [], 0
        some.append(one)
        held += more
    if some:
        yield some


def _wanted(sample: Sample) -> list[Member]:
    """Return the members that are read: the image, and what is small."""
    image = sample.image
    return [one for one in sample.members if one is image or one.size <= _small(one)]


def _small(member: Member) -> int:
    return SMALL_TEXT if member.extension in ("txt", "json") else SMALL


def _read(reader: ShardReader, shard: str, some: Sequence[_Numbered]) -> list[ImageObject]:
    # In the order of the file, so that neighbours are fetched together also where samples are interleaved.
    wanted = [(member, place) for place, (_, sample, _) in enumerate(some) for member in _wanted(sample)]
    wanted.sort(key=lambda one: one[0].offset)
    files: list[dict[str, bytes]] = [{} for _ in some]
    for (member, place), data in zip(wanted, reader.read_many(one for one, _ in wanted), strict=True):
        files[place][member.extension] = data
    return [_image_object(reader, shard, sample, row, held) for (_, sample, row), held in zip(some, files, strict=True)]


def _image_object(reader: ShardReader, shard: str, sample: Sample, row: _Row, held: dict[str, bytes]) -> ImageObject:
    text = held.get("txt")
    if row is None:
        row = _json_fields(reader, sample, held.get("json"))
    caption: Any = row.get(schema.CAPTION) if text is None else text.decode("utf-8-sig", "replace")
    image = ImageObject(
        image_path=f"{reader.tar_url}/{sample.key if sample.image is None else _text(sample.image.name)}",
        image_id=sample.key,
        caption=caption if isinstance(caption, str) else None,
        metadata=row,
        shard=shard,
        source=SampleSource(reader.tar_url, sample, reader.storage_options or {}),
    )
    image.files = held
    if sample.image is None:
        names = ", ".join(member.extension for member in sample.members)
        image.image_error = f"{schema.MISSING}: sample {sample.key!r} of {shard}.tar has no image, only {names}"
    return image


def _text(name: str) -> str:
    """Write bytes of a name that are no UTF-8 as escapes, as keys have them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _json_fields(reader: ShardReader, sample: Sample, data: bytes | None) -> dict[str, Any]:
    """Return the fields of a sample's JSON; none where there is no JSON, or it cannot be parsed (logged)."""
    fields = None if data is None else reader.parse_json(sample, data)
    if fields is None:
        return {}
    text = json.dumps(fields, ensure_ascii=False) if data is not None and b"\\u" in data else ""
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON may escape half of a surrogate pair, which no file of ours has a place for: replaced, as bad bytes are.
        fields = json.loads(text.encode("utf-8", "replace"))
    return fields
