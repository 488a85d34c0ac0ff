"""The segments of a JPEG up to its first scan (ITU-T T.81, annex B), read without decoding anything.

Decoders allocate what the frame header announces, and need not agree on which one counts if there are several. So the
native decoders get only JPEGs whose header reads the one way that it should.
"""

from __future__ import annotations

from dataclasses import dataclass

JPEG_SIGNATURE = b"\xff\xd8\xff"

_START_OF_SCAN = 0xDA
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xDE}) - {0xC4, 0xC8, 0xCC}  # DHP (DE) announces a size as well
_HUFFMAN_DCT = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})  # no length follows; none belongs before the scan
_DHT, _DQT, _DRI, _COM, _APP0, _APP2, _APP14 = 0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xE2, 0xEE
_SHORTEST_APP = 14  # bytes: the fields of JFIF, of Adobe's and of a profile's segment


@dataclass(frozen=True, slots=True)
class JpegScan:
    """What the segments before the first scan say.

    Attributes
    ----------
    sizes : tuple of (int, int)
        Width and height in pixels of every frame header.
    components : int
        Colour components of the first frame.
    ordinary : bool
        One frame, 8 bits a sample, Huffman-coded DCT, and every segment where the one before it ends.
    bare : bool
        Nothing but tables, comments, JFIF's and Adobe's segments and a colour profile: no EXIF or XMP, which could turn
        the picture, and nothing that Pillow might refuse.
    start : int
        Offset in bytes of the start-of-scan marker; the end of the data if there is none.
    """

    sizes: tuple[tuple[int, int], ...]
    components: int
    ordinary: bool
    bare: bool
    start: int


def scan_jpeg(data: bytes) -> JpegScan:
    """Walk the segments of a JPEG up to its first scan.

    Parameters
    ----------
    data : bytes
        The file, from its ``FF D8``. Damaged files are read as far as their segments make sense.
    """
    sizes: list[tuple[int, int]] = []
    components, ordinary, bare, position = 0, True, True, 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _START_OF_SCAN:
            ordinary &= len(sizes) == 1
            return JpegScan(tuple(sizes), components, ordinary, ordinary and bare, position)
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _BARE_MARKERS or length < 2:
            break
        if marker in _FRAME_HEADERS and position + 10 <= len(data):
            precision, height, width = data[position + 4], *_size(data, position + 5)
            sizes.append((width, height))
            components = components or data[position + 9]
            ordinary = ordinary and marker in _HUFFMAN_DCT and precision == 8
            bare = bare and length == 8 + 3 * components
        else:
            bare = bare and _is_harmless(marker, length, data[position + 4 : position + 16])
        position += 2 + length
    return JpegScan(tuple(sizes), components, False, False, len(data))


def _is_harmless(marker: int, length: int, start: bytes) -> bool:
    """Whether a segment says nothing of the picture but how it is coded."""
    if marker in (_DHT, _DQT, _DRI, _COM):
        return True
    if marker == _APP2:  # or a list of further pictures
        return length >= _SHORTEST_APP + 2 and start == b"ICC_PROFILE\0"
    return marker in (_APP0, _APP14) and length >= _SHORTEST_APP


def is_complete(data: bytes, scan: JpegScan) -> bool:
    """Whether an end-of-image marker follows the first scan: false for a JPEG that was cut off."""
    return data.rfind(b"\xff\xd9", scan.start) >= 0


def _size(data: bytes, position: int) -> tuple[int, int]:
    return data[position] << 8 | data[position + 1], data[position + 2] << 8 | data[position + 3]
