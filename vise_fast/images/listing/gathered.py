"""What an album holds, by name: each once, in the order of their bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vise_fast.images.albums.album import Album, Found, Place, Skip
from vise_fast.images.listing.names import Names, irrelevant
from vise_fast.images.listing.remembered import UNKNOWN, Stamp, stamp_of
from vise_fast.images.listing.through import Through


@dataclass(frozen=True)
class Gathered:
    """`meant` bool (N,): listed as a picture, whatever its name ends with; `places`: where each
    lies (None: below the folder `root`, at its name); `ignored`: how many are none by their name.
    """

    names: Names
    meant: np.ndarray
    root: Path | None
    places: list[Place] | None
    ignored: int

    def place(self, row: int) -> Place:
        """Where one lies."""
        if self.places is not None:
            return self.places[row]
        assert self.root is not None
        return self.root / self.names[row]

    def stamp(self, row: int) -> Stamp:
        """What changes with one; UNKNOWN where it is no file."""
        if self.root is None:
            return UNKNOWN
        return stamp_of(os.path.join(self.root, self.names[row]))


def gather(album: Album, skip: Skip, through: Through) -> Gathered:
    """Walks the album; of two with one name the later counts. Raises what the album raises."""
    names: list[bytes] = []
    meant = bytearray()
    places: list[Place] = []
    ignored = 0
    for found in through(album.pictures(skip), "listing files"):
        if is_ignored(found):
            ignored += 1
            continue
        names.append(os.fsencode(found.name))
        meant.append(found.meant)
        if album.root is None:
            places.append(found.place)
    order = list(_each_once(names))
    return Gathered(
        Names.of([names[row] for row in order]),
        np.frombuffer(meant, np.bool_)[order],
        album.root,
        [places[row] for row in order] if album.root is None else None,
        ignored,
    )


def is_ignored(found: Found) -> bool:
    """Whether it is no picture by its name."""
    return not found.meant and irrelevant(found.name)


def _each_once(names: list[bytes]) -> Iterator[int]:
    """The places of the names in their order; of equal ones the last."""
    order = sorted(range(len(names)), key=names.__getitem__)
    for row, after in pairwise(order):
        if names[row] != names[after]:
            yield row
    yield from order[-1:]
