"""The segments of a JPEG, read against files whose segments are known."""

from __future__ import annotations

import struct

import pytest

from nemo_image.shards.jpeg import is_complete, scan_jpeg
from tests.makers import encoded, picture


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def frame(width: int, height: int, marker: int = 0xC0, precision: int = 8, components: int = 3) -> bytes:
    return segment(marker, struct.pack(">BHHB", precision, height, width, components) + bytes(3 * components))


START, SCAN, END = b"\xff\xd8", segment(0xDA, bytes(10)), b"\xff\xd9"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xc0" * 9}])
def test_pillows_files_are_ordinary(options: dict[str, object]) -> None:
    data = encoded(picture(3, 70, 50), "JPEG", **options)
    scan = scan_jpeg(data)
    assert (scan.sizes, scan.components, scan.ordinary) == (((70, 50),), 3, True)
    assert data[scan.start : scan.start + 2] == b"\xff\xda"
    assert is_complete(data, scan)
    assert not is_complete(data[:-2], scan)


def test_the_end_marker_of_a_thumbnail_is_not_the_pictures() -> None:
    data = START + segment(0xE1, b"Exif\0\0" + START + END) + frame(5, 4) + SCAN + b"entropy"
    assert not is_complete(data, scan_jpeg(data))
    assert is_complete(data + END + b"trailing", scan_jpeg(data))


def test_fill_bytes_are_allowed() -> None:
    assert scan_jpeg(START + b"\xff\xff" + frame(5, 4) + SCAN).ordinary


@pytest.mark.parametrize(
    ("header", "sizes"),
    [
        (frame(5, 4) + frame(5, 4), ((5, 4), (5, 4))),
        (frame(65000, 65000) + frame(5, 4), ((65000, 65000), (5, 4))),
        (frame(5, 4) + segment(0xDE, struct.pack(">BHHB", 8, 9, 9, 0)), ((5, 4), (9, 9))),
        (frame(5, 4, marker=0xC9), ((5, 4),)),
        (frame(5, 4, precision=12), ((5, 4),)),
        (b"junk" + frame(5, 4), ()),
        (START + frame(5, 4), ()),
        (b"\xff\xe0\0\0" + frame(5, 4), ()),
        (b"", ()),
    ],
    ids=["twice", "two sizes", "hierarchical", "arithmetic", "12 bits", "junk", "second start", "no length", "none"],
)
def test_odd_headers_are_not_ordinary(header: bytes, sizes: tuple[tuple[int, int], ...]) -> None:
    scan = scan_jpeg(START + header + SCAN + END)
    assert not scan.ordinary
    assert scan.sizes == sizes


def test_every_cut_is_survived() -> None:
    data = encoded(picture(3))
    start = scan_jpeg(data).start
    for end in range(start + 4):
        scan = scan_jpeg(data[:end])
        assert not scan.ordinary
        assert not is_complete(data[:end], scan)
    assert scan_jpeg(data[: start + 4]).ordinary
