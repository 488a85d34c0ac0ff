"""The headers of a tar, one after the other.

They are read here, not by :mod:`tarfile`, which makes an object of each and is several times slower. The formats are
those of POSIX.1-2001 (ustar and pax), of GNU tar, and what came before (v7).
"""

from __future__ import annotations

import logging
from typing import NamedTuple
from zlib import adler32

from nemo_image.errors import TarError
from nemo_image.shards.sources import ByteSource

logger = logging.getLogger("nemo_image")

BLOCK = 512
"""Bytes of a tar's blocks: a header takes one, a member's data is padded to whole ones."""

_ZEROS = bytes(BLOCK)
_EXTENSION_LIMIT = 2**20  # bytes of a long name or of pax records
_TAIL = 2**16  # bytes looked at behind the end mark
_SUMS_KEPT = 2**14

# Type flags; numbers, because indexing bytes gives numbers.
_REGULAR = frozenset(b"0\x007")
_EXTENSIONS = frozenset(b"xXgLK")  # headers about the next member: pax (Solaris writes X), GNU's long names
_PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE, _FOLDER = b"gLKS5"
_DATALESS = frozenset(b"123456")  # links, devices, folders, pipes: no data, whatever their size says

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class Contents(NamedTuple):
    """A tar's members as they come: (name, offset, size) of its files, and the names of its links and devices.

    `has_end` tells whether the tar has an end mark. Where it has none, members may have been cut off.
    """

    files: list[tuple[str, int, int]]
    others: list[str]
    has_end: bool = True


