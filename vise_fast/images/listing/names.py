"""Names of pictures: what they say, their 63 bits, and many of them in one block."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import PurePosixPath

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
    """Many names as the system writes them, in one block of bytes. `ends`: where each ends in it
    (an array of Python's own: one item of numpy's takes ten times as long).
    """

    def __init__(self, block: bytes, ends: array[int]) -> None:
        self.block = block
        self.ends = ends

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        """Those of a list."""
        return cls(b"".join(names), array("q", accumulate(map(len, names))))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, row: int) -> bytes:
        """One of them as bytes."""
        return self.block[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.raw(row))
