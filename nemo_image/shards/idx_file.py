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
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nemo_image.errors import ArgumentError, TarError
from nemo_image.shards.files import StorageOptions, Url, atomic_writer
from nemo_image.shards.headers import BLOCK, HeaderWindow, padded, read_contents
from nemo_image.shards.index import TarIndex, group_members, index_tar, unreadable
from nemo_image.shards.keys import own_extension
from nemo_image.shards.sources import ByteSource, merge_ranges, open_source

logger = logging.getLogger("nemo_image")

VERSION = "v1.2"

_SIZE_LIMIT = 2**30  # bytes of an index file
_BETWEEN_LIMIT = 2**14  # bytes between two members: headers, and members that the index file leaves out
_RANGES_AT_ONCE = 256
_SPACE = re.compile(r"[ \t\n\r\x0b\f]")  # what parts the words of a line of bytes
_DIGITS = re.compile(rb"[0-9]{1,18}")

Entry = tuple[str, int, int]
"""A member's name, its offset and its size in bytes."""


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
    names = [member.name for sample in index.samples for member in sample.members]
    if _SPACE.search("/".join(names)):
        odd = next(name for name in names if _SPACE.search(name))
        raise ArgumentError(
            f"{os.fspath(url)}: the index format cannot hold white space, which {odd!r} contains: "
            "do without the index file, or rename the members"
        )
    lines = [f"{VERSION} {len(index)}"]
    lines += [" ".join([_words(*member) for member in sample.members]) for sample in index.samples]
    lines.append("")
    with atomic_writer(url, storage_options) as file:
        file.write("\n".join(lines).encode("utf-8", "surrogateescape"))


def _words(name: str, extension: str, offset: int, size: int) -> str:
    # As the name has it: `extension` is in lower case.
    own = extension if name.endswith(extension) else own_extension(name)
    return f"{own} {offset} {size} {name}"


def read_idx(url: Url, tar: Url | ByteSource, storage_options: StorageOptions = None) -> TarIndex:
    """Read a tar's index with the help of its index file.

    Raises
    ------
    TarError
        If either file is missing or unusable, or if they disagree: if the index file names a member that the tar does
        not have at that place, or leaves out one that it has.
    """
    hints = _parse(url, storage_options)
    with _opened(tar, storage_options) as source:
        index, problem = _read_hinted(source, hints)
    if problem is not None:
        raise TarError(f"{os.fspath(url)}: {problem}: write the index file anew, or do without")
    return index


def load_index(tar: Url | ByteSource, storage_options: StorageOptions = None, use_index_file: bool = False) -> TarIndex:
    """Read a tar's index.

    Parameters
    ----------
    tar : str, path or ByteSource
    storage_options : mapping, optional
        For fsspec.
    use_index_file : bool
        Let the index file beside the tar say where the headers are, so that they can be fetched many at once: faster
        where the tar is remote. The result is the same; what is wrong with an index file is logged.

    Raises
    ------
    TarError
        If the tar is missing, truncated, damaged or no tar.
    """
    with _opened(tar, storage_options) as source:
        if not use_index_file:
            return index_tar(source)
        url = idx_url(source.name)
        try:
            index, problem = _read_hinted(source, _parse(url, storage_options))
        except _UnusableIndexFileError as error:
            logger.warning("%s: the tar's own headers are read one by one", error)
            return index_tar(source)
        if problem is not None:
            logger.warning("%s: %s: the tar's own headers count", url, problem)
        return index


class _UnusableIndexFileError(TarError):
    """An index file is missing or cannot be parsed."""


@contextmanager
def _opened(tar: Url | ByteSource, storage_options: StorageOptions) -> Iterator[ByteSource]:
    """Open a tar unless it is open; turn the file system's errors into ours."""
    name = tar.name if isinstance(tar, ByteSource) else os.fspath(tar)
    try:
        if isinstance(tar, ByteSource):
            yield tar
        else:
            with open_source(tar, storage_options) as source:
                yield source
    except OSError as error:
        raise unreadable(name, error) from error


