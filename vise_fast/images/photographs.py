"""An album of photographs as a source: every name known, a seeded order per epoch.

Whether the album is good enough is decided once, at the start: every header is read, and TRIED
pictures are decoded. Left out: where pictures lie (albums/), which are held out (listing/),
decoding them ahead and what takes the place of an unusable one (slots.py).
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vise_fast.images import slots
from vise_fast.images.albums.album import Place
from vise_fast.images.curation.measured import Measurer
from vise_fast.images.curation.measures import Measures
from vise_fast.images.curation.verdict import LOG, left_out
from vise_fast.images.image import Image
from vise_fast.images.listing.bad_files import BadFiles, described
from vise_fast.images.listing.entries import Columns, Entries, Entry, split
from vise_fast.images.listing.names import key_of
from vise_fast.images.listing.scan import scan
from vise_fast.system import randomness
from vise_fast.system.console import counted
from vise_fast.system.errors import DataError


class Photographs(slots.Slots):
    """The pictures of an album. `train` and `held`: the usable ones; `ignored`: how many files are
    no pictures by their name.

    Raises DataError when there is nothing to train on, or when more than `data.max_bad_share` of
    the files seem unusable; ConfigError when `data.max_pixels` holds no cell of the grid.
    """

    def _begin(self) -> None:
        self._orders: dict[int, np.ndarray] = {}
        self._scan()
        self._try_some()
        self._prove_one_decodes()

    def held_out(self, limit: int = 128) -> list[Image]:
        """The held-out photographs, at most `limit`; never part of a batch."""
        return self._images(self.held, limit)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) after the resize of every training image, from the headers alone."""
        return self.train.sizes

    def names(self) -> list[str]:
        """Of every training image."""
        return [self.train.name(i) for i in range(len(self.train))]

    def describe(self) -> str:
        """What it is, in one line."""
        counts = [f"{len(self.held)} held out"]
        if self.bad:
            counts.append(f"{len(self.bad)} unusable")
        if self.left_out:
            counts.append(f"{len(self.left_out)} left out")
        if self.labelled:
            counts.append(f"{self.labelled} labelled and left out")
        if self.ignored:
            counts.append(counted(self.ignored, "other file"))
        return f"{len(self.train)} photographs {self.album.title} ({', '.join(counts)})"

    def identity(self) -> dict[str, Any]:
        """How many images, and a hash over their names and sizes; the place may be another."""
        digest = hashlib.blake2b(digest_size=16)
        for entries in (self.held, self.train):
            entries.told(digest)
        count = len(self.held) + len(self.train)
        return {"images": count, "names": digest.hexdigest()} | self.album.about()

    def measures(self) -> dict[str, Measures]:
        """{name: what it looks like} of every usable picture that can be decoded, each decoded once
        and remembered; the others are bad from here on.
        """
        measurer = Measurer(self.album, self.data.max_header_pixels, self._pool, self._bad.add)
        return measurer.measured(self._columns, self._through)

    def place(self, name: str) -> Place:
        """Where a picture lies. Raises KeyError."""
        found = self._columns.found
        wanted = os.fsencode(name)
        row = bisect.bisect_left(range(len(found.names)), wanted, key=found.names.raw)
        if row == len(found.names) or found.names.raw(row) != wanted:
            raise KeyError(name)
        return found.place(row)

    # -- the start ---------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Lists the album, reads every header, splits what is usable into `train` and `held`."""
        found = scan(self.album, self.data, self.multiple, self._bad.add, self._through)
        self.ignored = found.ignored
        self._columns: Columns = found.columns
        self.left_out: dict[str, str] = {}
        if self._apart:
            self._leave_labelled()
        if self.data.is_curated:
            self._leave_out()
        parts = split(found.columns, self.data.holdout)
        self.held: Entries = parts.held
        self.train: Entries = parts.train
        usable = len(self.held) + len(self.train)
        if not usable:
            self._refuse_left_out()
            self._refuse_all()
        self.total = usable + len(self.bad)
        self._refuse_share(len(self.bad) / self.total, f"{len(self.bad)} of {self.total} images")

    def _leave_labelled(self) -> None:
        """Pictures to check with are gone from the columns."""
        columns = self._columns
        rows: list[int] = np.flatnonzero(columns.sizes[:, 0]).tolist()
        for row in self._through(rows, "looking for labelled ones"):
            if self._apart.holds(columns.found.place(row)):
                columns.sizes[row] = 0
                self.labelled += 1

    def _leave_out(self) -> None:
        """What the settings leave out is gone from the columns, with a line each in the log."""
        measured = self.measures()
        self.left_out = left_out(measured, self.data)
        log = BadFiles(self._bad.path and self._bad.path.with_name(LOG))
        for name, reason in self.left_out.items():
            log.add(name, reason)
        columns = self._columns
        for row in np.flatnonzero(columns.sizes[:, 0]).tolist():
            name = columns.found.names[row]
            if name in self.left_out or name not in measured:
                columns.sizes[row] = 0

    def _refuse_left_out(self) -> None:
        if self.left_out:
            raise DataError(
                f"all {len(self.left_out)} usable images {self.album.title} are left out: "
                f"{described(*next(iter(self.left_out.items())))}; lower that setting; vise-fast "
                "data shows what each leaves out"
            )

    def _try_some(self) -> None:
        """A header says little: decodes TRIED files whose names decide, all where there are fewer,
        and judges the others by them.
        """
        headless = len(self.bad)
        usable = self.held + self.train
        first = heapq.nsmallest(
            slots.TRIED, range(len(usable)), lambda i: key_of(f"tried {usable.name(i)}")
        )
        tried = [usable[i] for i in first]
        broken = self._try(tried)
        share = (headless + broken * len(usable) / len(tried)) / self.total
        counted = f"{len(self.bad)} of {self.total} images"
        if len(tried) < len(usable):
            counted = f"{broken} of {len(tried)} images that were tried, and {headless} headers,"
        self._refuse_share(share, counted)

    def _prove_one_decodes(self) -> None:
        """Decodes in the order of the first epoch until one picture comes out whole."""
        for slot in range(len(self.train)):
            if self._pixels(self._at(slot)) is not None:
                return
        self._refuse_all()

    # -- drawing -----------------------------------------------------------------------------------

    def _at(self, slot: int) -> Entry:
        """One seeded permutation per epoch."""
        epoch, place = divmod(slot, len(self.train))
        if epoch not in self._orders:
            for stale in [kept for kept in self._orders if kept < epoch - 1]:
                del self._orders[stale]
            rng = randomness.generator(self.seed, epoch, "order")
            self._orders[epoch] = rng.permutation(len(self.train))
        return self.train[self._orders[epoch][place]]

    def _others(self, slot: int) -> Iterator[Entry]:
        """Drawn by its place, so that history does not matter."""
        rng = randomness.generator(self.seed, slot, "substitute")
        return map(self.train.__getitem__, rng.permutation(len(self.train)))
