"""Files read at offsets: by the operating system where they are local, by ranged requests elsewhere."""

from __future__ import annotations

import errno
import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, BinaryIO, cast

from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from nemo_image.shards import retries
from nemo_image.shards.files import StorageOptions, Url, open_fs

_KIB, _MIB = 2**10, 2**20
_ADVISED = 128 * _KIB  # bytes that Linux reads ahead on one advice, with its default settings
_NO_RANGES = "the server ignores byte ranges: copy the file to a local disk first"


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

    def fetch_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:  # noqa: B027 -- advice, which need not be taken
        """Advise that several (start, stop) ranges will be read soon; returns at once."""

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

    def fetch_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Have the kernel read several (start, stop) ranges into its cache; returns at once."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        with suppress(OSError):  # not every file system takes advice
            for start, stop in ranges:
                for piece in range(start, stop, _ADVISED):
                    os.posix_fadvise(self._file.fileno(), piece, min(_ADVISED, stop - piece), os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RemoteSource(ByteSource):
    """A file of another file system, read by ranges; what fails for a moment is asked for again."""

    gap = 64 * _KIB
    skip = _MIB
    window = 4 * _MIB
    ahead = 16 * _MIB

    def __init__(self, fs: AbstractFileSystem, path: str, name: str) -> None:
        self._fs, self._path = fs, path
        info = retries.call(name, lambda: fs.info(path))
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder", name)
        if info["size"] is None:
            raise OSError("the server does not tell the file's size: copy the file to a local disk first")
        super().__init__(name, int(info["size"]))
        # Asked before anything is read: a web server that ignores the range sends the whole file.
        is_web = self.size > 0 and "http" in fs.protocol
        if is_web and not (info.get("partial", True) and retries.call(name, lambda: _serves_ranges(fs, path))):
            raise OSError(_NO_RANGES)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer where the file ends."""
        return self.read_ranges([(offset, offset + size)])[0]

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of several (start, stop) ranges, fetched at once where the file system can.

        Raises
        ------
        OSError
            If the storage does not give them, also after several tries.
        """
        ranges = [(min(start, self.size), min(stop, self.size)) for start, stop in ranges]
        found: dict[tuple[int, int], bytes] = {(start, stop): b"" for start, stop in ranges if start >= stop}

        def fetch() -> None:
            missing = [one for one in dict.fromkeys(ranges) if one not in found]
            failures = []
            for one, blob in zip(missing, self._ask_for(missing), strict=True):
                try:
                    found[one] = self._checked(one, blob)
                except OSError as error:
                    failures.append(error)  # what came is kept, only the rest is asked for again
            if failures:
                raise failures[0]

        retries.call(self.name, fetch)
        return [found[one] for one in ranges]

    def _ask_for(self, ranges: Sequence[tuple[int, int]]) -> list[bytes | Exception]:
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        return list(self._fs.cat_ranges([self._path] * len(ranges), starts, stops, on_error="return"))

    def _checked(self, wanted: tuple[int, int], blob: bytes | Exception) -> bytes:
        if isinstance(blob, OSError):
            raise blob
        if isinstance(blob, Exception):  # clients of object stores raise what they like
            raise OSError(f"{type(blob).__name__}: {blob}") from blob
        start, stop = wanted
        if len(blob) > stop - start:
            raise OSError(_NO_RANGES)
        if len(blob) < stop - start:
            raise retries.CutOffError(
                f"{len(blob)} of the {stop - start} bytes from {start} on came: the transfer was cut off, or the file "
                "was replaced while it was read"
            )
        return bytes(blob)

    def close(self) -> None:
        """Do nothing: no connection is kept."""


def _serves_ranges(fs: Any, url: str) -> bool:
    """Ask a web server for one byte, and tell whether it answers with just that."""

    async def ask() -> bool:
        session = await fs.set_session()
        headers = {**fs.kwargs.get("headers", {}), "Range": "bytes=0-0"}
        async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as response:
            response.raise_for_status()
            return bool(response.status == 206)

    return bool(sync(fs.loop, ask))


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


class SourceFile(io.RawIOBase):
    """A source as a binary file object, which reads the ranges asked for and nothing ahead.

    fsspec's own files of remote file systems read megabytes ahead, which a reader of few columns does not want.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read anywhere."""
        return True

    def tell(self) -> int:
        """Return the position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` bytes from the start, the position or the end; return the new position."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes, all that are left by default."""
        left = max(0, self._source.size - self._position)
        data = self._source.read_at(self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the source too."""
        if not self.closed:
            self._source.close()
        super().close()


def open_file(url: Url, storage_options: StorageOptions = None) -> BinaryIO:
    """Open a file for reading: a local one as ever, a remote one as a :class:`SourceFile`.

    Raises
    ------
    OSError
        If it cannot be opened.
    """
    fs, path = open_fs(url, storage_options)
    if isinstance(fs, LocalFileSystem):
        return open(path, "rb")
    return cast(BinaryIO, SourceFile(RemoteSource(fs, path, os.fspath(url))))


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
