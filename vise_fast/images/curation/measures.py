"""What a picture says of itself: size, sharpness, contrast, and 64 bits of what it shows.

The 64 bits are the difference hash of N. Krawetz ("Kind of Like That", 2013): of the picture as 9 x
8 greys, whether each is brighter than its left neighbour. They are those of imagehash.dhash, which
is not asked because it brings SciPy and PyWavelets for these three lines.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow

SIDE = 256
"""Longer side of the picture that sharpness and contrast are measured on."""
HASH = (9, 8)


class Measures(NamedTuple):
    """`side`: the shorter one in pixels; `sharpness`: variance of the Laplacian of the greys 0..255
    at SIDE, in thousandths; `contrast`: standard deviation of those greys, in thousandths;
    `bits`: the difference hash as a signed 64-bit number.
    """

    side: int
    sharpness: int
    contrast: int
    bits: int


def measure(picture: Pillow.Image) -> Measures:
    """Of an upright RGB picture."""
    grey = picture.convert("L")
    bits = _bits(grey)
    side = min(grey.size)
    grey.thumbnail((SIDE, SIDE), Pillow.Resampling.BILINEAR)
    values = np.asarray(grey, np.float64)
    return Measures(side, _thousandths(_laplacian(values).var()), _thousandths(values.std()), bits)


def _bits(grey: Pillow.Image) -> int:
    small = np.asarray(grey.resize(HASH, Pillow.Resampling.LANCZOS))
    brighter = small[:, 1:] > small[:, :-1]
    return int.from_bytes(np.packbits(brighter).tobytes(), "big", signed=True)


def _laplacian(values: np.ndarray) -> np.ndarray:
    """Of the pixels inside; one of a picture that has none."""
    if min(values.shape) < 3:
        return np.zeros((1, 1))
    inner = values[1:-1, 1:-1]
    upright = values[:-2, 1:-1] + values[2:, 1:-1]
    level = values[1:-1, :-2] + values[1:-1, 2:]
    return upright + level - 4 * inner


def _thousandths(value: float) -> int:
    return round(1000 * float(value))
