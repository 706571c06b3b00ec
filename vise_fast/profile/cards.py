"""What a step would take on cards that are not at hand: a forecast from counts (launches.py), never
a measurement.

Each kernel takes at least what its FLOPs or its bytes take at the card's ceilings, and no less than
SHORTEST; together that is the card's floor. Two rules add the host:

    sum    floor + launches · A_LAUNCH                 nothing overlaps
    max    per phase the larger of floor and launches · A_LAUNCH

Left out: what lies between a kernel and its ceiling, and whatever a library does on the host.
"""

from __future__ import annotations

from typing import NamedTuple

from vise_fast.profile.launches import Launches, Tally

SHORTEST = 1.5e-6
"""seconds a kernel takes at least"""
A_LAUNCH = 50e-6
"""seconds of the host with all the Python around a launch: what lay between floor and step on an
H100, over the launches, was 43 to 67 us in four steps of 4,984 to 23,610 (docs/PERFORMANCE.md)
"""


class Card(NamedTuple):
    """16-bit matrix FLOP/s (float32 sums, dense) and bytes/s of memory, where they are from, and
    the GB of memory it is sold with (0: not told).
    """

    name: str
    flops: float
    bandwidth: float
    source: str
    memory_gb: int = 0


CARDS = (
    Card("H100 80 GB", 798e12, 3.0e12, "measured: matrix product and copy", 80),
    Card("H200 141 GB", 790e12, 4.3e12, "measured: matrix product and copy", 141),
    Card("RTX 4090 24 GB", 165e12, 1.0e12, "NVIDIA Ada whitepaper: 165.2 TFLOP/s, 1,008 GB/s", 24),
    Card("RTX 3090 24 GB", 71e12, 0.936e12, "NVIDIA GA102 whitepaper: 71 TFLOP/s, 936 GB/s", 24),
    Card("RTX 4060 Ti 16 GB", 44e12, 0.288e12, "twice its 22.06 TFLOP/s of float32; 288 GB/s", 16),
    Card("RTX 4070 12 GB", 58.3e12, 0.504e12, "twice its 29.15 TFLOP/s of float32; 504 GB/s", 12),
    Card("RTX 4060 8 GB", 30.2e12, 0.272e12, "twice its 15.11 TFLOP/s of float32; 272 GB/s", 8),
)
"""float32 of the last three: CUDA cores (4,352, 5,888, 3,072), two operations each, at the boost
clock (2.535, 2.475, 2.46 GHz). As on the 4090, 16-bit products with float32 sums are twice that.
"""


class Forecast(NamedTuple):
    """Seconds of a step: the card's floor, and both rules."""

    floor: float
    sum: float
    max: float


def floor(tally: Tally, card: Card, shortest: float = SHORTEST) -> float:
    """Seconds that the kernels of one phase take at least, each no less than `shortest`."""
    total = 0.0
    for (flops, moved), count in tally.kernels.items():
        total += count * max(flops / card.flops, moved / card.bandwidth, shortest)
    return total


def forecast(seen: Launches, card: Card) -> Forecast:
    """Of a counted step."""
    phases = seen.by_phase.values()
    floors = [floor(tally, card) for tally in phases]
    hosts = [tally.launches * A_LAUNCH for tally in phases]
    overlapped = sum(max(pair) for pair in zip(floors, hosts, strict=True))
    waiting = seen.total.launches * A_LAUNCH
    return Forecast(sum(floors), sum(floors) + waiting, overlapped)
