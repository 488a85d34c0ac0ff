"""Fuzz target: the index of any bytes as a tar."""

from __future__ import annotations

import contextlib
import io
import random
import re
import tarfile
from collections.abc import Iterator
from typing import Any, Self

from nemo_image.errors import TarError
from nemo_image.shards.index import Member, TarIndex, index_tar
from nemo_image.shards.sources import FileSource

MAX_LEN = 16384


class Counted(FileSource):
    """A source that counts what is asked of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.reads = self.fetched = 0

    def read_at(self, offset: int, size: int) -> bytes:
        assert offset >= 0
        assert 0 <= size <= max(self.window, 2**20)
        self.reads += 1
        data = super().read_at(offset, size)
        self.fetched += len(data)
        return data


def check(data: bytes) -> None:
    """Index the bytes: a `TarError`, or members inside the file that :mod:`tarfile` sees as well."""
    source = Counted(data)
    index = None
    with contextlib.suppress(TarError):
        index = index_tar(source)
    # However hostile, each byte is fetched about once.
    assert source.reads <= len(data) // 512 + 8
    assert source.fetched <= 3 * len(data) + 2**17
    if index is not None:
        check_index(index, data)


def check_index(index: TarIndex, data: bytes) -> None:
    """Assert what every index promises of the bytes that it was made from."""
    assert index.size == len(data)
    firsts = [sample.offset for sample in index.samples]
    assert firsts == sorted(firsts)
    assert len(set(index.keys)) == len(index.keys)
    ours = []
    for sample in index.samples:
        offsets = [member.offset for member in sample.members]
        assert offsets == sorted(offsets)
        assert len({member.extension for member in sample.members}) == len(sample.members)
        for member in sample.members:
            assert 512 <= member.offset <= member.offset + member.size <= len(data)
            assert isinstance(member.name, str)
            assert member.extension == member.extension.lower()
            ours.append(member)
    theirs = by_tarfile(data)
    if theirs is not None:
        compare(ours, index, theirs)


def compare(ours: list[Member], index: TarIndex, theirs: list[tuple[str, int, int]]) -> None:
    """Assert that what tarfile sees is listed, with the same name, offset and size, and nothing else."""
    listed = {(member.name, member.offset, member.size) for member in ours}
    assert listed <= set(theirs), listed - set(theirs)
    rest = sorted(name for name, offset, size in theirs if (name, offset, size) not in listed)
    unlisted = sorted([*index.repeated, *index.ignored])
    for name in rest:
        unlisted.remove(name)


class _Regular(tarfile.TarInfo):
    """A member as its format wants it; tarfile makes something of any others, each version its own."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == 512 and buf[345] and (buf[257:263] != b"ustar\0" or not buf[0]):
            raise tarfile.ReadError("tarfile takes what is no prefix in this format for one; or there is only one")
        return super().frombuf(buf, encoding, errors)

    def _proc_gnulong(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        with self._one_own_header(tar, self.type == b"L"):
            if not self._payload(tar).partition(b"\0")[0]:
                raise tarfile.ReadError("an empty long name")
            return super()._proc_gnulong(tar)  # type: ignore[misc,no-any-return]

    def _proc_pax(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        with self._one_own_header(tar, self.type != b"g"):
            left = self._payload(tar)
            while left:
                record = re.match(rb"([1-9][0-9]*) [^=]+=", left)
                length = int(record[1]) if record else 0
                if record is None or not record.end() + 1 < length <= len(left) or left[length - 1] != ord("\n"):
                    raise tarfile.ReadError("irregular pax records")
                if self.type == b"g" and left.startswith(b"size=", record.end() - 5):
                    raise tarfile.ReadError("one size for all; tarfile does not skip so much data")
                left = left[length:]
            return super()._proc_pax(tar)  # type: ignore[misc,no-any-return]

    @contextlib.contextmanager
    def _one_own_header(self, tar: Any, is_own: bool) -> Iterator[None]:
        """Refuse several headers before the same member: which of them counts, nobody says."""
        before = getattr(tar, "in_own_header", False)
        if before and self.type != b"K":
            raise tarfile.ReadError("two extended headers for one member")
        tar.in_own_header = before or is_own
        yield
        tar.in_own_header = before

    def _payload(self, tar: tarfile.TarFile) -> bytes:
        """Return the data of an extended header; refuse data that go on in what should be padding."""
        assert tar.fileobj is not None
        start = tar.fileobj.tell()
        data = tar.fileobj.read(self.size)
        if tar.fileobj.read(-self.size % 512).strip(b"\0"):
            raise tarfile.ReadError("more behind the end")
        tar.fileobj.seek(start)
        return data


def by_tarfile(data: bytes) -> list[tuple[str, int, int]] | None:
    """Return the plain files that tarfile finds; None where it gives up, in silence or not."""
    try:
        with tarfile.open(
            fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape", tarinfo=_Regular
        ) as tar:
            found = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
            # It stops in silence at a header that it takes for damaged; only zeros or the file's end are an end.
            stopped = data[tar.offset : tar.offset + 512]
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError):
        return None
    return None if stopped.strip(b"\0") else found


# ---------------------------------------------------------------------------------------------------- seeds and mutants


def _tar(kind: int, names: list[str], **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(b"d" * info.size))
    return out.getvalue().rstrip(b"\0") + bytes(1024 + -len(out.getvalue().rstrip(b"\0")) % 512)


def seeds() -> list[bytes]:
    """Return small tars of every format."""
    plain = ["a.jpg", "a.txt", "d/b.seg.png", "README"]
    long = ["d" * 80 + "/" + "n" * 90 + ".jpg", "ü" * 60 + ".json"]
    return [
        _tar(tarfile.USTAR_FORMAT, plain),
        _tar(tarfile.GNU_FORMAT, [*plain[:2], *long]),
        _tar(tarfile.PAX_FORMAT, [*plain[:2], *long], mtime=1.5),
        _tar(tarfile.PAX_FORMAT, ["x.jpg"], pax_headers={"path": "p.jpg", "size": "0", "comment": "c"}),
        _tar(tarfile.GNU_FORMAT, ["l.jpg"], type=tarfile.SYMTYPE, linkname="t" * 120),
        _tar(tarfile.USTAR_FORMAT, ["d/"], type=tarfile.DIRTYPE),
        bytes(1024),
    ]


_FIELDS = ((0, 100), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155))
_SIZES = (
    b"00000000000\0", b"00000000005\0", b"77777777777\0", b"\x80" + bytes(10) + b"\x05", b"\xff" * 12, b"5 ", b" " * 11,
    b"-0000000001\0", b"00000001000\0", b"\x80" + b"\xff" * 11, b" 0000000005 ", b"1_0",
)  # fmt: skip
_KINDS = b"0\x007xXgLKSV12345DM"
_RECORDS = (
    b"12 path=a.b\n", b"9 size=5\n", b"10 size=-1\n", b"23 GNU.sparse.name=a.b\n", b"22 GNU.sparse.major=1\n",
    b"19 GNU.sparse.map=\n", b"9 path=a\n", b"9 path=\n\n", b"8 path=\n", b"11 path=a/\n", b"20 hdrcharset=BINARY\n",
    b"99 path=a\n", b"0 path=a\n", b"014 path=a.jpg\n", b" 13 path=a.b\n", b"+12 path=a.b\n", b"11 path=a\0\n",
)  # fmt: skip


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change blocks as blocks and fields as fields, and mend the headers' sums, so that the check is passed."""
    import atheris  # type: ignore[import-untyped]

    rng = random.Random(seed)
    if rng.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    blocks = [bytearray(data[start : start + 512].ljust(512, b"\0")) for start in range(0, len(data), 512)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if blocks:
            _mutate_block(blocks, rng)
    out = b"".join(blocks)[: max_size - max_size % 512]
    return out if rng.random() < 0.9 else out[: rng.randrange(len(out) + 1)]


def _mutate_block(blocks: list[bytearray], rng: random.Random) -> None:
    import atheris

    place = rng.randrange(len(blocks))
    block, deed = blocks[place], rng.randrange(9)
    if deed == 0:
        blocks.insert(place, bytearray(rng.choice(blocks)))
    elif deed == 1 and len(blocks) > 1:
        del blocks[place]
    elif deed == 2:
        start, length = rng.choice(_FIELDS)
        block[start : start + length] = bytes(atheris.Mutate(bytes(block[start : start + length]), length)).ljust(
            length, b"\0"
        )
    elif deed == 3:
        size = rng.choice(_SIZES)
        block[124 : 124 + len(size)] = size
    elif deed == 4:
        block[156] = rng.choice(_KINDS)
    elif deed == 5:
        record = rng.choice(_RECORDS)
        start = block.find(0) if rng.random() < 0.7 else 0
        block[start : start + len(record)] = record
    elif deed == 6:
        records = b"".join(rng.choice(_RECORDS) for _ in range(rng.randrange(1, 4)))
        head = bytearray(512)
        head[:3], head[124:136], head[156], head[257:265] = (
            b"pax",
            b"%011o\0" % len(records),
            rng.choice(b"xgX"),
            b"ustar\x0000",
        )
        blocks[place:place] = [_summed(head), bytearray(records.ljust(512, b"\0"))]
        return
    else:
        block[257:265] = rng.choice((b"ustar\x0000", b"ustar  \0", bytes(8)))
    del block[512:]
    if rng.random() < 0.95 and place < len(blocks):
        blocks[place] = _summed(blocks[place])


def _summed(block: bytearray) -> bytearray:
    total = sum(block) - sum(block[148:156]) + 8 * 32
    block[148:156] = b"%06o\0 " % total
    return block
