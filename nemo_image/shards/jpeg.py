"""The segments of a JPEG up to its first scan (ITU-T T.81, annex B), read without decoding anything.

Decoders allocate what the frame header announces, and need not agree on which one counts if there are several. So the
native decoders get only JPEGs whose header reads the one way that it should.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_image.shards.exif import EXIF, PHOTOSHOP, XMP, exif_orientation, is_whole_photoshop, xmp_orientation

JPEG_SIGNATURE = b"\xff\xd8\xff"

_START_OF_SCAN = 0xDA
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xDE}) - {0xC4, 0xC8, 0xCC}  # DHP (DE) announces a size as well
_HUFFMAN_DCT = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})  # no length follows; none belongs before the scan
_TABLES = frozenset({0xC4, 0xDB, 0xDD})  # DHT, DQT, DRI
_COM, _APP0, _APP1, _APP2, _APP13, _APP14, _APP15 = 0xFE, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
_PROFILE, _FURTHER_PICTURES = b"ICC_PROFILE\0", b"MPF\0"
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
        `ordinary`, and its application segments hold nothing that Pillow might refuse, or read otherwise than we do.
    orientation : int
        What EXIF says, or else XMP, 1 to 8; 1 if neither does. Pillow's word where `bare`, to be ignored otherwise.
    start : int
        Offset in bytes of the start-of-scan marker; the end of the data if there is none.
    """

    sizes: tuple[tuple[int, int], ...]
    components: int
    ordinary: bool
    bare: bool
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
    components, ordinary, bare, position = 0, True, True, 2
    said = _Orientation()
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _START_OF_SCAN:
            ordinary &= len(sizes) == 1
            return JpegScan(tuple(sizes), components, ordinary, ordinary and bare, position, said.upright)
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _BARE_MARKERS or length < 2:
            break
        if marker in _FRAME_HEADERS and position + 10 <= len(data):
            precision, height, width = data[position + 4], *_size(data, position + 5)
            sizes.append((width, height))
            components = components or data[position + 9]
            ordinary = ordinary and marker in _HUFFMAN_DCT and precision == 8
            bare = bare and length == 8 + 3 * components
        elif marker not in _TABLES and bare:
            bare = said.take(marker, length, data[position + 4 : position + 2 + length])
        position += 2 + length
    return JpegScan(tuple(sizes), components, False, False, len(data))


class _Orientation:
    """What the application segments say of how the picture lies."""

    __slots__ = ("exif", "xmp")

    def __init__(self) -> None:
        self.exif: int | None = None
        self.xmp: int | None = None

    def take(self, marker: int, length: int, segment: bytes) -> bool:
        """Take in a segment that is no table; return whether it is one that we read as Pillow does."""
        if marker == _APP1:
            if segment.startswith(EXIF):
                is_first, self.exif = self.exif is None, exif_orientation(segment)
                return is_first and self.exif is not None
            if segment.startswith(XMP):
                self.xmp = xmp_orientation(segment)  # of several, the last counts
            return True
        if marker == _APP2:
            return (
                length >= _SHORTEST_APP + 2
                if segment.startswith(_PROFILE)
                else not segment.startswith(_FURTHER_PICTURES)
            )
        if marker == _APP13:
            return not segment.startswith(PHOTOSHOP) or is_whole_photoshop(segment)
        if marker in (_APP0, _APP14):
            return length >= _SHORTEST_APP
        return marker == _COM or _APP2 < marker <= _APP15  # Pillow keeps the rest without a look

    @property
    def upright(self) -> int:
        """The orientation, 1 to 8."""
        said = self.exif if self.exif is not None and self.exif >= 0 else self.xmp
        return said if said is not None and 1 <= said <= 8 else 1


def is_complete(data: bytes, scan: JpegScan) -> bool:
    """Whether an end-of-image marker follows the first scan: false for a JPEG that was cut off."""
    return data.rfind(b"\xff\xd9", scan.start) >= 0


def _size(data: bytes, position: int) -> tuple[int, int]:
    return data[position] << 8 | data[position + 1], data[position + 2] << 8 | data[position + 3]
