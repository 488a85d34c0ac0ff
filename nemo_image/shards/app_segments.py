"""A JPEG's application segments, as far as they say how the picture lies.

Pillow reads it all, which takes as long as a fifth of decoding the picture. What is read here can be read in one way
only; Pillow has the word on everything else.
"""

from __future__ import annotations

import re
import struct

EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
PHOTOSHOP = b"Photoshop 3.0\0"

_APP0, _APP1, _APP2, _APP13, _APP14 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE
_PROFILE, _FURTHER_PICTURES = b"ICC_PROFILE\0", b"MPF\0"
_SHORTEST = 12  # bytes: the fields of JFIF and of Adobe's segment

_ORIENTATION, _X_RESOLUTION, _RESOLUTION_UNIT = 0x112, 0x11A, 0x128
_SHORT, _RATIONAL = 3, 5
_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # of a value, by its type (TIFF 6.0, section 2)
_EXPECTED = {_ORIENTATION: (_SHORT, 1), _X_RESOLUTION: (_RATIONAL, 1), _RESOLUTION_UNIT: (_SHORT, 1)}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


class AppSegments:
    """The application segments of one JPEG, taken in one after the other."""

    __slots__ = ("_exif", "_xmp")

    def __init__(self) -> None:
        self._exif: int | None = None
        self._xmp: int | None = None

    def take(self, marker: int, segment: bytes) -> bool:
        """Take in a segment; return whether Pillow reads it as we do, and cannot refuse it.

        Parameters
        ----------
        marker : int
            Second byte of its marker, E0 to EF.
        segment : bytes
            What follows its length.
        """
        if marker == _APP1:
            if segment.startswith(EXIF):
                is_first, self._exif = self._exif is None, exif_orientation(segment)
                return is_first and self._exif is not None
            if segment.startswith(XMP):
                self._xmp = xmp_orientation(segment)  # of several, the last counts
            return True
        if marker == _APP2:
            if segment.startswith(_PROFILE):
                return len(segment) >= len(_PROFILE) + 2
            return not segment.startswith(_FURTHER_PICTURES)
        if marker == _APP13:
            return not segment.startswith(PHOTOSHOP) or is_whole_photoshop(segment)
        if marker in (_APP0, _APP14):
            return len(segment) >= _SHORTEST
        return True  # Pillow does not look into the others

    @property
    def orientation(self) -> int:
        """EXIF's, or else XMP's, 1 to 8; 1 if neither has one."""
        said = self._exif if self._exif is not None and self._exif >= 0 else self._xmp
        return said if said is not None and 1 <= said <= 8 else 1


def exif_orientation(segment: bytes) -> int | None:
    """Read the orientation from an EXIF segment whose first directory is in order.

    In order: its tags ascend, their values lie inside the segment, and those that Pillow looks at have the type and the
    count that EXIF 2.3 (table 4) asks for.

    Parameters
    ----------
    segment : bytes
        From its ``Exif\\0\\0`` on.

    Returns
    -------
    int or None
        The tag's value, -1 where there is no such tag, None where the directory is not in order.
    """
    tiff = segment[len(EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (start,) = struct.unpack_from(order + "L", tiff, 4)
    if not 8 <= start <= len(tiff) - 2:
        return None
    (count,) = struct.unpack_from(order + "H", tiff, start)
    end = start + 2 + 12 * count
    if end + 4 > len(tiff):
        return None
    found, last, total = -1, -1, 0
    for tag, kind, values, inline, offset in _entries(order, tiff[start + 2 : end]):
        if tag <= last or not 0 < kind < len(_BYTES) or _EXPECTED.get(tag, (kind, values)) != (kind, values):
            return None
        size, last = values * _BYTES[kind], tag
        if size > 4:
            total += size
            if offset + size > len(tiff) or total > len(tiff):
                return None
        if tag == _ORIENTATION:
            found = inline
    return found


def _entries(order: str, directory: bytes) -> list[tuple[int, int, int, int, int]]:
    """Return tag, type, count, and what the value field holds as a short and as an offset, of every entry."""
    shorts = struct.iter_unpack(order + "8xH2x", directory)
    longs = struct.iter_unpack(order + "HHLL", directory)
    return [
        (tag, kind, values, inline, offset)
        for (tag, kind, values, offset), (inline,) in zip(longs, shorts, strict=True)
    ]


def xmp_orientation(segment: bytes) -> int | None:
    """Return the number that an XMP segment gives as ``tiff:Orientation``, None if it gives none."""
    found = _XMP_ORIENTATION.search(segment, len(XMP))
    return int(found[1]) if found else None


def is_whole_photoshop(segment: bytes) -> bool:
    """Whether the image resources of a Photoshop segment are whole (Photoshop File Formats, "Image Resources")."""
    place = len(PHOTOSHOP)
    while segment[place : place + 4] == b"8BIM":
        if place + 7 > len(segment):
            return False
        place += 7 + segment[place + 6]  # the name, with its length before it, is padded to an even place
        place += place & 1
        if place + 4 > len(segment):
            return False
        place += 4 + int.from_bytes(segment[place : place + 4], "big")
        place += place & 1
    return True
