"""Bytes of one picture to upright 8-bit RGB.

One rule for every picture: Pillow reads the header (format, size and orientation; we do, where a JPEG's is in order)
and nothing is decoded that is larger than the limit. Then JPEG goes to torchvision's decoder, which gives the same
pixels as Pillow's in two thirds of the time; everything else goes to Pillow. torchvision's PNG decoder ends the process
on damaged files, and its WebP and GIF decoders give other pixels. A JPEG that torchvision refuses, or whose header is
not what it seems, goes to Pillow too, so that both decoders give one answer.

Whatever goes wrong inside a picture is an `ImageError`; `nemo_image.shards.failures` lists its categories.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

# Importing the plugins of the formats that are taken registers them; Image.open then never looks for others.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from nemo_image.errors import ArgumentError, ImageError, MissingDependencyError
from nemo_image.shards.failures import as_image_errors
from nemo_image.shards.jpeg import JPEG_SIGNATURE, JpegScan, is_complete, scan_jpeg
from nemo_image.shards.pixels import to_rgb

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 89_478_485
"""Largest picture, in pixels: the bound from which Pillow warns of a decompression bomb (a quarter GiB of RGB)."""

FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,  # and MPO, a JPEG with further pictures behind it
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        AvifImagePlugin.AvifImageFile,
    )
)
"""Formats that are taken. Hostile bytes reach no other plugin of Pillow's (EPS would start Ghostscript)."""

Decoder = Literal["torchvision", "pillow"]

_PNG_ORIENTATION = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")  # chunk keywords, never compressed
_ORIENTATION = 274  # the EXIF tag
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a picture says of itself before it is decoded.

    Attributes
    ----------
    format : str
        One of `FORMATS`.
    width, height : int
        Size of the stored picture in pixels, before its orientation is applied.
    orientation : int
        EXIF orientation, 1 to 8; 1 where the picture has none that can be read.
    mode : str
        Pillow's name for the stored pixels.
    plain_jpeg : bool
        Whether it is a JPEG that says one thing only and is not cut off, grey or in three colours: what native decoders
        decode as Pillow does. CMYK is left to Pillow.
    """

    format: str
    width: int
    height: int
    orientation: int
    mode: str
    plain_jpeg: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height in pixels once the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read format, size and orientation; the pixels are not decoded.

    (The orientation of a PNG may stand behind its pixels. Only a PNG that has such a chunk is decoded for it.)

    Parameters
    ----------
    data : bytes
        The whole picture file.
    max_pixels : int
        Largest width times height. Pillow's own guard stays: twice ``PIL.Image.MAX_IMAGE_PIXELS`` is always refused.

    Raises
    ------
    ImageError
        If the bytes are no picture, or a larger one.
    """
    with as_image_errors(data):
        data = bytes(data)
        return _own_header(data, max_pixels) or _open(data, max_pixels)[1]


def decode_rgb(
    data: bytes,
    *,
    decoder: Decoder = "torchvision",
    max_pixels: int = MAX_PIXELS,
    smallest: Callable[[ImageHeader], tuple[int, int]] | None = None,
) -> tuple[ImageHeader, torch.Tensor]:
    """Decode a picture to upright 8-bit RGB: the first frame, alpha over white.

    Parameters
    ----------
    data : bytes
        The whole picture file. Its bytes decide the format.
    decoder : {"torchvision", "pillow"}
        What decodes JPEG. Both give the same pixels.
    max_pixels : int
        Largest width times height; see `read_header`.
    smallest : callable, optional
        From a header to a width and height in pixels. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where the
        stored picture is still as large as that, by libjpeg's scaled inverse DCT (Pillow's: torchvision has none).

    Returns
    -------
    header : ImageHeader
        Of the picture at its full size.
    pixels : torch.Tensor
        uint8 [3, height, width] of the upright picture, with the strides of a channels-last picture.

    Raises
    ------
    ImageError
        If the picture cannot be decoded, for whatever reason.
    ArgumentError
        If there is no such decoder.
    MissingDependencyError
        If the installed torchvision has no JPEG decoder.
    """
    if decoder not in get_args(Decoder):
        raise ArgumentError(f"decoder={decoder!r}: use one of {', '.join(get_args(Decoder))}")
    native = _torchvision_decode_jpeg() if decoder == "torchvision" else None
    with as_image_errors(data):
        data = bytes(data)
        if smallest is not None and (reduced := _decode_reduced(data, max_pixels, smallest)) is not None:
            return reduced
        if native is not None:
            header = _own_header(data, max_pixels)
            if header is not None and (pixels := _decode_native(native, data, header)) is not None:
                return header, upright(pixels, header.orientation)
        image, header = _open(data, max_pixels)
        if native is not None and header.plain_jpeg:
            pixels = _decode_native(native, data, header)
            if pixels is not None:
                return header, upright(pixels, header.orientation)
        return header, _to_tensor(_load(image, data))


def _decode_reduced(
    data: bytes, max_pixels: int, smallest: Callable[[ImageHeader], tuple[int, int]]
) -> tuple[ImageHeader, torch.Tensor] | None:
    """Decode a JPEG at part of its size; None where it is not at least twice as large as it has to be."""
    header = _own_header(data, max_pixels) or _open(data, max_pixels)[1]
    width, height = smallest(header)
    if not header.plain_jpeg or header.width < 2 * width or header.height < 2 * height:
        return None
    image, _ = _open(data, max_pixels)
    image.draft(image.mode, (width, height))
    return header, _to_tensor(_load(image, data))


