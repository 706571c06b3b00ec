"""What it would cost to decode a picture file, counted before any pixel is decoded: a small file
may ask for minutes or gigabytes.

Limits: BYTES_PER_PIXEL of memory times the pixel cap (50 Mpx: 0.6 GB), SECONDS of one CPU, SCANS of
a JPEG, CHUNKS of a PNG, STRIPS of a TIFF, BESIDE and EXIF bytes of anything but pixels. Photographs
stay far below each. Left out: formats and the pixel cap (picture_file.py).
"""

from __future__ import annotations

import io
import re
import struct
import time
from typing import Any, NamedTuple

BYTES_PER_PIXEL = 11.75
"""Largest memory of one decode, per pixel of the cap: 0.6 GB for 50 Mpx, with 12 MB for buffers."""
SECONDS = 20.0
"""CPU time that one file may take: 50 Mpx take 1 to 3."""
OPENING = 2.0
"""CPU time until its size and what lies before the pixels are known: a thousandth of that."""
SCANS = 100
"""Of a JPEG: each is a pass over all pixels, even if it says nothing; programs write up to 15."""
CHUNKS = 200_000
"""Of a PNG: 50 Mpx at the worst in the usual 8 KiB are 37,000."""
STRIPS = 400_000
"""Numbers in one entry of a TIFF: a strip for each row of the tallest pictures, in four planes."""
BESIDE = 64 * 2**20
"""Bytes beside the pixels (profiles, thumbnails, texts) that are read into memory."""
BESIDE_JPEG = 16 * 2**20
"""The same of a JPEG, whose EXIF Pillow turns into lists: 25 bytes for each of the file."""
EXIF = 2**20
"""Bytes of an EXIF block that is searched for the orientation, for the same reason."""

RGB = 4
"""Bytes of a pixel as Pillow holds colours; eight-bit greys and palettes take one."""


class Costly(Exception):
    """A file that would cost too much; the text is the reason, in a few words."""


class Reader(io.BufferedReader):
    """A file as Pillow reads it: piece by piece, so that its limits are looked at again and again.

    Until `pixels_follow` reading raises Costly once this thread has worked for OPENING seconds, and
    where more than `beside` bytes are read; from there on after SECONDS.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, 2**16)
        self._allow(OPENING)
        self.beside: float = BESIDE
        """How many bytes more may be read."""

    def pixels_follow(self) -> None:
        """What is read from here on are the pixels, as many as there are."""
        self._allow(SECONDS)
        self.beside = float("inf")

    def _allow(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.thread_time() + seconds

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; all that is left where that is negative."""
        if time.thread_time() > self._end:
            raise Costly(f"takes more than {self._seconds:g} seconds to decode")
        wanted = BESIDE + 1 if size is None or size < 0 else min(size, BESIDE + 1)
        data = super().read(wanted)
        self.beside -= len(data)
        if len(data) > BESIDE or self.beside < 0:
            raise Costly(BIG)
        return data


BIG = "has too much beside its pixels"


def before_opening(file: Reader) -> None:
    """What Pillow would make long lists of while it opens a file. Raises Costly."""
    start = file.read(16)
    if start[:2] == b"\xff\xd8":
        file.beside = BESIDE_JPEG
    elif start[:2] in (b"II", b"MM"):
        for count in _entry_counts(file, start):
            if count > STRIPS:
                raise Costly(f"lists {count} pieces, more than {STRIPS}")
    file.seek(0)


NO_NUMBERS = (1, 2, 7)  # bytes, text, undefined


class _Layout(NamedTuple):
    """How a TIFF's directory is written: where it is, how many entries, bytes of one."""

    head: str
    entry: str


def _entry_counts(file: Reader, start: bytes) -> list[int]:
    """How many numbers each entry of the first directory has; texts and bytes are none."""
    order = "<" if start[:1] == b"I" else ">"
    large = start[2:3] == b"\x2b"
    layout = _Layout("Q", "HHQQ") if large else _Layout("H", "HHII")
    place = start[8:16] if large else start[4:8]
    head = order + layout.head
    entry = order + layout.entry
    file.seek(int.from_bytes(place, "little" if order == "<" else "big"))
    written = file.read(struct.calcsize(head))
    if len(written) < struct.calcsize(head):
        return []
    count = min(struct.unpack(head, written)[0], 2**16)
    table = file.read(count * struct.calcsize(entry))
    whole = len(table) // struct.calcsize(entry) * struct.calcsize(entry)
    entries = struct.iter_unpack(entry, table[:whole])
    return [count for _, kind, count, _ in entries if kind not in NO_NUMBERS]


def refuse_costly(image: Any, file: Reader, max_pixels: int) -> None:
    """Whether an opened picture, none of whose pixels is decoded yet, may be. Raises Costly."""
    place = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.pixels_follow()
    scans = 1
    if image.format in ("JPEG", "MPO"):
        scans = _scans(image, file)
    elif image.format == "PNG":
        _refuse_chunks(file)
    elif image.format == "TIFF":
        _refuse_pieces(image, size)
    need = _bytes_per_pixel(image, scans, size) * image.width * image.height
    most = BYTES_PER_PIXEL * max_pixels
    if need > most:
        raise Costly(f"takes {need / 1e6:.0f} MB to decode, more than {most / 1e6:.0f}")
    file.seek(place)


