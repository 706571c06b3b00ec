"""Names of pictures: what they say, their 63 bits, and many of them in one block."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

_READ = "jpg jpeg jpe jfif png apng webp bmp dib gif tif tiff ppm pgm pbm pnm pfm"
_FOREIGN = "heic heif avif jxl jp2 ico tga psd eps svg raw dng cr2 nef arw exr hdr pcx icns"
SUFFIXES = frozenset(f".{name}" for name in _READ.split())
FOREIGN = frozenset(f".{name}" for name in _FOREIGN.split())
"""Pictures of formats that are not read: worth a line in the log, where a .txt beside the
photographs is not.
"""


def irrelevant(name: str) -> bool:
    """A file whose name says that it is no picture; names without a suffix are judged by their
    content.
    """
    suffix = PurePosixPath(name).suffix.lower()
    return bool(suffix) and suffix not in SUFFIXES | FOREIGN


def key_of(name: str) -> int:
    """63 bits of a file's relative name: the same on every machine, whatever the file holds."""
    return key_of_bytes(os.fsencode(name))


def key_of_bytes(name: bytes) -> int:
    """The same of a name as the system writes it."""
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Names:
    """Many names as the system writes them, in one block of bytes. `ends` int64 (N,): where each
    ends in it.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self.block = block
        self.ends = ends
        self._end = array("q", ends.tobytes())  # a tenth of the time that an array's item takes

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        """Those of a list."""
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        return cls(b"".join(names), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, row: int) -> bytes:
        """One of them as bytes."""
        return self.block[self._end[row - 1] if row else 0 : self._end[row]]

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.raw(row))
