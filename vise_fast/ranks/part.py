"""Which images of a batch a rank plays: neighbours, as many as the others' or one more."""

from __future__ import annotations


def part(images: int, rank: int, count: int) -> range:
    """Places in the batch, 0-based; parts follow each other in the order of ranks."""
    first = -(-images * rank // count)
    return range(first, -(-images * (rank + 1) // count))


def largest(images: int, count: int) -> int:
    """Images of the rank that has most."""
    return -(-images // count)