# ---- JPEG ----------------------------------------------------------------------------------------

MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
SOS = 0xDA
EOI = 0xD9
LENGTHS_FROM = 0xC0  # what lies below is skipped as a marker alone, as libjpeg may do


def _scans(image: Any, file: Reader) -> int:
    """Scans of a JPEG, by its markers. Raises Costly."""
    file.seek(2)
    found = 0
    while (marker := _next_marker(file)) not in (None, EOI):
        length = int.from_bytes(file.read(2), "big") if marker >= LENGTHS_FROM else 0
        if marker == SOS:
            found += 1
            components = file.read(1)
            if found == 1 and components == bytes([image.layers]) and not _progressive(image):
                return 1  # the whole picture is in this scan, and decoding ends with it
            length -= 1
        if found > SCANS:
            raise Costly(f"has more than {SCANS} scans")
        file.seek(max(length - 2, 0), io.SEEK_CUR)
    return max(found, 2)


def _progressive(image: Any) -> bool:
    return bool(image.info.get("progressive"))


def _next_marker(file: Reader) -> int | None:
    """The next marker that is no restart, read past; None at the end of the file."""
    carried = b""
    while block := file.read(4096):
        data = carried + block
        found = MARKER.search(data)
        if found:
            file.seek(found.end() - len(data), io.SEEK_CUR)
            return found[1][0]
        carried = data[-1:] if data.endswith(b"\xff") else b""
    return None


# ---- PNG -----------------------------------------------------------------------------------------


def _refuse_chunks(file: Reader) -> None:
    """Raises Costly for too many chunks, and for too much in others than pixels."""
    file.seek(8)
    beside = 0
    for _ in range(CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length = int.from_bytes(head[:4], "big")
        beside += 0 if head[4:] in (b"IDAT", b"fdAT") else length
        if beside > BESIDE:
            raise Costly(BIG)
        file.seek(length + 4, io.SEEK_CUR)
    raise Costly(f"has more than {CHUNKS} chunks")


# ---- TIFF ----------------------------------------------------------------------------------------

STRIP_BYTES = 279
TILE_BYTES = 325
TILE_WIDTH = 322
TILE_HEIGHT = 323
BITS = 258
ROWS = 278
SMALL = 2**22  # pixels of a tile that may be larger than its picture


def _refuse_pieces(image: Any, size: int) -> None:
    """Raises Costly for pieces that lie on each other, or are far larger than the picture."""
    tags = image.tag_v2
    for tag in (STRIP_BYTES, TILE_BYTES):
        counts = tags.get(tag, ())
        total = sum(counts) if isinstance(counts, tuple) else counts
        if total > 2 * size:
            raise Costly(f"promises {total} bytes of pixels in a file of {size}")
    tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_HEIGHT, 0)
    if tile > max(4 * image.width * image.height, SMALL):
        raise Costly(f"has tiles of {tile} pixels")


# ---- memory --------------------------------------------------------------------------------------

UNPACKED_BY_PYTHON = ("ppm", "ppm_plain", "bmp_rle")


def _bytes_per_pixel(image: Any, scans: int, size: int) -> float:
    """Memory at the peak of decoding and of turning what comes out into upright RGB; `size`: of the
    file.
    """
    held = _held(image)
    load = held + _decoder_bytes(image, scans, size)
    return max(load, held + RGB + 1, 2 * RGB)


def _held(image: Any) -> int:
    """Bytes of a pixel as Pillow holds it."""
    if image.mode in ("1", "L", "P"):
        return 1
    return 2 if image.mode.startswith("I;16") else RGB


def _decoder_bytes(image: Any, scans: int, size: int) -> float:
    """Bytes per pixel that the decoder itself holds."""
    if image.format == "WEBP":  # two canvases, the frame, its alpha, and the whole file
        return 3 * RGB + 1 + size / (image.width * image.height)
    if image.format in ("JPEG", "MPO") and scans > 1:  # two bytes per coefficient
        areas = [h * v for _, h, v, _ in image.layer]
        return 2 * sum(areas) / max(areas)
    if image.format == "TIFF":
        return _strip_bytes(image)
    if image.tile and image.tile[0][0] in UNPACKED_BY_PYTHON:  # and copied
        return 2 * (3 if image.mode == "RGB" else _held(image))
    return 0


def _strip_bytes(image: Any) -> float:
    """Bytes per pixel of the picture in one strip or tile of a TIFF, as libtiff unpacks it."""
    tags = image.tag_v2
    bits = tags.get(BITS, (1,))
    deep = sum(bits) if isinstance(bits, tuple) else bits
    rows = min(tags.get(ROWS, image.height), image.height)
    piece = tags.get(TILE_WIDTH, 0) * tags.get(TILE_HEIGHT, 0) or rows * image.width
    return max(deep / 8, RGB) * piece / (image.width * image.height)
