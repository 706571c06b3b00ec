"""The usable pictures of an album in columns: a million take what a million small objects would
take ten times over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vise_fast.images.albums.album import Place
from vise_fast.images.listing.gathered import Gathered


@dataclass(frozen=True)
class Entry:
    """One picture: its name in the album, where it lies, and 63 bits of its name."""

    name: str
    place: Place
    key: int


@dataclass(frozen=True)
class Columns:
    """Of all that was gathered. `keys` int64 (N,); `sizes` int32 (N, 2): height and width after the
    resize, 0 where a file cannot be used.
    """

    found: Gathered
    keys: np.ndarray
    sizes: np.ndarray


class Entries:
    """Some rows of the columns, in an order of their own. `rows` int64 (N,)."""

    def __init__(self, columns: Columns, rows: np.ndarray) -> None:
        self.columns = columns
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Entry:
        row = int(self.rows[index])
        found = self.columns.found
        return Entry(found.names[row], found.place(row), int(self.columns.keys[row]))

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def __add__(self, others: Entries) -> Entries:
        return Entries(self.columns, np.concatenate([self.rows, others.rows]))

    def name(self, index: int) -> str:
        """Of one of them."""
        return self.columns.found.names[int(self.rows[index])]

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each; equal ones are one object."""
        pairs, which = np.unique(self.columns.sizes[self.rows], axis=0, return_inverse=True)
        known = [(height, width) for height, width in pairs.tolist()]
        return [known[place] for place in which.ravel().tolist()]

    def told(self, digest: hashlib.blake2b) -> None:
        """Feeds a hash with names and sizes."""
        raw = self.columns.found.names.raw
        for row, size in zip(self.rows.tolist(), self.sizes, strict=True):
            digest.update(raw(row) + b"\0%dx%d\n" % size)


@dataclass(frozen=True)
class Split:
    """The files that are held out, and those to train on."""

    held: Entries
    train: Entries


def held_below(share: float) -> int:
    """Names whose key is below are held out."""
    return math.ceil(share * 2**63)


def split(columns: Columns, share: float) -> Split:
    """Holds out `share` of the usable files by the hash of each name: adding files moves no other.
    At least one of each where there are two files.
    """
    usable = np.flatnonzero(columns.sizes[:, 0])
    keys = columns.keys[usable]
    count = int((keys < held_below(share)).sum())
    count = min(max(count, 1), len(usable) - 1) if share > 0 else 0
    first = np.argsort(keys, kind="stable")[:count]
    train = np.ones(len(usable), np.bool_)
    train[first] = False
    return Split(Entries(columns, usable[first]), Entries(columns, usable[train]))
