"""Files read at offsets: by the operating system where they are local, by ranged requests elsewhere."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import IO

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.shards.files import StorageOptions, Url, open_fs

_KIB, _MIB = 2**10, 2**20


class ByteSource(ABC):
    """A file of known size that is read at offsets, by several threads at once if need be.

    Attributes
    ----------
    name : str
        For messages.
    size : int
        In bytes.
    gap : int
        Bytes: two wanted ranges with less between them are better read as one.
    skip : int
        Bytes: a reader who learns only from one read where the next one begins had better skip this much than read on.
    window : int
        Bytes: the largest read that joins ranges.
    ahead : int
        Bytes that are worth being fetched at once, in several ranges.
    """

    gap = 4 * _KIB
    skip = 4 * _KIB
    window = 64 * _KIB
    ahead = 0

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    @abstractmethod
    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer where the file ends."""

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of several (start, stop) ranges."""
        return [self.read_at(start, stop - start) for start, stop in ranges]

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> ByteSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LocalSource(ByteSource):
    """A local file, read with ``pread``."""

    def __init__(self, path: str, name: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 -- closed by close()
        super().__init__(name, os.fstat(self._file.fileno()).st_size)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer where the file ends."""
        descriptor = self._file.fileno()
        data = os.pread(descriptor, size, offset)
        while len(data) < size:
            # One call gives at most 2 GiB, and may be interrupted.
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RemoteSource(ByteSource):
    """A file of another file system, read by ranges."""

    gap = 64 * _KIB
    skip = _MIB
    window = 4 * _MIB
    ahead = 16 * _MIB

    def __init__(self, fs: AbstractFileSystem, path: str, name: str) -> None:
        self._fs, self._path = fs, path
        fs.invalidate_cache(fs._parent(path))
        size = self._fs.info(path)["size"]
        if size is None:
            raise OSError("the server does not tell the file's size: copy the file to a local disk first")
        super().__init__(name, int(size))

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer where the file ends."""
        return self.read_ranges([(offset, offset + size)])[0]

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of several (start, stop) ranges, fetched at once where the file system can."""
        ranges = [(min(start, self.size), min(stop, self.size)) for start, stop in ranges]
        wanted = [(start, stop) for start, stop in ranges if start < stop]
        try:
            blobs = self._fs.cat_ranges(
                [self._path] * len(wanted),
                [start for start, _ in wanted],
                [stop for _, stop in wanted],
                on_error="raise",
            )
        except OSError:
            raise
        except Exception as error:  # clients of object stores raise what they like
            raise OSError(f"{type(error).__name__}: {error}") from error
        for (start, stop), blob in zip(wanted, blobs, strict=True):
            if len(blob) > stop - start:
                raise OSError("the server ignores byte ranges: copy the file to a local disk first")
        got = iter(blobs)
        return [bytes(next(got)) if start < stop else b"" for start, stop in ranges]

    def close(self) -> None:
        """Do nothing: no connection is kept."""


class FileSource(ByteSource):
    """A seekable binary file object, which stays its owner's to close."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()
        super().__init__(str(getattr(file, "name", "tar file object")), file.seek(0, os.SEEK_END))

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer where the file ends."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def close(self) -> None:
        """Leave the file object open."""


def open_source(file: Url | IO[bytes], storage_options: StorageOptions = None) -> ByteSource:
    """Open a URL or a seekable file object for reading at offsets.

    Raises
    ------
    OSError
        If it cannot be opened.
    """
    if not isinstance(file, str | os.PathLike):
        return FileSource(file)
    fs, path = open_fs(file, storage_options)
    name = os.fspath(file)
    return LocalSource(path, name) if isinstance(fs, LocalFileSystem) else RemoteSource(fs, path, name)


def merge_ranges(ranges: Sequence[tuple[int, int]], gap: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Join neighbours among (start, stop) ranges, in the order given.

    Yields
    ------
    tuple of int
        (start, stop, number of ranges joined). Ranges are joined if at most `gap` bytes lie between them and the
        whole is at most `limit` bytes.
    """
    count = start = stop = 0
    for first, last in ranges:
        if count and 0 <= first - stop <= gap and last - start <= limit:
            count, stop = count + 1, last
            continue
        if count:
            yield start, stop, count
        count, start, stop = 1, first, last
    if count:
        yield start, stop, count
