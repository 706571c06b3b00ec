"""An album read in its own order through a shuffle buffer, again and again: nothing is listed and
no header is read before the first step.

A batch is a function of seed and step all the same. What a resumed run has seen is passed over by
its names: of a tar the heads of its members are read, of a table its footer, of a list its lines;
nothing is decoded. Sizes and the number of pictures are not known. Left out: the buffer
(listing/shuffle.py), decoding ahead and what takes the place of an unusable picture (slots.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from vise_fast.images import slots
from vise_fast.images.albums.album import Bytes, Found, Place
from vise_fast.images.albums.archive import LARGEST, Span
from vise_fast.images.image import Image
from vise_fast.images.listing.entries import Entry, held_below
from vise_fast.images.listing.gathered import is_ignored
from vise_fast.images.listing.names import key_of
from vise_fast.images.listing.shuffle import Shuffle
from vise_fast.images.picture_file import grid_size
from vise_fast.system.errors import DataError

LOOKED = 100_000
"""Names that are looked at for held-out pictures."""
LARGE = (4800, 6400)
"""Height and width of a picture that may come."""


class Streamed(slots.Slots):
    """Pictures in the order of their album, shuffled data.buffer at a time.

    Raises DataError where there is nothing to train on, where more than `data.max_bad_share` of the
    first pictures are unusable, and for a folder, which has no order of its own.
    """

    def _begin(self) -> None:
        self._extent = self.album.extent()
        if not self._extent:
            raise DataError(
                f"data.stream reads shards, tables and lists in their own order, and the images "
                f"{self.album.title} have none; leave data.stream out: a million files are listed "
                "in two minutes"
            )
        self._length: int | None = None  # of a pass, once one came to its end
        self._given: dict[int, Entry] = {}
        self._looked = 0  # names, for held-out pictures
        self._told = False
        self._held_out: list[Entry] = []
        self._held_rest = self._look_for_held()
        self._open(0, 0)
        self._try_first()
        self._prove_one_decodes()

    def slots(self, now: range, then: range | None = None) -> list[Image]:
        """Those of Slots; what lies before `now` is forgotten."""
        for passed in [slot for slot in self._given if slot < now.start]:
            del self._given[passed]
        return super().slots(now, then)

    def held_out(self, limit: int = 128) -> list[Image]:
        """The first held-out pictures of the album, at most `limit`; never part of a batch."""
        found = self._images(self._held_entries(), limit)
        if len(found) < limit and self._looked == LOOKED and not self._told:
            self._told = True
            self._say(
                f"data.stream: {len(found)} held-out images, not {limit}, are among the first "
                f"{LOOKED} {self.album.title}; figures are of those; raise --data.holdout for more"
            )
        return found

    def sizes(self) -> list[tuple[int, int]]:
        """The largest that may come: what will come is not known."""
        limits = (self.multiple, self.data.min_pixels, self.data.max_pixels)
        return [grid_size(*LARGE, *limits)]

    def describe(self) -> str:
        """What it is, in one line."""
        return f"a stream of photographs {self.album.title}, shuffled {self.data.buffer} at a time"

    def identity(self) -> dict[str, Any]:
        """The shards by name and size, and the names of the first pictures: all that is known
        without reading to the end.
        """
        told = json.dumps([sorted(self._extent.items()), self._first])
        digest = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        return {"images": "streamed", "names": digest} | self.album.about()

    # -- the start ---------------------------------------------------------------------------------

    def _try_first(self) -> None:
        """Decodes the first pictures of the album and judges the others by them."""
        tried = list(map(_entry, map(held, islice(self._records(), slots.TRIED))))
        if not tried:
            self._refuse_all()
        self._first = [os.fsencode(entry.name).hex() for entry in tried]
        broken = self._try(tried)
        self._refuse_share(broken / len(tried), f"{broken} of the first {len(tried)} images")

    def _prove_one_decodes(self) -> None:
        for slot in range(slots.TRIED):
            if self._pixels(self._at(slot)) is not None:
                return
        self._refuse_all()

    # -- reading -----------------------------------------------------------------------------------

    def _records(self) -> Iterator[Found]:
        """All that may be pictures, in the order of the album."""
        return (found for found in self.album.pictures(self._bad.add) if not is_ignored(found))

    def _held_entries(self) -> Iterator[Entry]:
        """Those that are held out, among the first names; each is looked for once."""
        for place in count():
            if place == len(self._held_out):
                following = next(self._held_rest, None)
                if following is None:
                    return
                self._held_out.append(following)
            yield self._held_out[place]

    def _look_for_held(self) -> Iterator[Entry]:
        below = held_below(self.data.holdout)
        for found in islice(self._records(), LOOKED):
            self._looked += 1
            if key_of(found.name) < below:
                yield _entry(held(found))

    def _training(self) -> Iterator[Found]:
        below = held_below(self.data.holdout)
        return (found for found in self._records() if key_of(found.name) >= below)

    def _open(self, number: int, first: int) -> None:
        """A pass, whose first picture is at slot `first`."""
        self._number = number
        self._start = first
        self._next = first
        buffer = self.data.buffer
        self._shuffle = Shuffle(self._training(), buffer, self.seed, number, held)

    def _at(self, slot: int) -> Entry:
        """The file at a slot: read on to it, or from the beginning where it was forgotten."""
        if slot not in self._given:
            if slot < self._next or slot >= self._next + self.data.buffer:
                self._go_to(slot)
            while slot not in self._given:
                self._read_on()
        return self._given[slot]

    def _read_on(self) -> None:
        found = self._shuffle.give()
        if found is None:
            self._turn_over()
        else:
            self._given[self._next] = _entry(found)
            self._next += 1

    def _go_to(self, slot: int) -> None:
        """Opens the pass that a slot lies in and passes over what comes before."""
        if slot < self._next:
            self._open(0, 0)
        while self._next < slot:
            if self._length is not None and slot // self._length > self._number:
                number = slot // self._length
                self._open(number, number * self._length)
            self._next += self._shuffle.skip(slot - self._next)
            if self._next < slot:
                self._turn_over()

    def _turn_over(self) -> None:
        """The pass came to its end: the next one begins."""
        self._length = self._next - self._start
        if not self._length:
            self._refuse_all()
        self._open(self._number + 1, self._next)

    def _others(self, slot: int) -> Iterator[Entry]:
        """Those that come after it, which are the same in any history."""
        return map(self._at, range(slot + 1, slot + 1 + slots.TRIED))


def held(found: Found) -> Found:
    """The same with its bytes where they would be hard to find again: a row of a table."""
    return replace(found, place=_in_memory(found.place))


def _in_memory(place: Place) -> Place:
    if isinstance(place, (Path, Span, Bytes)):
        return place
    try:
        with place.open() as file:
            data = file.read(LARGEST + 1)
    except OSError:  # said by whoever decodes it
        return place
    return Bytes(data) if len(data) <= LARGEST else place


def _entry(found: Found) -> Entry:
    return Entry(found.name, found.place, key_of(found.name))