def decode_pillow(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[ImageHeader, Image.Image]:
    """Decode a picture as `decode_rgb` does, with Pillow alone, to an upright Pillow picture of mode RGB.

    Raises
    ------
    ImageError
        If the picture cannot be decoded, for whatever reason.
    """
    with as_image_errors(data):
        data = bytes(data)
        image, header = _open(data, max_pixels)
        return header, _load(image, data)


# ---------------------------------------------------------------------------------------------------------- headers


def _own_header(data: bytes, max_pixels: int) -> ImageHeader | None:
    """Read the header of a JPEG whose segments are all in order; None for all others, which Pillow reads.

    Pillow takes five times as long, nine times where there is EXIF; more where decoding has emptied the caches.
    """
    if not data.startswith(JPEG_SIGNATURE):
        return None
    scan = scan_jpeg(data)
    if not scan.unambiguous or scan.components not in (1, 3) or not is_complete(data, scan):
        return None
    ((width, height),) = scan.sizes
    largest = max_pixels if Image.MAX_IMAGE_PIXELS is None else min(max_pixels, Image.MAX_IMAGE_PIXELS)
    if not 0 < width * height <= largest:
        return None  # Pillow knows how to say it
    mode = "L" if scan.components == 1 else "RGB"
    return ImageHeader("JPEG", width, height, scan.orientation, mode, plain_jpeg=True)


def _open(data: bytes, max_pixels: int) -> tuple[Image.Image, ImageHeader]:
    """Open a picture as Pillow's lazy one, and read its header."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    size = _stored_size(image)
    _check_size(*size, max_pixels)
    scan = scan_jpeg(data) if data.startswith(JPEG_SIGNATURE) else None
    for announced in scan.sizes if scan is not None else ():
        _check_size(*announced, max_pixels)  # the decoder may believe another frame header than Pillow does
    return image, ImageHeader(
        format="JPEG" if image.format == "MPO" else str(image.format),
        width=size[0],
        height=size[1],
        orientation=_orientation(image, data),
        mode=image.mode,
        plain_jpeg=scan is not None and _is_plain(image, scan, data),
    )


def _is_plain(image: Image.Image, scan: JpegScan, data: bytes) -> bool:
    return (
        scan.ordinary
        and scan.sizes == (image.size,)
        and (scan.components, image.mode) in ((1, "L"), (3, "RGB"))
        and is_complete(data, scan)
    )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("bomb", f"{width} x {height} pixels, more than max_pixels={max_pixels}")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow already gives the upright size of a TIFF
        return int(image.tag_v2[_TIFF_WIDTH]), int(image.tag_v2[_TIFF_HEIGHT])
    return image.size


def _orientation(image: Image.Image, data: bytes) -> int:
    """Orientation that Pillow finds in EXIF, XMP, eXIf, irot or imir; 1 if they are damaged: the pixels may be good."""
    if image.format == "PNG":
        if not any(keyword in data for keyword in _PNG_ORIENTATION):
            return 1  # getexif() would decode the picture to look behind its pixels
        image.load()
    try:
        value = image.getexif().get(_ORIENTATION)
        return next((orientation for orientation in _TRANSPOSE if orientation == value), 1)
    except Exception:
        return 1


# ----------------------------------------------------------------------------------------------------------- pixels


@cache
def _torchvision_decode_jpeg() -> Any:
    try:
        import torch
        import torchvision.io  # noqa: F401  (registers the operator)

        # torch warns, once a process, that Python's bytes may not be written to; the decoder only reads them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.frombuffer(b"\0", dtype=torch.uint8)
        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"decoder='torchvision' needs torchvision's JPEG decoder ({error}): pip install torchvision, in a build "
            "that fits torch, or use decoder='pillow'"
        ) from error


def _decode_native(native: Any, data: bytes, header: ImageHeader) -> torch.Tensor | None:
    """Decode with torchvision's operator; None where it refuses, so that Pillow has the last word and the reason."""
    import torch

    rgb = 3  # torchvision.io.ImageReadMode.RGB
    try:
        pixels: torch.Tensor = native(torch.frombuffer(data, dtype=torch.uint8), rgb)
    except RuntimeError:
        return None
    return pixels if pixels.shape == (3, header.height, header.width) else None


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """Decode with Pillow, to RGB, upright."""
    image.load()
    if image.format == "PNG":
        _scale_transparency(image, data)
    turn = _TRANSPOSE.get(_orientation(image, data))  # asked again: Pillow turns TIFFs while it loads them
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _scale_transparency(image: Image.Image, data: bytes) -> None:
    """Bring a PNG's transparent colour, which Pillow leaves as stored, to the scale of the 8-bit pixels."""
    transparent, depth = image.info.get("transparency"), data[24]  # IHDR's third field
    if image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = (transparent & (2**depth - 1)) * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 if depth == 16 else value & 255 for value in transparent)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Apply an EXIF orientation to ``[..., height, width]`` pixels; channels-last strides are kept."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(-1, -2)
    flips = {2: (-1,), 3: (-1, -2), 4: (-2,), 6: (-1,), 7: (-1, -2), 8: (-2,)}.get(orientation, ())
    if flips:
        pixels = pixels.flip(flips)
    return pixels.movedim(-3, -1).contiguous().movedim(-1, -3)
