"""The segments of a JPEG up to its first scan (ITU-T T.81, annex B), read without decoding anything.

Decoders allocate what the frame header announces, and need not agree on which one counts if there are several. So the
native decoders get only JPEGs whose header reads the one way that it should.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_image.shards.app_segments import AppSegments

JPEG_SIGNATURE = b"\xff\xd8\xff"

_START_OF_SCAN = 0xDA
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xDE}) - {0xC4, 0xC8, 0xCC}  # DHP (DE) announces a size as well
_HUFFMAN_DCT = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})  # no length follows; none belongs before the scan
_TABLES = frozenset({0xC4, 0xDB, 0xDD})  # DHT, DQT, DRI
_COMMENT = 0xFE
_APP0, _APP15 = 0xE0, 0xEF


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
    unambiguous : bool
        `ordinary`, and nothing in it that Pillow might refuse, or read otherwise than we do.
    start : int
        Offset in bytes of the start-of-scan marker; the end of the data if there is none.
    orientation : int
        EXIF's, or else XMP's, 1 to 8; 1 if neither has one. To be trusted where `unambiguous`.
    """

    sizes: tuple[tuple[int, int], ...]
    components: int
    ordinary: bool
    unambiguous: bool
    start: int
    orientation: int = 1


def scan_jpeg(data: bytes) -> JpegScan:
    """Walk the segments of a JPEG up to its first scan.

    Parameters
    ----------
    data : bytes
        The file, from its ``FF D8``. Damaged files are read as far as their segments make sense.
    """
    sizes: list[tuple[int, int]] = []
    components, ordinary, clear, position = 0, True, True, 2
    segments = AppSegments()
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _START_OF_SCAN:
            ordinary &= len(sizes) == 1
            return JpegScan(tuple(sizes), components, ordinary, ordinary and clear, position, segments.orientation)
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _BARE_MARKERS or length < 2:
            break
        if marker in _FRAME_HEADERS and position + 10 <= len(data):
            precision, height, width = data[position + 4], *_size(data, position + 5)
            sizes.append((width, height))
            components = components or data[position + 9]
            ordinary = ordinary and marker in _HUFFMAN_DCT and precision == 8
            clear = clear and length == 8 + 3 * components
        elif _APP0 <= marker <= _APP15:
            clear = clear and segments.take(marker, data[position + 4 : position + 2 + length])
        else:
            clear = clear and (marker in _TABLES or marker == _COMMENT)
        position += 2 + length
    return JpegScan(tuple(sizes), components, False, False, len(data))


def is_complete(data: bytes, scan: JpegScan) -> bool:
    """Whether an end-of-image marker follows the first scan: false for a JPEG that was cut off."""
    return data.rfind(b"\xff\xd9", scan.start) >= 0


def _size(data: bytes, position: int) -> tuple[int, int]:
    return data[position] << 8 | data[position + 1], data[position + 2] << 8 | data[position + 3]
