"""One image file -> upright 8-bit RGB pixels, or a reason why not. The file is taken for hostile.

Allow-listed formats by content (never by name), a pixel cap read from the header before anything is
decoded, limits on time and memory (cost.py), EXIF orientation applied, deep greys scaled (not
clipped), transparency laid over white (as the Qwen-VL tools do), the first frame of animations.
Left out: colour profiles, and where pictures lie (albums/).
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Pillow

from vise_fast.images.albums.album import Place
from vise_fast.images.cost import EXIF, Costly, Reader, before_opening, refuse_costly
from vise_fast.system.files import WITHOUT_WAITING

FLAGS = WITHOUT_WAITING | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Of an opened picture; each system has its own."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_RATIO = 200  # the longest side over the shortest; Qwen's own processor refuses more
WHITE = (255, 255, 255, 255)
BAND = 2**20  # pixels that are converted at once
ORIENTATION = 0x0112
TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
# all that Pillow's decoders were seen to raise on damaged files
FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    EOFError,
    MemoryError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class BadImage(Exception):
    """A file that cannot be used; the text is the reason, in a few words."""


@dataclass(frozen=True)
class Header:
    """What a file promises: its format and the size of its upright picture in pixels (a PNG may
    state its orientation only at its end).
    """

    format: str
    height: int
    width: int


def header(place: Place, max_pixels: int) -> Header:
    """Reads the header only.

    Raises BadImage for anything that is not a usable picture of at most `max_pixels`.
    """
    with _opened(place, max_pixels) as image:
        width, height = image.size
        if image.format != "TIFF" and _orientation(image) >= 5:  # Pillow turns TIFFs itself
            width, height = height, width
        return Header(image.format or "", height, width)


def decode(place: Place, max_pixels: int) -> Pillow.Image:
    """The upright picture, mode RGB. Takes at most 12 bytes of memory per pixel of `max_pixels`.

    Raises BadImage.
    """
    stored = _stored(place, max_pixels)
    return stored.picture if stored.turn is None else stored.picture.transpose(stored.turn)


class _Stored(NamedTuple):
    """RGB pixels as they lie in the file, and what makes them upright."""

    picture: Pillow.Image
    turn: Pillow.Transpose | None


def _stored(place: Place, max_pixels: int) -> _Stored:
    """A function of its own: what the decoder made is let go before the picture is turned."""
    with _opened(place, max_pixels, whole=True) as image:
        image.load()
        return _Stored(to_rgb(image, image.format or ""), TURNS.get(_orientation(image)))


def to_rgb(image: Pillow.Image, format: str = "") -> Pillow.Image:
    """8-bit RGB of a picture of any mode. Raises BadImage for values that mean nothing (NaN)."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, format)
    if image.has_transparency_data:
        return _over_white(image)
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def _bands(image: Pillow.Image) -> Iterator[tuple[int, Pillow.Image]]:
    """The picture in bands of rows, each with its first row: so what is made of one is small."""
    step = max(1, BAND // image.width)
    for top in range(0, image.height, step):
        yield top, image.crop((0, top, image.width, min(top + step, image.height)))


def _over_white(image: Pillow.Image) -> Pillow.Image:
    """A picture with transparency, laid over white."""
    done = Pillow.new("RGB", image.size)
    for top, band in _bands(image):
        over = band.convert("RGBA")
        white = Pillow.new("RGBA", over.size, WHITE)
        done.paste(Pillow.alpha_composite(white, over).convert("RGB"), (0, top))
    return done


def _eight_bits(image: Pillow.Image, format: str) -> Pillow.Image:
    """Deep greys of any number type, scaled to 0..255."""
    lows, highs = [], []
    for _, band in _bands(image):
        values = np.asarray(band)
        if not np.isfinite(values).all():
            raise BadImage("has pixels that are not finite")
        lows.append(float(values.min()))
        highs.append(float(values.max()))
    bottom, top = _span(min(lows), max(highs), image.mode, format)
    done = Pillow.new("L", image.size)
    for row, band in _bands(image):
        scaled = (np.asarray(band).astype(np.float64) - bottom) * (255.0 / (top - bottom))
        grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        done.paste(Pillow.fromarray(grey, "L"), (0, row))
    return done.convert("RGB")


def _span(low: float, high: float, mode: str, format: str) -> tuple[float, float]:
    """What black and white are: 0..65535 in 16-bit files; in 32-bit and float files the smallest
    usual range that holds them, else their own.
    """
    if mode.startswith("I;16") or (mode == "I" and format in ("PPM", "PNG")):
        return 0.0, 65535.0
    tops = (1.0, 255.0) if mode == "F" else (255.0, 65535.0)
    usual = [top for top in tops if high <= top]
    if usual and low >= 0:
        return 0.0, usual[0]
    return low, max(high, low + 1.0)


@contextmanager
def _opened(place: Place, max_pixels: int, whole: bool = False) -> Iterator[Pillow.Image]:
    """The file as an image whose pixels are not decoded yet, but may be where `whole`; every fault
    inside the block leaves as BadImage.
    """
    try:
        raw = _raw(place)
        with raw, Reader(raw) as file:
            before_opening(file)
            with Pillow.open(file, formats=FORMATS) as image:
                _refuse_size(*image.size, max_pixels)
                if whole:
                    refuse_costly(image, file, max_pixels)
                yield image
    except BadImage:
        raise
    except Costly as cost:
        raise BadImage(str(cost)) from None
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise BadImage(f"promises more than {max_pixels} pixels") from None
    except Pillow.UnidentifiedImageError:
        raise BadImage(f"is none of {', '.join(FORMATS)}") from None
    except FAULTS as fault:
        reason = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
        raise BadImage(" ".join(f"cannot be decoded: {reason}".split())[:200]) from None


def _raw(place: Place) -> Any:
    """Its bytes as an unbuffered file. Raises OSError, BadImage."""
    if not isinstance(place, Path):
        raw = place.open()
        _refuse_empty(raw.seek(0, io.SEEK_END))
        raw.seek(0)
        return raw
    # not blocking: a name may have become a pipe since the folder was listed
    raw = os.fdopen(os.open(place, os.O_RDONLY | FLAGS), "rb", 0)
    try:
        status = os.fstat(raw.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is no regular file")
        _refuse_empty(status.st_size)
    except BadImage:
        raw.close()
        raise
    return raw


def _refuse_empty(size: int) -> None:
    if size == 0:
        raise BadImage("is empty")


def _refuse_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise BadImage(f"promises {width} x {height} pixels, more than {max_pixels}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadImage(f"is {width} x {height}: one side is over {MAX_RATIO} times the other")


def _orientation(image: Pillow.Image) -> int:
    """EXIF orientation 1..8; 1 where the tag is absent or its block is damaged or huge (the pixels
    may still be good).
    """
    if len(image.info.get("exif", b"")) > EXIF:
        return 1
    try:
        # the method of PNGs would decode all pixels first
        value = Pillow.Image.getexif(image).get(ORIENTATION, 1)
    except FAULTS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def on_grid(picture: Pillow.Image, multiple: int, min_pixels: int, max_pixels: int) -> np.ndarray:
    """An RGB picture as uint8 (H, W, 3) at its `grid_size`; bicubic where it is not there yet."""
    height, width = grid_size(picture.height, picture.width, multiple, min_pixels, max_pixels)
    if (picture.height, picture.width) != (height, width):
        picture = picture.resize((width, height), Pillow.Resampling.BICUBIC)
    return np.array(picture, np.uint8)


def grid_size(
    height: int, width: int, multiple: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) on the model's grid: multiples of `multiple`, area within the budget, aspect
    ratio kept as well as that allows.

    The rounding of Qwen2-VL's `smart_resize`; beyond it the area never exceeds `max_pixels`,
    however long the picture is. Raises ValueError where that is less than one cell.
    """
    cell = multiple * multiple
    if max_pixels < cell:
        raise ValueError(
            f"a budget of {max_pixels} pixels holds no cell of {multiple} x {multiple}"
        )
    rows = max(1, round(height / multiple))
    columns = max(1, round(width / multiple))
    if rows * columns * cell > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / multiple))
        columns = max(1, math.floor(width / shrink / multiple))
    elif rows * columns * cell < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = max(1, math.ceil(height * grow / multiple))
        columns = max(1, math.ceil(width * grow / multiple))
    budget = max_pixels // cell
    short = min(rows, columns, math.isqrt(budget))
    long = min(max(rows, columns), budget // short)
    size = (short, long) if rows <= columns else (long, short)
    return size[0] * multiple, size[1] * multiple