def _parse(url: Url, storage_options: StorageOptions) -> list[Entry]:
    name = os.fspath(url)
    try:
        with open_source(url, storage_options) as source:
            if source.size > _SIZE_LIMIT:
                raise _UnusableIndexFileError(f"{name}: {source.size} bytes are too many for an index file")
            lines = source.read_at(0, source.size).splitlines()
    except FileNotFoundError as error:
        raise _UnusableIndexFileError(f"{name}: no such index file") from error
    except OSError as error:
        raise _UnusableIndexFileError(f"{name}: cannot be read ({error})") from error
    if not lines or lines[0].split() != [VERSION.encode(), str(len(lines) - 1).encode()]:
        first = lines[0][:40] if lines else b""
        raise _UnusableIndexFileError(
            f"{name}: begins with {first!r}, not with '{VERSION} {len(lines) - 1}' for its lines"
        )
    entries: list[Entry] = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split()
        if not words or len(words) % 4 or not all(_DIGITS.fullmatch(word) for i in (1, 2) for word in words[i::4]):
            raise _UnusableIndexFileError(f"{name}: line {number} is not made of '<extension> <offset> <size> <name>'")
        names = [word.decode("utf-8", "surrogateescape") for word in words[3::4]]
        entries += zip(names, map(int, words[1::4]), map(int, words[2::4]), strict=True)
    return entries


def _read_hinted(source: ByteSource, hints: Sequence[Entry]) -> tuple[TarIndex, str | None]:
    """Index a tar with an index file's help; return also in what the two disagree."""
    contents = read_contents(source, _HintedWindow(source, hints))
    there = {offset: (name, size) for name, offset, size in contents.files}
    index = group_members(contents, source.size)
    for name, offset, size in hints:
        if there.get(offset) != (name, size):
            found = "{!r} of {} bytes".format(*there[offset]) if offset in there else "no member"
            return index, f"it puts {name!r} of {size} bytes at byte {offset}, where the tar has {found}"
    listed = {offset for _, offset, _ in hints}
    for sample in index.samples:
        for member in sample.members:
            if member.offset not in listed:
                return index, f"it leaves out {member.name!r} at byte {member.offset}"
    return index, None


class _HintedWindow(HeaderWindow):
    """A window that knows from an index file where headers should be, and fetches many of them at once."""

    def __init__(self, source: ByteSource, hints: Sequence[Entry]) -> None:
        super().__init__(source)
        merged = merge_ranges(_header_ranges(source, hints), source.gap, source.window)
        self._ranges = [(start, stop) for start, stop, _ in merged]
        self._starts = [start for start, _ in self._ranges]
        self._fetched: dict[int, bytes] = {}

    def fill(self, position: int, size: int) -> None:
        """Move the window, so that it holds at least these bytes."""
        place = bisect_right(self._starts, position) - 1
        if place < 0 or position + size > self._ranges[place][1]:
            super().fill(position, size)
            return
        if place not in self._fetched:
            batch = self._batch(place)
            self._fetched = dict(enumerate(self.source.read_ranges(batch), place))
        self.start, self.data = self._starts[place], self._fetched[place]

    def _batch(self, place: int) -> list[tuple[int, int]]:
        batch: list[tuple[int, int]] = []
        left = self.source.ahead
        for start, stop in self._ranges[place : place + _RANGES_AT_ONCE]:
            left -= stop - start
            if batch and left < 0:
                break
            batch.append((start, stop))
        return batch


def _header_ranges(source: ByteSource, hints: Sequence[Entry]) -> list[tuple[int, int]]:
    """Return where headers must be if an index file is right: before, between and behind the members it names."""
    ranges = []
    end = 0
    for _, offset, size in sorted(hints, key=lambda entry: entry[1]):
        if offset < end + BLOCK or offset + size > source.size:
            continue  # it lies, as the walk will find
        ranges.append((end if offset - end <= _BETWEEN_LIMIT else offset - BLOCK, offset))
        end = offset + padded(size)
    if end < source.size:
        ranges.append((end, min(end + 2 * BLOCK, source.size)))
    return ranges