class HeaderWindow:
    """A window that follows the headers through a tar.

    Where headers lie close together it grows, so that the file streams by in large reads; where members are larger than
    the source's `skip` it stays small, and their data is never fetched.
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.start = 0
        self.data = b""
        self._size = source.gap

    def read(self, position: int, size: int) -> bytes:
        """Return `size` bytes from `position` on, fewer where the file ends."""
        begin = position - self.start
        if begin < 0 or begin + size > len(self.data):
            self.fill(position, size)
            begin = position - self.start
        return self.data[begin : begin + size]

    def fill(self, position: int, size: int) -> None:
        """Move the window, so that it holds at least these bytes."""
        skipped = position - self.start - len(self.data)
        self._size = min(self._size * 2, self.source.window) if skipped < self.source.skip else self.source.gap
        self.start, self.data = position, self.source.read_at(position, max(size, self._size))


def read_contents(source: ByteSource, window: HeaderWindow) -> Contents:
    """Walk through a tar's headers.

    Raises
    ------
    TarError
        As :func:`index_tar`.
    """
    return _Walk(source, window).run()


class _Walk:
    """One walk through a tar: what has been found, and the extended headers in force."""

    def __init__(self, source: ByteSource, window: HeaderWindow) -> None:
        self.source = source
        self.window = window
        self.found = Contents([], [])
        self.sums: dict[bytes, int] = {}  # what Adler-32 must give, by sum field
        self.shared: dict[str, str] = {}  # pax values for all members that follow
        self.own: dict[str, str] = {}  # … for the next one
        self.awaited = -1  # where a member must begin, because an extended header stands before

    def run(self) -> Contents:
        """Walk to the end. Written out, because a tar has many headers and a call costs as much as reading a field."""
        files, window, total = self.found.files, self.window, self.source.size
        sums, own, shared = self.sums, self.own, self.shared
        start, seen = window.start, window.data
        position = 0
        while True:
            begin = position - start
            header = seen[begin : begin + 512]
            if len(header) < 512:
                header = window.read(position, 512)
                start, seen = window.start, window.data
                if len(header) < 512:  # its sum may be right all the same: what is missing may be zeros
                    self.end(position, header)
                    return self.found
            if sums.get(header[148:156]) != adler32(header) & 0xFFFF:
                if header == _ZEROS:
                    self.end(position, header)
                    return self.found
                self.check_sum(header, position)
            if header[156] != 48 or own or shared:
                position = self.special(header, position)
                start, seen = window.start, window.data
                continue
            # A plain file, by far the most common.
            try:
                size = int(header[124:135], 8) if header[135] in b"\0 " else -1
            except ValueError:
                size = -1
            if size < 0:
                size = self.size_of(header, position)
            offset = position + 512
            end = header.find(0)
            name = (
                header[:end].decode("utf-8", "surrogateescape") if end < 100 and not header[345] else _name_of(header)
            )
            position = offset + (size + 511 & -512)
            if position > total:
                raise self.cut_off(f"member {name!r}", offset, position)
            files.append((name, offset, size))

    def check_sum(self, header: bytes, position: int) -> None:
        """Check a header's sum, and remember what Adler-32 gives beside the same sum field."""
        field = header[148:156]
        expected = _number(field)
        if expected is not None:
            # Adler-32's low half is 1 + the sum of all bytes, modulo 65521. The sum meant counts the field as spaces.
            adler = (1 + expected - 8 * ord(" ") + sum(field)) % 65521
            if adler == adler32(header) & 0xFFFF:
                if len(self.sums) < _SUMS_KEPT:
                    self.sums[field] = adler
                return
        signed = sum(byte - 256 * (byte > 127) for byte in header[:148] + header[156:]) + 8 * ord(" ")
        if expected != signed:  # as some old programs sum
            raise self.no_header(position, header)

    def size_of(self, header: bytes, position: int) -> int:
        """Return a header's size field."""
        try:
            size: int | None = int(header[124:135], 8) if header[135] in b"\0 " else _number(header[124:136])
        except ValueError:
            size = _number(header[124:136])
        if size is None or size < 0:
            raise self.error(
                position, f"the member {_name_of(header)!r} has no valid size", "the tar is damaged: make it anew"
            )
        return size

    def special(self, header: bytes, position: int) -> int:
        """Take in a header that is no plain file's, or that others extend; return where the next one begins."""
        kind, data, size = header[156], position + BLOCK, self.size_of(header, position)
        if kind in _EXTENSIONS:
            self.extend(kind, data, size)
            return data + padded(size)
        fields = {**self.shared, **self.own}
        self.own.clear()
        name = fields.get("path") or _name_of(header)
        if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in fields):
            raise self.error(position, f"the member {name!r} is stored sparse", "make the tar without --sparse")
        if "size" in fields:
            size = self.pax_size(fields["size"], name, position)
        is_old_folder = kind == 0 and _name_of(header).endswith("/")
        if kind in _DATALESS or is_old_folder:
            size = 0
        after = data + padded(size)
        if after > self.source.size:
            raise self.cut_off(f"member {name!r}", data, after)
        if kind in _REGULAR and not is_old_folder:
            self.found.files.append((name, data, size))
        elif kind != _FOLDER and not is_old_folder:
            self.found.others.append(name)
        return after

    def pax_size(self, text: str, name: str, position: int) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self.error(
                position, f"the member {name!r} has the size {text[:40]!r}", "the tar is damaged: make it anew"
            )
        return int(text)

    def extend(self, kind: int, data: int, size: int) -> None:
        """Take in an extended header: a long name, or pax records."""
        if data + padded(size) > self.source.size:
            raise self.cut_off("an extended header", data, data + padded(size))
        if size > _EXTENSION_LIMIT:
            raise self.error(
                data, f"an extended header of {size} bytes", "no honest one is so large: make the tar anew"
            )
        payload = self.window.read(data, size)
        if kind != _PAX_GLOBAL:
            self.awaited = data + padded(size)
        if kind == _LONG_NAME:
            self.own.setdefault("path", _text(payload.partition(b"\0")[0]))
        elif kind != _LONG_LINK and (b"path=" in payload or b"size=" in payload or b"GNU.sparse" in payload):
            # Most pax headers only tell fractions of seconds.
            records = self.pax_records(payload, data)
            (self.shared if kind == _PAX_GLOBAL else self.own).update(records)

    def pax_records(self, payload: bytes, data: int) -> dict[str, str]:
        """Parse ``"<length> <key>=<value>\\n"`` records; return those that matter here."""
        records: dict[str, str] = {}
        position = 0
        while position < len(payload) and payload[position]:
            digits, _, _ = payload[position : position + 20].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            record = payload[position : position + length]
            key, equals, value = record[len(digits) + 1 :].partition(b"=")
            # A name with a NUL is no name: others would read it up to there.
            is_cut = key == b"path" and b"\0" in value
            if not equals or len(record) < length or not record.endswith(b"\n") or is_cut:
                raise self.error(
                    data + position, "a pax record that cannot be read", "the tar is damaged: make it anew"
                )
            if key == b"path":
                records["path"] = _text(value[:-1].rstrip(b"/"))
            elif key == b"size" or key.startswith(b"GNU.sparse."):
                records[_text(key)] = _text(value[:-1])
            position += length
        return records

    def end(self, position: int, header: bytes) -> None:
        """Check that the tar may end here."""
        name, total = self.source.name, self.source.size
        if not total:
            raise TarError(f"{name}: is empty (0 bytes): copy or download it again")
        if header.strip(b"\0") or (position == 0 and len(header) < BLOCK):
            if position == 0:
                raise self.no_header(0, header)
            raise self.cut_off("a header", position, position + BLOCK)
        if position == self.awaited:
            raise self.error(
                position, "the tar ends between an extended header and its member", "copy or download it again"
            )
        if len(header) < BLOCK:
            self.found = self.found._replace(has_end=False)
            logger.warning(
                "%s: byte %d: no end mark; the tar may have been cut off between two members", name, position
            )
            return
        if self.window.read(position + BLOCK, BLOCK).strip(b"\0"):
            raise self.error(
                position,
                "a block of zeros where a header should be, with more behind it",
                "copy or download the tar again",
            )
        if self.window.read(position + 2 * BLOCK, _TAIL).strip(b"\0"):
            logger.warning("%s: byte %d: the tar ends here, but more data follows, which is not read", name, position)

    def error(self, position: int, problem: str, advice: str) -> TarError:
        return TarError(f"{self.source.name}: byte {position}: {problem}: {advice}")

    def cut_off(self, what: str, position: int, stop: int) -> TarError:
        problem = f"{what} needs bytes up to {stop}, the file ends at {self.source.size}"
        return self.error(position, problem, "the tar is cut off: copy or download it again")

    def no_header(self, position: int, header: bytes) -> TarError:
        if position:
            return self.error(
                position,
                "no member's header, though one must begin here",
                "the tar is damaged: copy or download it again",
            )
        for magic, method in _COMPRESSIONS.items():
            if header.startswith(magic):
                return self.error(
                    0,
                    f"compressed with {method}, so that no member can be read by its offset",
                    "decompress the file first",
                )
        return self.error(
            0, "not a tar, it begins with " + repr(header[:16]), "name a tar, or copy or download it again"
        )


def padded(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return (size + BLOCK - 1) & -BLOCK


def _name_of(header: bytes) -> str:
    end = header.find(0, 0, 100)
    name = header[: end if end >= 0 else 100]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's own format keeps times there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    """Return a header's number: octal digits, or GNU's binary one, which the top bit marks; None if it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.partition(b"\0")[0].strip(b" ")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)
