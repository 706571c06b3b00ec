"""One pass over records through a buffer that shuffles them: the next one is drawn from the buffer,
and the record that was read takes its place.

What is drawn is named by seed, pass and place, so that the same records give the same order again,
also where most of them are only counted, not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from vise_fast.system import randomness

T = TypeVar("T")


class Shuffle(Generic[T]):
    """records: in their own order; size: of the buffer; hold: what makes of a record one that may
    stay in the buffer for long.
    """

    def __init__(
        self, records: Iterator[T], size: int, seed: int, number: int, hold: Callable[[T], T]
    ) -> None:
        self._records = records
        self._size = size
        self._seed = seed
        self._number = number
        self._hold = hold
        self._buffer: list[T] | None = None
        self.given = 0
        """Records that were given or passed over."""

    def give(self) -> T | None:
        """The next one; None at the end of the pass."""
        return self._next(self._hold)

    def skip(self, count: int) -> int:
        """Passes over as many without holding any; fewer where the pass ends. Returns how many."""
        before = self.given
        while self.given < before + count and self._next(_as_it_is) is not None:
            pass
        if self._buffer is not None:
            self._buffer = list(map(self._hold, self._buffer))
        return self.given - before

    def _next(self, hold: Callable[[T], T]) -> T | None:
        if self._buffer is None:
            self._buffer = list(map(hold, islice(self._records, self._size)))
        buffer = self._buffer
        if not buffer:
            return None
        place = randomness.key(self._seed, self._number, "stream", self.given) % len(buffer)
        self.given += 1
        record = buffer[place]
        following = next(self._records, None)
        if following is not None:
            buffer[place] = hold(following)
        else:
            buffer[place] = buffer[-1]
            buffer.pop()
        return record


def _as_it_is(record: T) -> T:
    return record
