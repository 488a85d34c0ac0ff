"""Pictures for tests: the photographs that scikit-image ships, hand-made PNGs, damaged copies."""

from __future__ import annotations

import functools
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg", "retina.jpg")

STORED: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""How an upright [H, W, 3] picture is stored under each EXIF orientation (EXIF 2.32, figure 13: where the 0th row and
the 0th column belong)."""

UPRIGHT = {**STORED, 6: STORED[8], 8: STORED[6]}
"""The inverse: 90 degrees one way undo 90 degrees the other; the rest undo themselves."""


@functools.cache
def photograph(name: str, width: int = 640) -> Image.Image:
    """Return one of scikit-image's photographs, as RGB of that width."""
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs")
    image = Image.open(Path(data.__file__).parent / name).convert("RGB")
    return image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)


def png(
    rows: Sequence[Sequence[int]],
    depth: int,
    colour: int,
    trns: bytes | None = None,
    palette: bytes | None = None,
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Write a PNG by hand: samples of each row in order, and chunks to put behind the pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    lines = b"".join(b"\0" + _packed(row, depth) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]) // channels, len(rows), depth, colour, 0, 0, 0)
    optional = [(name, body) for name, body in ((b"PLTE", palette), (b"tRNS", trns)) if body is not None]
    chunks = [(b"IHDR", header), *optional, (b"IDAT", zlib.compress(lines)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _packed(samples: Sequence[int], depth: int) -> bytes:
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield damaged copies: flipped and overwritten bytes (half of them in the header), cuts, insertions, tails."""
    rng = random.Random(seed)
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4, 8, 16))):
            place = rng.randrange(len(copy) if rng.random() < 0.5 else min(len(copy), 200))
            copy[place] = rng.choice((rng.randrange(256), copy[place] ^ (1 << rng.randrange(8)), 0, 255))
        if rng.random() < 0.25:
            copy = copy[: rng.randrange(len(copy))]
        if rng.random() < 0.1:
            copy += rng.randbytes(20)
        if rng.random() < 0.1:
            place = rng.randrange(len(copy) + 1)
            copy[place:place] = rng.randbytes(rng.randrange(1, 8))
        yield bytes(copy)
