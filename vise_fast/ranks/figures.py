"""What every rank did in a step, as figures of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST = ("micro_batch", "bad_images")
"""Figures of which the largest counts; all others are added up."""
MEANS = ("verdict_spread",)
"""But for these, which are means over a rank's own images."""
GIB = 2**30


@dataclass(frozen=True)
class Share:
    """One rank's step. seconds: between two updates, `waited_s` of them for others and for the
    network.
    """

    counts: Mapping[str, float]
    images: int
    seconds: float
    peak_bytes: int
    waited_s: float
    sent_bytes: int
    gradient_bytes: int

    @property
    def busy_s(self) -> float:
        """Of its own."""
        return self.seconds - self.waited_s


def merged(shares: list[Share]) -> dict[str, Any]:
    """Counts of the run, and under `ranks` what each did.

    The slowest rank waits for nobody: what it waited is communication. The others' waits hold
    theirs for it as well.
    """
    names = dict.fromkeys(name for share in shares for name in share.counts)
    counts: dict[str, Any] = {name: _of_all(name, shares) for name in names}
    slowest = max(range(len(shares)), key=lambda rank: shares[rank].busy_s)
    waited = min(share.waited_s for share in shares)
    counts["ranks"] = {
        "images": [share.images for share in shares],
        "images_per_s": [share.images / share.busy_s for share in shares],
        "waited_s": [share.waited_s for share in shares],
        "peak_gib": [share.peak_bytes / GIB for share in shares],
        "halvings": [share.counts.get("memory_halvings", 0) for share in shares],
    }
    counts["slowest_rank"] = slowest
    counts["communication_share"] = waited / max(share.seconds for share in shares)
    counts["communication_bytes"] = max(share.sent_bytes for share in shares)
    counts["gradient_bytes"] = max(share.gradient_bytes for share in shares)
    return counts


def _of_all(name: str, shares: list[Share]) -> float:
    """One figure of the ranks that have it: one without a verdict has no spread of verdicts."""
    known = [share for share in shares if name in share.counts]
    values = [share.counts[name] for share in known]
    if name in MOST:
        return max(values)
    if name not in MEANS:
        return sum(values)
    images = [share.images for share in known]
    weighted = zip(values, images, strict=True)
    return sum(value * count for value, count in weighted) / sum(images)
