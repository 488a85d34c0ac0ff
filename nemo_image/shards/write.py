"""Writing a shard's tar: the same bytes for the same members, whoever writes them, and when.

The format is ustar (POSIX.1-1988); a pax header (POSIX.1-2001) precedes a member whose name is too long for it or is
not ASCII, or whose size is 8 GiB or more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from nemo_image.errors import ArgumentError
from nemo_image.shards.headers import BLOCK, Contents, padded
from nemo_image.shards.index import Member, TarIndex, group_members
from nemo_image.shards.keys import split_member_name

_RECORD = 20 * BLOCK  # tar pads to whole records
_SIZE_LIMIT = 8**11  # bytes: eleven octal digits
_PAX_NAME = b"././@PaxHeader"


class TarWriter:
    """Writes a tar into a binary file, and keeps its index.

    Every member is a plain file of mode 0644, owner 0 and time 0. :meth:`close` writes the end mark; a ``with`` block
    does so unless it ends with an exception. The file stays open.

    Parameters
    ----------
    file : binary file, open for writing
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self._files: list[tuple[str, int, int]] = []
        self._is_closed = False

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()

    def add(self, name: str, data: bytes | memoryview) -> Member:
        """Write a member; return where it lies.

        Raises
        ------
        ArgumentError
            If the name cannot be a file's in a tar.
        """
        member = self._begin(name, len(data))
        self._file.write(data)
        self._finish(member)
        return member

    def add_from(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> Member:
        """Write a member of known size piece by piece; return where it lies.

        Parameters
        ----------
        name : str
        size : int
            In bytes.
        chunks : iterable of bytes-like pieces

        Raises
        ------
        ArgumentError
            If the name cannot be a file's in a tar, or if the pieces make another size. The tar is then unusable.
        """
        member = self._begin(name, size)
        written = 0
        for chunk in chunks:
            written += len(chunk)
            if written > size:
                break
            self._file.write(chunk)
        if written != size:
            self._is_closed = True
            more = "more than " if written > size else f"{written} of "
            raise ArgumentError(
                f"member {name!r}: its pieces make {more}the {size} bytes announced: write the tar anew"
            )
        self._finish(member)
        return member

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._position

    def close(self) -> None:
        """Write the end mark. Members can no longer be added."""
        if not self._is_closed:
            self._is_closed = True
            end = self._position + 2 * BLOCK
            end += -end % _RECORD
            self._file.write(bytes(end - self._position))
            self._position = end

    def index(self) -> TarIndex:
        """Return the index of what has been written, as :func:`~nemo_image.shards.index.index_tar` would read it."""
        return group_members(Contents(list(self._files), []), self._position)

    def _begin(self, name: str, size: int) -> Member:
        if self._is_closed:
            raise ArgumentError(f"member {name!r}: the tar is closed, or unusable since an error: write a new one")
        header = _headers(name, size)
        self._file.write(header)
        self._position += len(header)
        _, extension = split_member_name(name) or ("", "")
        return Member(name, extension, self._position, size)

    def _finish(self, member: Member) -> None:
        self._file.write(bytes(padded(member.size) - member.size))
        self._position += padded(member.size)
        self._files.append((member.name, member.offset, member.size))


def _headers(name: str, size: int) -> bytes:
    """Return what stands before a member's data: its header, after a pax header if it needs one."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ArgumentError(f"member {name!r}: the name cannot be encoded ({error.reason}): give another") from error
    if not raw or b"\0" in raw or raw.endswith(b"/"):
        raise ArgumentError(
            f"member {name!r}: no name for a file in a tar: give one with no NUL, not ending in a slash"
        )
    records: list[tuple[bytes, bytes]] = []
    # The one place where a long name can be cut in two.
    slash = raw.find(b"/", max(1, len(raw) - 101), 156) if len(raw) > 100 else -1
    prefix, short = (raw[:slash], raw[slash + 1 :]) if slash > 0 else (b"", raw[:100])
    if not raw.isascii() or (len(raw) > 100 and slash < 0):
        if not _is_utf8(raw):
            records.append((b"hdrcharset", b"BINARY"))
        records.append((b"path", raw))
    if size >= _SIZE_LIMIT:
        records.append((b"size", b"%d" % size))
        size = 0
    header = _header(short, prefix, size, b"0")
    if not records:
        return header
    payload = b"".join(_pax_record(key, value) for key, value in records)
    return _header(_PAX_NAME, b"", len(payload), b"x") + payload.ljust(padded(len(payload)), b"\0") + header


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _pax_record(key: bytes, value: bytes) -> bytes:
    """Return ``"<length> <key>=<value>\\n"``; the length counts itself."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    length = len(rest) + len(str(length))  # one digit more where the first step made it so
    return b"%d" % length + rest


_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"%011o\0" % 0
_MAGIC = b"ustar\x0000"
# The sum counts its own field as eight spaces.
_FIXED_SUM = sum(_OWNER + _TIME + _MAGIC) + 8 * ord(" ")


def _header(name: bytes, prefix: bytes, size: int, kind: bytes) -> bytes:
    length = b"%011o\0" % size
    total = _FIXED_SUM + sum(name) + sum(prefix) + sum(length) + kind[0]
    parts = (name.ljust(100, b"\0"), _OWNER, length, _TIME, b"%06o\0 " % total, kind, bytes(100), _MAGIC, bytes(80))
    return b"".join(parts) + prefix.ljust(167, b"\0")
