"""What an earlier start has found out of an album's files, one file in the user's cache folder for
headers and one for measures.

Every file is still looked at: what counts is that its size, its times of writing and of change and
its number in the file system are those it had when it was read. A file that was written
less than FRESH before that is not remembered, since a second writing in the same tick would look
the same. What is added, removed, replaced or written anew is therefore noticed wherever a file
system keeps its times and nobody sets its clock back. A damaged cache, one of another version or
of other limits is thrown away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.lib.npyio import NpzFile

from vise_fast import __version__
from vise_fast.images.albums.album import Album
from vise_fast.images.listing.names import Names
from vise_fast.system import files

FORMAT = 1
FEW = 2000
"""Of so many files the headers are read again: it takes less than half a second."""
FRESH = 3 * 10**9
"""Nanoseconds; the coarsest file systems keep times by two seconds."""
STAMP = 4


class Stamp(NamedTuple):
    """What changes with a file: bytes, nanoseconds of writing and of change, number."""

    size: int
    written: int
    changed: int
    number: int


UNKNOWN = Stamp(0, 0, 0, 0)
"""Of a file that is not to be trusted: like nothing, not even itself."""


def stamp_of(path: str) -> Stamp:
    """Of a file, links followed; UNKNOWN where it cannot be trusted or is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return UNKNOWN
    if max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - FRESH:
        return UNKNOWN
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@dataclass(frozen=True)
class Kind:
    """What is remembered of a file: `per` whole numbers (`code`: their type in an array), the first
    of which is above 0; `cost`: how many headers are read in the time that it takes to find out.
    """

    name: str
    per: int
    code: str
    cost: int


HEADERS = Kind("headers", 2, "i", 1)
"""Height and width as the header says."""
MEASURES = Kind("measures", 4, "q", 100)
"""images/curation/measures.py."""


@dataclass(frozen=True)
class Known:
    """Of files by name, sorted. `stamps`: four numbers each; `values`: `kind.per` each, zeros where
    nothing is known.
    """

    kind: Kind
    names: Names
    stamps: array[int]
    values: array[int]


class Remembered:
    """Looks values up, in the order of names only."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self._row = 0

    def values(self, name: bytes, stamp: Stamp) -> tuple[int, ...] | None:
        """Those of a file that is what it was; None where they have to be found out."""
        old = self.known
        while self._row < len(old.names) and old.names.raw(self._row) < name:
            self._row += 1
        row = self._row
        if stamp == UNKNOWN or row == len(old.names) or old.names.raw(row) != name:
            return None
        if tuple(old.stamps[STAMP * row : STAMP * (row + 1)]) != stamp:
            return None
        per = old.kind.per
        found = tuple(old.values[per * row : per * (row + 1)])
        return found if found[0] > 0 else None


def nothing(kind: Kind) -> Known:
    """Of no file."""
    return Known(kind, Names.of([]), array("q"), array(kind.code))


def place_of(album: Album, cap: int, kind: Kind) -> Path | None:
    """The cache of an album whose pictures are files; cap: the pixels that a header may promise."""
    if album.root is None:
        return None
    words = f"{kind.name}\0{album.title}\0{os.path.realpath(album.root)}\0{cap}\0{_version()}"
    digest = hashlib.sha256(os.fsencode(words)).hexdigest()
    return files.user_cache() / "listings" / f"{digest}.npz"


def _version() -> str:
    return f"{FORMAT} {__version__} {PIL.__version__}"


def read(place: Path | None, kind: Kind) -> Known:
    """What was remembered; nothing where nothing is or it is not as written."""
    if place is None:
        return nothing(kind)
    try:
        with open(place, "rb") as file, NpzFile(file) as stored:  # checks a sum over each
            names = Names(stored["names"].tobytes(), _array("q", stored["ends"]))
            values = _array(kind.code, stored["values"])
            found = Known(kind, names, _array("q", stored["stamps"]), values)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return nothing(kind)
    return found if _is_whole(found) else nothing(kind)


def _array(kind: str, stored: np.ndarray) -> array[int]:
    found = array(kind)
    found.frombytes(np.ascontiguousarray(stored).view(np.uint8).data)
    return found


def _is_whole(known: Known) -> bool:
    ends = known.names.ends
    count = len(ends)
    inside = not count or (ends[-1] == len(known.names.block) and ends[0] >= 0)
    wanted = (STAMP * count, known.kind.per * count)
    lengths = wanted == (len(known.stamps), len(known.values))
    return inside and lengths and bool((np.diff(ends) >= 0).all())


def write(place: Path | None, known: Known) -> bool:
    """Puts it in place, whole or not at all; whether it could be. Few are not worth it."""
    if place is None or len(known.names) * known.kind.cost <= FEW:
        return False
    aside = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.savez(
                file,
                names=np.frombuffer(known.names.block, np.uint8),
                ends=np.frombuffer(known.names.ends, np.int64),
                stamps=np.frombuffer(known.stamps, np.int64),
                values=np.frombuffer(known.values, known.kind.code),
            )
        os.replace(aside, place)
    except OSError:  # a full or read-only disk, or another writer: the next start reads headers
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        return False
    return True
