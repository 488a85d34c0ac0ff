"""How sharp and how bright a picture is, from its luma."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

_BAND = 2**20
"""Pixels that are worked on at once, so that the largest pictures need little memory."""


def luma_of(picture: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the 8-bit luma of an RGB picture, (height, width): ``0.299 R + 0.587 G + 0.114 B`` (ITU-R BT.601)."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    return np.asarray(picture.convert("L"))


def laplacian_variance(luma: npt.NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian of a picture's luma: low for a picture without sharp edges.

    The measure LAPV of Pech-Pacheco, Cristóbal, Chamorro-Martínez, Fernández-Valdivia: "Diatom autofocusing in
    brightfield microscopy: a comparative study" (ICPR 2000), with the kernel of four neighbours, mirrored at the edges
    without repeating them, as OpenCV's ``cv2.Laplacian(grey, cv2.CV_64F).var()`` has it.

    Parameters
    ----------
    luma : ndarray of uint8, shape (height, width)
    """
    height, width = luma.shape
    total = squares = 0
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        stop = min(top + rows, height)
        above, below = max(top - 1, 0), min(stop + 1, height)
        band = np.pad(luma[above:below].astype(np.int32), ((0, 0), (1, 1)), mode="reflect" if width > 1 else "edge")
        first = band[1:2] if height > 1 else band[:1]
        last = band[-2:-1] if height > 1 else band[-1:]
        band = np.concatenate([*([first] if top == 0 else []), band, *([last] if stop == height else [])])
        middle = band[1:-1]
        edges = (band[:-2] + band[2:] - 4 * middle)[:, 1:-1] + middle[:, :-2] + middle[:, 2:]
        total += int(edges.sum())
        squares += int((edges.astype(np.int64) ** 2).sum())
    count = height * width
    variance: float = (count * squares - total * total) / (count * count)
    return variance


def mean_luma(luma: npt.NDArray[np.uint8]) -> float:
    """Return the mean of a picture's luma, from 0 (black) to 255 (white)."""
    return float(luma.mean(dtype=np.float64))
