"""Balance over queries: a group whose query was asked often in this run counts less
(`data.balance`), as if its like were drawn less often. What is drawn stays a function of seed and
step.

    weight = min(1, (mean count of the queries asked so far / count of this one)^strength)

Counts are those before the update, of phrases as `text.same_words` reads them; a phrase that was
never asked counts in full. The LARGEST most asked are kept; of equally asked ones the latest.

Run: `pytest tests/method/groups/test_balance.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vise_fast.text.same_words import bare

LARGEST = 10_000
"""Phrases that are kept at most."""


def weights(counts: Mapping[str, int], asked: Sequence[str | None], strength: float) -> Tensor:
    """(N,) float64, above 0 and at most 1, of N queries after `counts`; 1 for None, a query that
    could not be read.
    """
    mean = sum(counts.values()) / max(len(counts), 1)
    found = []
    for phrase in asked:
        count = 0 if phrase is None else counts.get(bare(phrase), 0)
        found.append(min(1.0, (mean / count) ** strength) if count else 1.0)
    return torch.tensor(found, dtype=torch.float64)


@dataclass
class Balance:
    """How often each phrase was asked, the latest last; `strength` 0: nothing is counted."""

    strength: float
    counts: dict[str, int] = field(default_factory=dict)

    def weights(self, asked: Sequence[str | None]) -> Tensor:
        """(N,) float64 of a batch's queries, None where one could not be read."""
        return weights(self.counts, asked, self.strength)

    def add(self, asked: Sequence[str | None]) -> None:
        """Counts a batch's queries; call it once per update, after the weights were taken."""
        if self.strength == 0:
            return
        for phrase in asked:
            if phrase is not None:
                name = bare(phrase)
                self.counts[name] = self.counts.pop(name, 0) + 1
        for name in sorted(self.counts, key=self.counts.__getitem__)[:-LARGEST]:
            del self.counts[name]

    def state(self) -> dict[str, dict[str, int]]:
        """For a checkpoint, in order; empty where nothing is counted."""
        return {"asked": dict(self.counts)} if self.strength else {}

    def load(self, counts: Mapping[str, int]) -> None:
        """Goes on from the counts of a checkpoint, as `read` returned them."""
        self.counts = dict(counts)


def read(state: Mapping[str, Any]) -> dict[str, int]:
    """The counts in a checkpoint's state; none in one that was written without. Raises ValueError
    for what `Balance.state` did not make.
    """
    counts = state.get("asked", {})
    if not isinstance(counts, dict) or len(counts) > LARGEST:
        raise ValueError("counts of queries that cannot be")
    if not all(type(count) is int and count > 0 for count in counts.values()):
        raise ValueError("queries that were asked less than once")
    return dict(counts)


def figures(weight: Tensor) -> dict[str, float]:
    """What is logged of a batch's weights (N,): the least one and their mean."""
    return {"balance_least": float(weight.min()), "balance_mean": float(weight.mean())}
