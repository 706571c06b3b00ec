"""An album of photographs as a source: every name known, a seeded order per epoch.

Whether the album is good enough is decided once, at the start: every header is read, and TRIED
pictures are decoded. Left out: where pictures lie (albums/), which are held out (listing/),
decoding them ahead and what takes the place of an unusable one (slots.py).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from vise_fast.images import slots
from vise_fast.images.image import Image
from vise_fast.images.listing.entries import Entries, Entry, split
from vise_fast.images.listing.names import key_of
from vise_fast.images.listing.scan import scan
from vise_fast.system import randomness


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

    def describe(self) -> str:
        """What it is, in one line."""
        counts = [f"{len(self.held)} held out"]
        if self.bad:
            counts.append(f"{len(self.bad)} unusable")
        if self.ignored:
            counts.append(f"{self.ignored} other files")
        return f"{len(self.train)} photographs {self.album.title} ({', '.join(counts)})"

    def identity(self) -> dict[str, Any]:
        """How many images, and a hash over their names and sizes; the place may be another."""
        digest = hashlib.blake2b(digest_size=16)
        for entries in (self.held, self.train):
            entries.told(digest)
        count = len(self.held) + len(self.train)
        return {"images": count, "names": digest.hexdigest()} | self.album.about()

    # -- the start ---------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Lists the album, reads every header, splits what is usable into `train` and `held`."""
        found = scan(self.album, self.data, self.multiple, self._bad.add, self._through)
        self.ignored = found.ignored
        parts = split(found.columns, self.data.holdout)
        self.held: Entries = parts.held
        self.train: Entries = parts.train
        usable = len(self.held) + len(self.train)
        if not usable:
            self._refuse_all()
        self.total = usable + len(self.bad)
        self._refuse_share(len(self.bad) / self.total, f"{len(self.bad)} of {self.total} images")

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
