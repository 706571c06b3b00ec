"""Faults at a place, told in words: what the parameters of the tests are.

"write metrics.jsonl #2 half" is the second call that writes to metrics.jsonl (a pattern as in a
shell), half of which is done; calls.py lists the operations.
"""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from faults.calls import Call
from faults.forked import KILLED


@dataclass(frozen=True)
class Place:
    """The `nth` call of an operation on a name; `half`: half of what it writes is written."""

    operation: str
    name: str
    nth: int = 1
    half: bool = False

    @classmethod
    def read(cls, text: str) -> Place:
        """From "operation name [#n] [half]"."""
        operation, name, *rest = text.split()
        nth = next((int(word[1:]) for word in rest if word.startswith("#")), 1)
        return cls(operation, name, nth, "half" in rest)

    def fits(self, call: Call) -> bool:
        """Whether a call is of this kind, whichever in number."""
        return call.operation == self.operation and fnmatch.fnmatchcase(call.name, self.name)


class At:
    """Does something at a place: `strike` ends the process or raises. `for_good`: at every call
    from there on.
    """

    def __init__(self, place: str, strike: Callable[[], NoReturn], for_good: bool = False) -> None:
        self.place = Place.read(place)
        self.strike = strike
        self.for_good = for_good
        self.seen = 0

    def __call__(self, call: Call) -> None:
        fits = self.place.fits(call)
        self.seen += fits
        if (fits and self.seen == self.place.nth) or (
            self.for_good and self.seen >= self.place.nth
        ):
            if self.place.half:
                call.half()
            self.strike()


def kill_at(place: str) -> At:
    """The process is gone, as by SIGKILL: nothing is flushed, nothing is cleaned up."""
    return At(place, lambda: os._exit(KILLED))


def refuse_at(place: str, name: str, for_good: bool = False) -> At:
    """The system refuses with an error by name (ENOSPC), once or from there on."""
    number = getattr(errno, name)

    def strike() -> NoReturn:
        raise OSError(number, os.strerror(number))

    return At(place, strike, for_good)
