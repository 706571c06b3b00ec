"""Several places as one source, by weight.

Which place a slot of the endless sequence belongs to is drawn by its number; within its place it is
the next one. Both follow from seed and step alone, so that a resumed run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from vise_fast.images.image import Image
from vise_fast.images.listing.names import key_of
from vise_fast.images.slots import Slots
from vise_fast.system import randomness
from vise_fast.system.errors import ConfigError

CHUNK = 2**14
"""Slots whose places are drawn at once."""


def parts_of(words: Sequence[str]) -> dict[str, float]:
    """{place: weight} of `data.mix`, whose entries are PLACE=WEIGHT. Raises ConfigError."""
    found: dict[str, float] = {}
    for word in words:
        place, _, weight = word.rpartition("=")
        if not place or place in found or not _is_weight(weight):
            raise ConfigError(
                f"data.mix {word} is no place and its weight, each place once; it says how often "
                "a place is drawn from; write photos=3"
            )
        found[place] = float(weight)
    return found


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _by_place(drawn: list[tuple[int, int]]) -> dict[int, range]:
    """The slots of each place, which are neighbours in a batch."""
    found: dict[int, range] = {}
    for place, slot in drawn:
        first = found[place].start if place in found else slot
        found[place] = range(first, slot + 1)
    return found


class Mixed:
    """Photographs of several places. Held-out pictures come from each in turn."""

    def __init__(
        self, places: Mapping[str, Slots], weights: Mapping[str, float], seed: int
    ) -> None:
        self.places = dict(places)
        total = sum(weights.values())
        self._ends = np.cumsum([weights[place] / total for place in self.places])
        self._seed = seed
        self._chunks: list[np.ndarray] = []
        """Of each chunk of slots, the place of every slot."""
        self._before: list[np.ndarray] = [np.zeros(len(self.places), np.int64)]
        """How many slots each place had before each chunk."""

    def batch(self, step: int, n: int, part: range | None = None) -> list[Image]:
        """The `n` images of step `step`, counted from 0; of them those at the places `part`. Raises
        DataError when a place has no file any more that can be used.
        """
        whole = part is None or len(part) == n
        part = part or range(n)
        drawn = self._drawn(step * n, part)
        later = {} if whole else _by_place(self._drawn((step + 1) * n, part))
        pictures = {}
        for place, slots in _by_place(drawn).items():
            then = None if whole else later.get(place, range(0))
            pictures[place] = self._of(place, slots, then)
        return [next(pictures[place]) for place, _ in drawn]

    def _drawn(self, first: int, part: range) -> list[tuple[int, int]]:
        """(which place, which slot of its own) of a part of the batch that begins at `first`."""
        return [self._slot(slot) for slot in range(first + part.start, first + part.stop)]

    def _of(self, place: int, slots: range, then: range | None) -> Iterator[Image]:
        """Those of one place, and what is decoded ahead (None: as many further ones)."""
        name = list(self.places)[place]
        for image in self.places[name].slots(slots, then):
            yield _named(image, place, name)

    def _slot(self, slot: int) -> tuple[int, int]:
        """(which place, which slot of its own)."""
        chunk, offset = divmod(slot, CHUNK)
        while len(self._chunks) <= chunk:
            self._draw()
        places = self._chunks[chunk]
        place = int(places[offset])
        earlier = int((places[:offset] == place).sum())
        return place, int(self._before[chunk][place]) + earlier

    def _draw(self) -> None:
        """One chunk more."""
        number = len(self._chunks)
        draws = randomness.generator(self._seed, number, "mix").random(CHUNK)
        last = len(self._ends) - 1
        places = np.minimum(np.searchsorted(self._ends, draws, side="right"), last)
        self._chunks.append(places.astype(np.int16))
        counts = np.bincount(places, minlength=len(self._ends))
        self._before.append(self._before[-1] + counts)

    def held_out(self, limit: int = 128) -> list[Image]:
        """Pictures that are in no batch, one of each place after the other, at most `limit`."""
        rows = []
        for place, (name, source) in enumerate(self.places.items()):
            rows.append([_named(image, place, name) for image in source.held_out(limit)])
        turns = zip_longest(*rows)
        return [image for image in chain.from_iterable(turns) if image is not None][:limit]

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every training image of every place."""
        found: list[tuple[int, int]] = []
        for source in self.places.values():
            found += source.sizes()
        return found

    def names(self) -> list[str] | None:
        """Of every training image of every place, as batches call them; None where those of a
        place are not known.
        """
        found: list[str] = []
        for place, source in self.places.items():
            names = source.names()
            if names is None:
                return None
            found += [f"{place}: {name}" for name in names]
        return found

    def describe(self) -> str:
        """What it is, in one line."""
        shares = np.diff(self._ends, prepend=0.0)
        pairs = zip(self.places.values(), shares, strict=True)
        return "; ".join(f"{share:.0%} {source.describe()}" for source, share in pairs)

    def identity(self) -> dict[str, Any]:
        """That of each place, and how often it is drawn from; where it lies may change."""
        each = [source.identity() for source in self.places.values()]
        ends = [round(float(end), 9) for end in self._ends]
        counts = [found["images"] for found in each]
        known = all(isinstance(count, int) for count in counts)
        return {"images": sum(counts) if known else "streamed", "mix": each, "ends": ends}

    def figures(self) -> dict[str, int]:
        """Files of all places that turned out unusable so far."""
        counts = [source.figures()["bad_images"] for source in self.places.values()]
        return {"bad_images": sum(counts)}

    def close(self) -> None:
        """Ends the decode threads of each."""
        for source in self.places.values():
            source.close()


def _named(image: Image, place: int, name: str) -> Image:
    """Two places may have pictures of one name. The key knows a place by its turn: it may move."""
    return Image(image.pixels, f"{name}: {image.name}", key_of(f"{place}/{image.name}"))
