"""Every usable picture of an album measured once; what an earlier start has measured is remembered
as headers are (listing/remembered.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vise_fast.images.albums.album import Album, Skip
from vise_fast.images.curation.measures import Measures, measure
from vise_fast.images.listing import remembered
from vise_fast.images.listing.entries import Columns
from vise_fast.images.listing.gathered import Gathered
from vise_fast.images.listing.names import Names
from vise_fast.images.listing.remembered import MEASURES, Known, Remembered, Stamp
from vise_fast.images.listing.through import Through
from vise_fast.images.picture_file import BadImage, decode

AT_ONCE = 64
"""Pictures that are decoded between two looks at what is remembered."""
UNUSABLE = Measures(0, 0, 0, 0)


class _Seen(NamedTuple):
    """A picture as it was when it was measured; `fault`: why it could not be."""

    stamp: Stamp
    measures: Measures
    fault: str | None = None
    fresh: bool = False


class Measurer:
    """Measures an album's pictures. cap: pixels that a header may promise; pool: decodes (None:
    here); bad: takes what cannot be decoded.
    """

    def __init__(self, album: Album, cap: int, pool: ThreadPoolExecutor | None, bad: Skip) -> None:
        self._place = remembered.place_of(album, cap, MEASURES)
        self._known = Remembered(remembered.read(self._place, MEASURES))
        self._cap = cap
        self._run = map if pool is None else pool.map
        self._bad = bad

    def measured(self, columns: Columns, through: Through) -> dict[str, Measures]:
        """{name: measures} of the usable rows that can be decoded, in the order of their names."""
        found = columns.found
        rows: list[int] = np.flatnonzero(columns.sizes[:, 0]).tolist()
        done: dict[str, Measures] = {}
        stamps: array[int] = array("q")
        values: array[int] = array("q")
        fresh = 0
        seen = self._each(found, rows)
        for row, one in zip(through(rows, "looking at images"), seen, strict=True):
            stamps.extend(one.stamp)
            values.extend(one.measures)
            fresh += one.fresh
            if one.fault is None:
                done[found.names[row]] = one.measures
            else:
                self._bad(found.names[row], one.fault)
        if fresh:
            names = Names.of([found.names.raw(row) for row in rows])
            remembered.write(self._place, Known(MEASURES, names, stamps, values))
        return done

    def _each(self, found: Gathered, rows: Sequence[int]) -> Iterator[_Seen]:
        """Looked up, in the order of names; what is not known is decoded, some at once."""
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            stamps = [found.stamp(row) for row in some]
            pairs = zip(some, stamps, strict=True)
            known = [self._known.values(found.names.raw(row), stamp) for row, stamp in pairs]
            lacking = [row for row, values in zip(some, known, strict=True) if values is None]
            decoded = iter(self._run(lambda row: self._look(found, row), lacking))
            for stamp, values in zip(stamps, known, strict=True):
                if values is not None:
                    yield _Seen(stamp, Measures(*values))
                else:
                    yield next(decoded)._replace(stamp=stamp)

    def _look(self, found: Gathered, row: int) -> _Seen:
        """Decodes one, maybe in a thread."""
        try:
            picture = decode(found.place(row), self._cap)
        except BadImage as fault:
            return _Seen(remembered.UNKNOWN, UNUSABLE, str(fault))
        return _Seen(remembered.UNKNOWN, measure(picture), fresh=True)
