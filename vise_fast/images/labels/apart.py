"""What no batch may hold, by content: pictures to check with stay pictures to check with, whatever
they are called, wherever they lie again, and whichever of several places they came from.

Two hashes, since a copy may be one of bytes or one of what is seen. The sha256 of a file's bytes is
taken only of files as long as a labelled one, so that a million headers are still read in their
time. The sha256 of the decoded pixels, at the size that a batch has, is taken of every picture that
is decoded (a millisecond): it knows a copy that was stored anew without loss, or whose notes (EXIF)
were taken out. Left out: copies that look alike only (another size, another JPEG quality).
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from vise_fast.images.albums.album import Place

PIECE = 2**20


class Apart:
    """Contents by their hashes. An empty one holds nothing, and hashes nothing."""

    def __init__(self) -> None:
        self._bytes: dict[int, set[str]] = {}
        self._pixels: set[str] = set()

    def add(self, place: Path, pixels: Tensor) -> str | None:
        """A file and its picture uint8 (H, W, 3): the file's sha256, None where bytes or pixels
        were known. Raises OSError.
        """
        size, digest = measured(place)
        seen = digest_of(pixels)
        known = digest in self._bytes.get(size, ()) or seen in self._pixels
        self._bytes.setdefault(size, set()).add(digest)
        self._pixels.add(seen)
        return None if known else digest

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def holds(self, place: Place) -> bool:
        """Whether the bytes that lie there are those of a labelled picture; no where they cannot
        be read.
        """
        try:
            if not self or (isinstance(place, Path) and os.stat(place).st_size not in self._bytes):
                return False
            with place.open("rb") if isinstance(place, Path) else place.open() as file:
                known = self._bytes.get(file.seek(0, io.SEEK_END))
                file.seek(0)
                return known is not None and _digest(file) in known
        except OSError:
            return False

    def shows(self, pixels: Tensor) -> bool:
        """Whether uint8 (H, W, 3) are the pixels of a labelled picture."""
        return bool(self._pixels) and digest_of(pixels) in self._pixels


NOTHING = Apart()


def measured(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file. Raises OSError."""
    with open(path, "rb") as file:
        digest = _digest(file)
        return file.tell(), digest


def _digest(file: BinaryIO) -> str:
    """sha256 of what is left of a file."""
    found = hashlib.sha256()
    while piece := file.read(PIECE):
        found.update(piece)
    return found.hexdigest()


def digest_of(pixels: Tensor) -> str:
    """sha256 over size and values of uint8 (H, W, 3)."""
    height, width = pixels.shape[:2]
    seen = hashlib.sha256(b"%dx%d\n" % (height, width))
    seen.update(pixels.contiguous().numpy().data)
    return seen.hexdigest()
