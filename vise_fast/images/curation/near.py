"""Pictures that are almost another one: their hashes differ in few of 64 bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

WIDTH = 64


def originals(bits: Sequence[int], distance: int) -> list[int]:
    """Of each picture the first one, of those that are kept, that its bits differ from in at most
    `distance`; itself where there is none, and it is kept.

    Two numbers that differ in d bits agree in one of d + 1 parts at least, so only those that share
    a part are compared.
    """
    parts = list(_parts(distance + 1))
    kept: list[dict[int, list[int]]] = [defaultdict(list) for _ in parts]
    found = []
    for place, own in enumerate(bits):
        close = [
            other
            for part, known in zip(parts, kept, strict=True)
            for other in known[own & part]
            if ((own ^ bits[other]) & (2**WIDTH - 1)).bit_count() <= distance
        ]
        found.append(min(close, default=place))
        if not close:
            for part, known in zip(parts, kept, strict=True):
                known[own & part].append(place)
    return found


def _parts(count: int) -> Iterator[int]:
    """Masks that share the bits out."""
    ends = [WIDTH * i // count for i in range(count + 1)]
    for start, end in zip(ends, ends[1:], strict=False):
        yield (2**end - 1) ^ (2**start - 1)
