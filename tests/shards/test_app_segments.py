"""What application segments say of a picture, against Pillow, whose word it must be to the letter."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable

import pytest

from nemo_image.errors import ImageError
from nemo_image.shards import decode
from nemo_image.shards.app_segments import EXIF, PHOTOSHOP, XMP, exif_orientation, is_whole_photoshop, xmp_orientation
from nemo_image.shards.decode import MAX_PIXELS, decode_rgb
from tests.makers import encoded, picture

ORIENTATION, X_RESOLUTION, UNIT, MAKE, MODEL, EXIF_IFD = 0x112, 0x11A, 0x128, 0x10F, 0x110, 0x8769
TYPES = {ORIENTATION: 3, X_RESOLUTION: 5, UNIT: 3, MAKE: 2, MODEL: 2, EXIF_IFD: 4}
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
JPEG = encoded(picture(4, 40, 30))
WITH_DPI = encoded(picture(4, 40, 30), dpi=(72, 72))

Entry = tuple[int, int, int, bytes]  # tag, type, count, value


def tiff(entries: list[Entry], order: str = "<") -> bytes:
    """Return a TIFF header and its first directory, with values of more than four bytes behind it."""
    directory, values = b"", b""
    for tag, kind, count, value in entries:
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = struct.pack(order + "L", 14 + 12 * len(entries) + len(values))
            values += value
        directory += struct.pack(order + "HHL", tag, kind, count) + field
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, len(entries))
    return head + directory + bytes(4) + values


def exif(entries: list[Entry], order: str = "<") -> bytes:
    return EXIF + tiff(entries, order)


def turned(value: int, order: str = "<", kind: int = 3) -> Entry:
    return ORIENTATION, kind, 1, struct.pack(order + "H", value)


def with_segment(data: bytes, marker: int, body: bytes, place: int = 2) -> bytes:
    return data[:place] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[place:]


# ------------------------------------------------------------------------------------------------------------- known


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("value", [0, 1, 6, 8, 9, 300])
def test_the_orientation_is_found_among_other_tags(order: str, value: int) -> None:
    entries: list[Entry] = [
        (MAKE, 2, 9, b"a camera\0"),
        turned(value, order),
        (X_RESOLUTION, 5, 1, struct.pack(order + "LL", 72, 1)),
        (UNIT, 3, 1, struct.pack(order + "H", 2)),
    ]
    assert exif_orientation(exif(entries, order)) == value
    assert exif_orientation(exif([entries[0], *entries[2:]], order)) == -1


@pytest.mark.parametrize(
    "segment",
    [
        EXIF,
        EXIF + exif([turned(6)]),
        EXIF + b"II+\0" + tiff([turned(6)])[4:],
        exif([turned(6)])[:-3],
        exif([turned(6, kind=4)]),
        exif([turned(6), turned(3)]),
        exif([turned(6), (MAKE, 2, 1, b"x")]),
        exif([turned(6), (X_RESOLUTION, 5, 0, b"")]),
        exif([(MAKE, 2, 999, b"a camera\0"), turned(6)]),
        exif([(MAKE, 2, 9, b"a camera\0"), turned(6)]).replace(struct.pack("<L", 38), struct.pack("<L", 39)),
        exif([(MAKE, 2, 60, bytes(60)), (MODEL, 2, 60, bytes(60)), turned(6)])[:-55].replace(
            struct.pack("<L", 110), struct.pack("<L", 50)
        ),
        exif([(MAKE, 99, 1, b"x"), turned(6)]),
        exif([(MAKE, 0, 1, b"x"), turned(6)]),
    ],
    ids=[
        "nothing",
        "twice",
        "no TIFF",
        "cut off",
        "a long",
        "two orientations",
        "descending",
        "a resolution without value",
        "a value that is too long",
        "a value beyond the end",
        "values that share bytes",
        "an unknown type",
        "no type",
    ],
)
def test_what_is_not_in_order_is_left_to_pillow(segment: bytes) -> None:
    assert exif_orientation(segment) is None
    assert decode._own_header(with_segment(JPEG, 0xE1, segment), MAX_PIXELS) is None


@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        ([exif([turned(6)])], 6),
        ([XMP + b'<x tiff:Orientation="3"/>'], 3),
        ([XMP + b"<tiff:Orientation>8</tiff:Orientation>"], 8),
        ([exif([turned(6)]), XMP + b'tiff:Orientation="3"'], 6),
        ([exif([(MAKE, 2, 2, b"x\0")]), XMP + b'tiff:Orientation="3"'], 3),
        ([exif([turned(0)]), XMP + b'tiff:Orientation="3"'], 1),
        ([XMP + b'tiff:Orientation="3"', XMP + b"nothing"], 1),
        ([b"http://ns.adobe.com/xmp/extension/\0" + b'tiff:Orientation="3"'], 1),
    ],
)
def test_exif_counts_then_xmp(segments: list[bytes], orientation: int) -> None:
    data = JPEG
    for segment in reversed(segments):
        data = with_segment(data, 0xE1, segment)
    header = decode._own_header(data, MAX_PIXELS)
    assert header is not None
    assert header.orientation == orientation
    assert header == decode._open(data, MAX_PIXELS)[1]


def test_two_exif_segments_are_left_to_pillow() -> None:
    data = with_segment(with_segment(JPEG, 0xE1, exif([turned(6)])), 0xE1, exif([turned(3)]))
    assert decode._own_header(data, MAX_PIXELS) is None


def test_xmp_numbers() -> None:
    assert xmp_orientation(XMP + b"tiff:Orientation='6'") is None  # Pillow knows no such quotes
    assert xmp_orientation(XMP + b'tiff:Orientation="16"') == 1


def test_photoshops_resources() -> None:
    named = b"8BIM\x04\x04\x02ab\0" + struct.pack(">L", 3) + b"xyz\0"
    plain = b"8BIM\x04\x22\0\0" + struct.pack(">L", 2) + b"xy"
    assert is_whole_photoshop(PHOTOSHOP + named + plain)
    assert is_whole_photoshop(PHOTOSHOP + b"anything else")
    assert not is_whole_photoshop(PHOTOSHOP + named + b"8BIM\x04\x22")
    assert not is_whole_photoshop(PHOTOSHOP + named + plain[:9])
    broken = with_segment(JPEG, 0xED, PHOTOSHOP + b"8BIM\x04\x22")
    assert decode._own_header(broken, MAX_PIXELS) is None


# ------------------------------------------------------------------------------------------------------------ random


def random_exif(rng: random.Random) -> bytes:
    order = rng.choice("<>")
    tags = [rng.choice([ORIENTATION, ORIENTATION, *TYPES, rng.randrange(2**16)]) for _ in range(rng.randint(0, 7))]
    if rng.random() < 0.9:
        tags = sorted(set(tags))
    entries = []
    for tag in tags:
        kind, count = TYPES.get(tag, rng.randint(1, 12)), 1
        if rng.random() < 0.05:
            kind = rng.randint(0, 20)
        if kind == 2:
            count = rng.randint(0, 9)
        value = bytes(rng.randrange(256) for _ in range(count * BYTES.get(kind, 1)))
        if kind == 3:
            value = struct.pack(order + "H", rng.randint(0, 9))
        if rng.random() < 0.05:
            count = rng.choice([0, 2, 100, 2**32 - 1])
        entries.append((tag, kind, count, value))
    segment = exif(entries, order)
    return segment[: rng.randint(0, len(segment))] if rng.random() < 0.05 else segment


def random_xmp(rng: random.Random) -> bytes:
    said = [b"", b'tiff:Orientation="6"', b"tiff:Orientation>3<", b"tiff:Orientation='6'", b'tiff:Orientation="0"']
    return XMP + b"x" * rng.randint(0, 3) + rng.choice(said) + rng.choice(said)


def random_photoshop(rng: random.Random) -> bytes:
    body = PHOTOSHOP
    for _ in range(rng.randint(0, 3)):
        name, value = bytes(rng.randint(0, 3)), bytes(rng.randint(0, 20))
        head = b"8BIM" + struct.pack(">HB", rng.choice([0x3ED, 0x404]), len(name)) + name
        padded = head + bytes(len(head) % 2) + struct.pack(">L", len(value)) + value
        body += padded + bytes(len(padded) % 2)
    return body[: rng.randint(0, len(body))] if rng.random() < 0.2 else body


def random_other(rng: random.Random) -> bytes:
    starts = [b"", b"MPF\0", b"FPXR\0", b"ICC_PROFILE\0\1\1", b"Ducky\0", b"JFIF\0\1\2\0", b"Adobe\0d"]
    return rng.choice(starts) + bytes(rng.randint(0, 20))


KINDS: list[tuple[Callable[[random.Random], bytes], int | None]] = [
    (random_exif, 0xE1), (random_exif, 0xE1), (random_xmp, 0xE1), (random_photoshop, 0xED), (random_other, None),
]  # fmt: skip


def random_picture(rng: random.Random) -> bytes:
    data = rng.choice([JPEG, WITH_DPI])
    whole = len(data)
    for _ in range(rng.randint(1, 3)):
        make, marker = rng.choice(KINDS)
        data = with_segment(data, rng.randint(0xE0, 0xEF) if marker is None else marker, make(rng), rng.choice([2, 20]))
    if rng.random() < 0.25:
        mutant = bytearray(data)
        mutant[rng.randrange(2, 20 + len(data) - whole)] = rng.choice([0, 1, 255, rng.randrange(256)])
        data = bytes(mutant)
    return data


def test_random_segments_say_what_pillow_says() -> None:
    rng = random.Random(3)
    ends: Counter[str] = Counter()
    for _ in range(3000):
        data = random_picture(rng)
        header = decode._own_header(data, MAX_PIXELS)
        if header is None:
            ends["left to Pillow"] += 1
            continue
        try:
            _, by_pillow = decode._open(data, MAX_PIXELS)
        except Exception:
            with pytest.raises(ImageError):
                decode_rgb(data)
            continue
        assert header == by_pillow, data[:400]
        ends["turned" if header.orientation > 1 else "as it is"] += 1
    assert min(ends["left to Pillow"], ends["turned"], ends["as it is"]) > 300, ends
