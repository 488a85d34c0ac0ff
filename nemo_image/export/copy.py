"""Copy samples from many tars: neighbours in one read, what is remote at once, never more than a window in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any, BinaryIO

from nemo_image.errors import TarError
from nemo_image.shards.index import Member, Sample, unreadable
from nemo_image.shards.sources import ByteSource, merge_ranges, open_source

WINDOW = 2**19
"""Bytes of samples that are read from local files before they are written: what stays in a core's cache."""
AT_ONCE = 8
"""Remote files that are read at the same time."""


class LargeWrites:
    """Gathers what is written to a file, and writes it at once: threads of a process wait less for each other.

    To a local file the pieces go as they are (``writev``); elsewhere they are joined first.

    Parameters
    ----------
    file : binary file, open for writing
        Stays open; has everything after :meth:`flush`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pieces: list[bytes | memoryview] = []
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Take the next bytes, which must stay as they are; return how many."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= WINDOW:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Write what has been gathered."""
        if self._size:
            if isinstance(self._file, io.BufferedWriter):
                self._file.flush()  # what others wrote to it stands before
                _write_pieces(self._file.fileno(), self._pieces)
            else:
                self._file.write(b"".join(self._pieces))
        self._pieces, self._size = [], 0


def _write_pieces(descriptor: int, pieces: list[bytes | memoryview]) -> None:
    done = 0
    while done < len(pieces):
        written = os.writev(descriptor, pieces[done : done + _PIECES])
        while done < len(pieces) and written >= len(pieces[done]):
            written -= len(pieces[done])
            done += 1
        if written:  # a part of a piece: the system takes at most 2 GiB at once, and may be interrupted
            pieces[done] = memoryview(pieces[done])[written:]


_PIECES = 1024  # that POSIX systems take at once (IOV_MAX of Linux and macOS)

Piece = tuple[str, Sample]  # the tar's URL, and a sample in it


class SampleSource:
    """Reads samples' members from tars, of which it keeps the last few open; use it in a ``with`` block.

    Parameters
    ----------
    storage_options : mapping
        For fsspec.
    """

    AT_MOST = 64

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        self._storage_options = dict(storage_options)
        self._tars: dict[str, ByteSource] = {}
        self._stack = ExitStack()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> SampleSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        while self._tars:
            self._tars.popitem()[1].close()

    def read(self, pieces: Sequence[Piece]) -> Iterator[list[memoryview | None]]:
        """Yield the bytes of each sample's members, in the order given; None for a member larger than a window.

        Raises
        ------
        TarError
            If a tar does not have them.
        """
        done = 0
        while done < len(pieces):
            window = max(WINDOW, self._tar(pieces[done][0]).ahead)
            stop, size = done, 0
            while stop < len(pieces) and (stop == done or size + _size_of(pieces[stop][1], window) <= window):
                size += _size_of(pieces[stop][1], window)
                stop += 1
            yield from self._read(pieces[done:stop], window)
            done = stop

    def chunks(self, tar_url: str, member: Member) -> Iterator[memoryview]:
        """Yield a member's bytes piece by piece.

        Raises
        ------
        TarError
            If the tar does not have them.
        """
        tar = self._tar(tar_url)
        for offset in range(member.offset, member.offset + member.size, WINDOW):
            size = min(WINDOW, member.offset + member.size - offset)
            yield from _fetch(tar, [member._replace(offset=offset, size=size)]).values()

    def _read(self, pieces: Sequence[Piece], window: int) -> Iterator[list[memoryview | None]]:
        wanted: dict[str, list[Member]] = {}
        for tar_url, sample in pieces:
            wanted.setdefault(tar_url, []).extend(member for member in sample.members if member.size <= window)
        # Opened in this thread, and few enough at once that none of them is closed before it is read.
        found: dict[str, dict[int, memoryview]] = {}
        urls = list(wanted)
        for first in range(0, len(urls), AT_ONCE):
            some = urls[first : first + AT_ONCE]
            tars = [self._tar(url) for url in some]
            members = [wanted[url] for url in some]
            is_remote = len(some) > 1 and any(tar.ahead for tar in tars)
            found |= zip(some, (self._threads().map if is_remote else map)(_fetch, tars, members), strict=True)
        for tar_url, sample in pieces:
            here = found[tar_url]
            yield [here[member.offset] if member.size <= window else None for member in sample.members]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = self._stack.enter_context(ThreadPoolExecutor(AT_ONCE, thread_name_prefix="nemo-image-copy"))
        return self._pool

    def _tar(self, url: str) -> ByteSource:
        tar = self._tars.pop(url, None)
        if tar is None:
            if len(self._tars) >= self.AT_MOST:
                self._tars.pop(next(iter(self._tars))).close()
            try:
                tar = open_source(url, self._storage_options)
            except OSError as error:
                raise unreadable(url, error) from error
        self._tars[url] = tar
        return tar


def _size_of(sample: Sample, window: int) -> int:
    return sum(member.size for member in sample.members if member.size <= window)


def _fetch(tar: ByteSource, members: Sequence[Member]) -> dict[int, memoryview]:
    """Return members' bytes by their offset; neighbours are read together."""
    members = sorted(members, key=_offset)
    ranges = [(member.offset, member.offset + member.size) for member in members]
    merged = list(merge_ranges(ranges, tar.gap, max(WINDOW, tar.window)))
    try:
        blobs = tar.read_ranges([(start, stop) for start, stop, _ in merged])
    except OSError as error:
        raise unreadable(tar.name, error) from error
    found: dict[int, memoryview] = {}
    left = iter(members)
    for (start, _, count), blob in zip(merged, blobs, strict=True):
        view = memoryview(blob)
        for member in islice(left, count):
            data = view[member.offset - start : member.offset - start + member.size]
            if len(data) < member.size:
                raise TarError(
                    f"{tar.name}: member {member.name!r} at byte {member.offset} gave {len(data)} of {member.size} "
                    "bytes: the file was cut off since it was indexed; copy or download it again"
                )
            found[member.offset] = data
    return found


def _offset(member: Member) -> int:
    return member.offset
