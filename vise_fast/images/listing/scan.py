"""An album looked at from end to end: every header read, or remembered, before anything is decoded.

Two starts over the same files find the same, whatever was remembered.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from vise_fast.config.schema import DataConfig
from vise_fast.images.albums.album import Album, Skip
from vise_fast.images.listing import remembered
from vise_fast.images.listing.entries import Columns
from vise_fast.images.listing.gathered import Gathered, gather
from vise_fast.images.listing.names import key_of_bytes
from vise_fast.images.listing.remembered import HEADERS, Known, Remembered
from vise_fast.images.listing.through import Through
from vise_fast.images.picture_file import BadImage, grid_size, header
from vise_fast.system.errors import ConfigError


@dataclass(frozen=True)
class Scanned:
    """What can be used, and how many files are no pictures by their name or their content."""

    columns: Columns
    ignored: int


def scan(album: Album, data: DataConfig, multiple: int, bad: Skip, through: Through) -> Scanned:
    """Files that cannot be used go to `bad`. Raises ConfigError where data.max_pixels holds no cell
    of `multiple` x `multiple`, and what the album raises.
    """
    _refuse_budget(data, multiple)
    found = gather(album, bad, through)
    place = remembered.place_of(album, data.max_header_pixels, HEADERS)
    known = Remembered(remembered.read(place, HEADERS))
    look = _Look(found, data.max_header_pixels, known, bad)
    for row in through(range(len(found.names)), "reading headers"):
        look.at(row)
    if look.read:
        remembered.write(place, Known(HEADERS, found.names, look.stamps, look.sizes))
    keys = np.fromiter(map(key_of_bytes, map(found.names.raw, range(len(found.names)))), np.int64)
    sizes = _on_grid(np.array(look.sizes, np.int32).reshape(-1, 2), data, multiple)
    return Scanned(Columns(found, keys, sizes), found.ignored + look.ignored)


class _Look:
    """One header after the other. `read`: how many had to be read and can be used."""

    def __init__(self, found: Gathered, cap: int, known: Remembered, bad: Skip) -> None:
        self.found = found
        self.cap = cap
        self.known = known
        self.bad = bad
        self.stamps: array[int] = array("q")
        self.sizes: array[int] = array("i")
        self.read = 0
        self.ignored = 0

    def at(self, row: int) -> None:
        """The header of a row."""
        stamp = self.found.stamp(row)
        size = self.known.values(self.found.names.raw(row), stamp)
        if size is None:
            size = self._size(row)
        self.stamps.extend(stamp)
        self.sizes.extend(size)

    def _size(self, row: int) -> tuple[int, int]:
        """(height, width), read; (0, 0) where the file cannot be used."""
        try:
            head = header(self.found.place(row), self.cap)
        except BadImage as fault:
            name = self.found.names[row]
            if self.found.meant[row] or PurePosixPath(name).suffix:
                self.bad(name, str(fault))
            else:
                self.ignored += 1  # README, LICENSE, Makefile
            return 0, 0
        self.read += 1
        return head.height, head.width


def _refuse_budget(data: DataConfig, multiple: int) -> None:
    try:
        grid_size(multiple, multiple, multiple, data.min_pixels, data.max_pixels)
    except ValueError as fault:
        raise ConfigError(
            f"data.max_pixels is too small: {fault}; raise it to {multiple**2} or more"
        ) from None


def _on_grid(read: np.ndarray, data: DataConfig, multiple: int) -> np.ndarray:
    """int32 (N, 2) after the resize, of what headers say; 0 stays 0."""
    pairs, which = np.unique(read, axis=0, return_inverse=True)
    sized = np.zeros_like(pairs)
    for place, (height, width) in enumerate(pairs.tolist()):
        if height > 0:
            sized[place] = grid_size(height, width, multiple, data.min_pixels, data.max_pixels)
    return sized[which.ravel()]
