"""A zoo of image files, sound and broken, for tests. Every maker returns the bytes of one file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT = 40
WIDTH = 56


def gradient(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (H, W, 3) without symmetry: every quarter of the picture differs."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)], -1
    ).astype(np.uint8)


def grey(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The gradient's first channel, uint8 (H, W)."""
    return gradient(height, width)[:, :, 0]


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    """A picture as a file of this format."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(format: str = "PNG", size: tuple[int, int] = (HEIGHT, WIDTH), **options) -> bytes:
    """The gradient as a file."""
    return encoded(Image.fromarray(gradient(*size)), format, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its length and check sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand: `rows` are the unfiltered scan lines, each with its filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png16(channels: int) -> bytes:
    """16 bits a channel, grey (1) or RGB (3): the 8-bit gradient times 257."""
    deep = (gradient()[:, :, :channels].astype(">u2") * 257).reshape(HEIGHT, -1)
    return png(
        WIDTH,
        HEIGHT,
        16,
        {1: 0, 3: 2}[channels],
        b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep),
    )


def png_bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A header that promises 3.6 gigapixels over a kilobyte of pixels."""
    return png(width, height, 8, 2, b"\0" * 1000)


def bmp_bomb() -> bytes:
    """A header that promises 2.5 gigapixels over nothing."""
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def gif_bomb() -> bytes:
    """A header that promises 4.3 gigapixels over one block."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
        + b"\x02\x02\x44\x01\x00;"
    )


def transparent(mode: str, format: str = "PNG", **options) -> bytes:
    """Left half opaque gradient, right half fully transparent over black."""
    picture = Image.fromarray(gradient()).convert("RGBA")
    pixels = np.array(picture)
    pixels[:, WIDTH // 2 :] = 0
    return encoded(Image.fromarray(pixels).convert(mode), format, **options)


def palette_transparent(as_bytes: bool) -> bytes:
    """Index 0 red and transparent, index 1 blue and opaque."""
    picture = Image.new("P", (WIDTH, HEIGHT), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    return encoded(picture, "PNG", transparency=b"\x00\xff" if as_bytes else 0)


def with_orientation(format: str, value: int) -> bytes:
    """The gradient, its pixels as they are, with an EXIF orientation (1..8)."""
    exif = Image.Exif()
    exif[0x0112] = value
    faithful = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    return rgb(format, exif=exif, **faithful.get(format, {}))


def with_damaged_exif() -> bytes:
    """A sound JPEG whose EXIF block leads nowhere."""
    return rgb(
        "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 40
    )


def animated(format: str) -> bytes:
    """The gradient, then black."""
    first = Image.fromarray(gradient())
    second = Image.new("RGB", (WIDTH, HEIGHT))
    return encoded(
        first,
        format,
        save_all=True,
        append_images=[second],
        **({"lossless": True} if format == "WEBP" else {}),
    )


def tiff(array: np.ndarray, mode: str | None = None, **options) -> bytes:
    """An array as a TIFF, of the mode its type gives or the one stated."""
    return encoded(
        Image.fromarray(array, mode) if mode else Image.fromarray(array), "TIFF", **options
    )


def flipped_bits(data: bytes, seed: int, count: int = 40) -> bytes:
    """The file with `count` bytes after its first 60 replaced."""
    rng = np.random.default_rng(seed)
    damaged = bytearray(data)
    for place in rng.integers(min(60, len(data) - 1), len(data), count):
        damaged[place] = rng.integers(256)
    return bytes(damaged)
