"""DALI's index of a tar, format v1.2, as its tool ``wds2idx`` writes and ``fn.readers.webdataset`` reads it.

.. code-block:: text

    v1.2 <number of samples>
    <extension> <offset> <size> <name> [<extension> <offset> <size> <name> …]      one line a sample

Extensions are as the names have them, offsets and sizes in bytes, of the data. Words are parted by white space, so a
name that contains any cannot be written. ``wds2idx`` groups only adjacent members, and gives wrong offsets for GNU's
long names; a file that lies can make a reader take one member's bytes for another's. Therefore an index file is never
believed: it tells which headers to fetch, many at once, and only what the headers say counts.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from nemo_image.errors import ArgumentError, TarError
from nemo_image.shards.files import StorageOptions, Url, atomic_writer
from nemo_image.shards.headers import BLOCK, Contents, HeaderWindow, padded, read_contents
from nemo_image.shards.index import Member, TarIndex, group_members, unreadable
from nemo_image.shards.keys import split_member_name
from nemo_image.shards.sources import ByteSource, merge_ranges, open_source

logger = logging.getLogger("nemo_image")

VERSION = "v1.2"

_SIZE_LIMIT = 2**30  # bytes of an index file
_HINT_LIMIT = 2**14  # bytes between two members: headers, and members that the index file leaves out
_AT_ONCE = 64  # ranges


def idx_url(tar_url: Url) -> str:
    """Return the name that a tar's index file has."""
    return os.fspath(tar_url).removesuffix(".tar") + ".idx"


def write_idx(index: TarIndex, url: Url, storage_options: StorageOptions = None) -> None:
    """Write a tar's index for DALI, atomically.

    Raises
    ------
    ArgumentError
        If the format cannot say it: no samples, or a member's name contains white space.
    """
    if not index.samples:
        raise ArgumentError(f"{os.fspath(url)}: an index file cannot be empty, and the tar has no samples")
    lines = [f"{VERSION} {len(index)}".encode()]
    for sample in index.samples:
        words = [_words(member) for member in sample.members]
        if any(len(word.split()) != 4 for word in words):
            name = next(member.name for member, word in zip(sample.members, words, strict=True) if len(word.split()) != 4)
            raise ArgumentError(
                f"{os.fspath(url)}: the index format cannot hold {name!r}, a name with white space: do without the index "
                "file, or rename the members"
            )
        lines.append(b" ".join(words))
    with atomic_writer(url, storage_options) as file:
        file.write(b"\n".join(lines) + b"\n")


def _words(member: Member) -> bytes:
    extension = member.name[len(member.name) - len(member.extension) :]
    return f"{extension} {member.offset} {member.size} {member.name}".encode("utf-8", "surrogateescape")


def read_idx(url: Url, tar: Url | ByteSource, storage_options: StorageOptions = None) -> TarIndex:
    """Read a tar's index with the help of its index file.

    Raises
    ------
    TarError
        If either file is missing or unusable, or if they disagree: if the index file names a member that the tar does
        not have at that place, or leaves out one that it has.
    """
    hints = _parse(url, storage_options)
    if isinstance(tar, ByteSource):
        return _read_hinted(tar, hints, os.fspath(url))
    try:
        with open_source(tar, storage_options) as source:
            return _read_hinted(source, hints, os.fspath(url))
    except OSError as error:
        raise unreadable(os.fspath(tar), error) from error


def load_index(
    tar: Url | ByteSource, storage_options: StorageOptions = None, use_index_file: bool = False
) -> TarIndex:
    raise NotImplementedError
