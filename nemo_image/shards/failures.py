"""Why a picture cannot be decoded: every exception of a decoder as an `ImageError`.

Reasons repeat to the letter for the same bytes, so that two runs write the same ``image_error``.

=============== ====================================================================================================
category        meaning
=============== ====================================================================================================
``empty``       no bytes at all
``unknown``     not JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF
``truncated``   the bytes end too early
``bomb``        more pixels than allowed, or a chunk that inflates without bound
``unsupported`` a variant of its format that the decoder does not know
``memory``      not enough memory to decode it
``crashed``     the decoder's process died of it (told by the process that watched it)
``hung``        no result within the time limit (told likewise)
``corrupt``     anything else
=============== ====================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from nemo_image.errors import ImageError

_SIGNATURES = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WebP>RIFF.{4}WEBP)|(?P<GIF>GIF8[79]a)|(?P<BMP>BM)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<AVIF>.{4}ftypavi[fs])",
    re.DOTALL,
)


@contextmanager
def as_image_errors(data: bytes) -> Iterator[None]:
    """Turn whatever is raised inside the ``with`` block into an `ImageError`.

    Parameters
    ----------
    data : bytes
        The picture that is being decoded.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise _image_error(error, data) from error


def _image_error(error: Exception, data: bytes) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(bytes(data[:16]))
    detail = re.sub(r" (object )?at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))[:200] or type(error).__name__
    return ImageError(_category(error, detail.lower()), detail)


def _category(error: Exception, detail: str) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)) or "too large" in detail:
        return "bomb"
    if isinstance(error, MemoryError) or "not enough memory" in detail or "can't allocate memory" in detail:
        return "memory"
    if isinstance(error, EOFError) or any(word in detail for word in ("truncated", "not enough", "premature")):
        return "truncated"
    if isinstance(error, (ImportError, NotImplementedError)) or any(
        word in detail for word in ("unsupported", "not supported", "unknown", "not yet supported")
    ):
        return "unsupported"
    return "corrupt"


def _unidentified(start: bytes) -> ImageError:
    known = _SIGNATURES.match(start)
    if known:
        return ImageError("corrupt", f"damaged {known.lastgroup} header")
    return ImageError("unknown", f"not JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF (starts with {start[:8]!r})")
