"""Fuzz target: any bytes as a picture."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from nemo_image.errors import ImageError
from nemo_image.shards.decode import FORMATS, ImageHeader, decode_pillow, decode_rgb, read_header

MAX_LEN = 4096
MAX_PIXELS = 2**20


def check(data: bytes) -> None:
    """Decode the bytes in every way: an `ImageError`, or upright pixels of the size that the header promised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = _of(read_header, data)
        by_torch = _of(decode_rgb, data)
        by_pillow = _of(decode_rgb, data, decoder="pillow")
        picture = _of(decode_pillow, data)
    if header is None:
        assert by_torch is None
        assert by_pillow is None
        assert picture is None
        return
    _check_header(header)
    assert (by_torch is None) == (by_pillow is None) == (picture is None)
    if by_torch is None:
        return
    for found, pixels in (by_torch, by_pillow):
        assert found == header
        width, height = header.upright_size
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, height, width)
    assert picture[1].mode == "RGB"
    assert torch.equal(by_pillow[1], torch.from_numpy(np.array(picture[1])).permute(2, 0, 1))
    assert torch.equal(by_torch[1], by_pillow[1])


def _check_header(header: ImageHeader) -> None:
    assert header.format in FORMATS
    assert header.width > 0
    assert header.height > 0
    assert header.width * header.height <= MAX_PIXELS
    assert 1 <= header.orientation <= 8


def _of(function: Any, data: bytes, **options: Any) -> Any:
    try:
        return function(data, max_pixels=MAX_PIXELS, **options)
    except ImageError as error:
        category, _, detail = error.reason.partition(": ")
        assert category in {"empty", "unknown", "truncated", "bomb", "unsupported", "memory", "corrupt"}
        assert detail.isprintable() or detail
        assert "\n" not in detail
        return None


# ---------------------------------------------------------------------------------------------------- seeds and mutants


_TIFFS = (
    ("RGB", "tiff_lzw"), ("RGB", "jpeg"), ("1", "group4"), ("L", "packbits"), ("CMYK", "raw"), ("RGBA", "raw"),
    ("F", "tiff_adobe_deflate"), ("I;16", "raw"), ("I", "raw"), ("LAB", "raw"), ("YCbCr", "raw"), ("P", "tiff_deflate"),
)  # fmt: skip


@cache
def seeds() -> list[bytes]:
    """Return small pictures of every format and of many modes."""
    grey = np.arange(63, dtype=np.uint8).reshape(7, 9) * 4
    colour = Image.fromarray(np.stack([grey, grey.T.reshape(7, 9), 255 - grey], -1))
    turned = Image.Exif()
    turned[274] = 6
    made = [
        _saved(colour, "JPEG", quality=60, exif=turned),
        _saved(colour, "JPEG", quality=60, progressive=True, subsampling=2),
        _saved(colour.convert("L"), "JPEG", quality=60),
        _saved(colour.convert("CMYK"), "JPEG", quality=60),
        _saved(colour, "JPEG", restart_marker_blocks=1, subsampling=1),
        _saved(colour, "MPO", save_all=True, append_images=[colour]),
        _saved(colour, "GIF", save_all=True, append_images=[colour.convert("L").convert("P")], transparency=3),
        _saved(colour, "WEBP", quality=40),
        _saved(colour.convert("RGBA"), "WEBP", lossless=True, exif=turned),
        _saved(colour, "WEBP", save_all=True, append_images=[colour.rotate(180)]),
        _saved(colour, "BMP"),
        _saved(colour.convert("P"), "BMP"),
        _saved(colour.convert("1"), "BMP"),
        _saved(colour, "AVIF", quality=30),
        _saved(colour, "PNG", save_all=True, append_images=[colour.rotate(180)]),
        _saved(colour, "PNG", exif=turned),
    ]
    made += [_saved(colour.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")]
    made.append(_saved(colour.convert("L").convert("I;16"), "PNG"))
    made.append(_saved(colour.convert("L"), "PNG", transparency=8))
    for mode, compression in _TIFFS:
        image = Image.frombytes("LAB", colour.size, colour.tobytes()) if mode == "LAB" else colour
        image = image if mode == "LAB" else image.convert("L").convert(mode) if mode in "FI;16" else image.convert(mode)
        made.append(_saved(image, "TIFF", compression=compression))
    return made


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


_WORDS = (0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 256, 1023, 4096, 32767, 32768, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change numbers as numbers, mostly near the beginning; mend a PNG's sums."""
    import atheris  # type: ignore[import-untyped]

    rng = random.Random(seed)
    if rng.random() < 0.4 or len(data) < 16:
        data = bytes(atheris.Mutate(data, max_size))
    else:
        copy = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(min(len(copy), 128) if rng.random() < 0.7 else len(copy))
            code = rng.choice(("<H", ">H", "<I", ">I", "B"))
            value = rng.choice(_WORDS) & (2 ** (8 * struct.calcsize(code)) - 1)
            copy[place : place + struct.calcsize(code)] = struct.pack(code, value)
        data = bytes(copy[:max_size])
    return _mended(data)[:max_size] if data.startswith(b"\x89PNG") and rng.random() < 0.9 else data


def _mended(png: bytes) -> bytes:
    out, position = bytearray(png), 8
    while position + 12 <= len(out):
        length = int.from_bytes(out[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[position + 4 : end]).to_bytes(4, "big")
        position = end + 4
    return bytes(out)
