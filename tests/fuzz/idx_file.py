"""Fuzz target: any bytes as the index file of a tar; whatever they say, the tar's own headers count."""

from __future__ import annotations

import atexit
import io
import random
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from nemo_image.errors import TarError
from nemo_image.shards.idx_file import load_index, read_idx
from nemo_image.shards.index import TarIndex, index_tar
from nemo_image.shards.sources import FileSource

MAX_LEN = 2048


class Counted(FileSource):
    """A tar in memory that counts what is asked of it; its name says where its index file lies."""

    def __init__(self, data: bytes, name: str, window: int) -> None:
        super().__init__(io.BytesIO(data))
        self.name = name
        self.gap = self.skip = 512
        self.window = self.ahead = window
        self.fetched = 0

    def read_at(self, offset: int, size: int) -> bytes:
        assert offset >= 0
        assert 0 <= size <= self.size + 2**16
        data = super().read_at(offset, size)
        self.fetched += len(data)
        return data


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="nemo_image_idx_file_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def check(data: bytes) -> None:
    """Read each of some tars with the help of the bytes: the result is that without help, or a `TarError`."""
    which, text = data[:1], data[1:]
    tar, expected = _tars()[(which[0] if which else 0) % len(_tars())]
    idx = _folder() / "x.idx"
    idx.write_bytes(text)
    for window in (1024, 4096):
        source = Counted(tar, str(idx.with_suffix(".tar")), window)
        assert _result(partial(load_index, source, use_index_file=True)) == expected
        # It may make us read headers twice, at most.
        assert source.fetched <= 3 * len(tar) + 2**18
    strict = _result(partial(read_idx, idx, Counted(tar, "x.tar", 1024)))
    assert isinstance(strict, str) or strict == expected


def _result(read: Callable[[], TarIndex]) -> TarIndex | str:
    try:
        return read()
    except TarError as error:
        return str(error).partition(": ")[2]


@cache
def _tars() -> list[tuple[bytes, TarIndex | str]]:
    """Return tars, the last ones damaged, with what is read of them without help."""
    names = ["a.jpg", "a.txt", "b.seg.png", "b.json", "a.json", "l" * 120 + ".jpg", "README", "z.jpg"]
    made = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            for number, name in enumerate(names):
                if len(name) > 100 and kind == tarfile.USTAR_FORMAT:
                    continue
                info = tarfile.TarInfo(name)
                info.size = number * 700 % 3000
                tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        made.append(out.getvalue())
    made += [made[1][:5000], made[0][:2048] + b"damage" * 100 + made[0][2648:]]
    return [(data, _result(partial(index_tar, Counted(data, "x.tar", 4096)))) for data in made]


# ---------------------------------------------------------------------------------------------------- seeds and mutants


def seeds() -> list[bytes]:
    """Return each whole tar's true index file, and one with the format's other parts."""
    from nemo_image.shards.idx_file import write_idx

    found = [b"\0v1.2 0\n", b"\1v1.2 1\njpg 512 5 a.jpg txt 99999999999999999 1 b.txt\n"]
    for number, (_, index) in enumerate(_tars()):
        if isinstance(index, TarIndex):
            write_idx(index, _folder() / "seed.idx")
            found.append(bytes([number]) + (_folder() / "seed.idx").read_bytes())
    return found


_NUMBERS = (
    b"0", b"512", b"511", b"1", b"1024", b"1536", b"5632", b"10240", b"18446744073709551616", b"999999999999999999",
    b"-1", b"007", b"1e3", b"\xd9\xa1", b"", b"4294967296",
)  # fmt: skip
_WORD = re.compile(rb"[^\s]+")


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change words as words, and mend the count of lines, so that the first check is passed."""
    import atheris  # type: ignore[import-untyped]

    rng = random.Random(seed)
    if rng.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    which, lines = data[:1] or b"\0", data[1:].split(b"\n")
    lines = [line for line in lines[1:] if line] or [b"jpg 512 5 a.jpg"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(lines))
        words = _WORD.findall(lines[place]) or [b"jpg", b"512", b"0", b"a.jpg"]
        word = rng.randrange(len(words))
        deed = rng.randrange(7)
        if deed < 3:
            words[word] = rng.choice(_NUMBERS) if rng.random() < 0.6 else b"%d" % (rng.randrange(30) * 512)
        elif deed == 3:
            other = rng.randrange(len(words))
            words[word], words[other] = words[other], words[word]
        elif deed == 4:
            words += words[: rng.choice((1, 2, 4, 8))]
        elif deed == 5:
            del words[word]
        lines[place] = b" ".join(words)
        if deed == 6:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    if rng.random() < 0.1:
        which = rng.randbytes(1)
    return (which + b"v1.2 %d\n" % len(lines) + b"\n".join(lines) + b"\n")[:max_size]
