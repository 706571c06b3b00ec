"""Figures that leave their healthy range: the full-image collapse, unreadable answers, a policy far
from its reference.

Each alarm looks at a moving average, so that one odd batch does not raise it; the ranges are wide
on purpose. What is done about an alarm (a line on screen, a flag in metrics.jsonl, an early end) is
the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WATCHED = ("area", "area_large", "parse_rate", "kl")
MEMORY = 0.8
SETTLE = 5
GROWTH = 2.0
LARGE_SHARE = 0.3
PARSE_FLOOR = 0.7
KL_LIMIT = 10.0


@dataclass
class Alarms:
    """Moving averages since the start and what each says. `tau`: the KL target in nat per token."""

    tau: float
    base_parse_rate: float = 1.0
    base_area_large: float = 0.0
    """What the base itself does on held-out images: where an alarm has its zero."""
    averages: dict[str, float] = field(default_factory=dict)
    first_area: float | None = None
    seen: int = 0
    since: int | None = None

    def begin_at(self, base: Mapping[str, float]) -> None:
        """Takes the base's own rates, as its evaluation calls them, where it has them."""
        self.base_parse_rate = base.get("own_parse_rate", 1.0)
        self.base_area_large = base.get("own_area_large", 0.0)

    def update(self, step: int, metrics: Mapping[str, float]) -> dict[str, str | None]:
        """What each alarm says after this step, None where all is well."""
        for name in WATCHED:
            value = metrics[name]
            self.averages[name] = MEMORY * self.averages.get(name, value) + (1 - MEMORY) * value
        self.seen += 1
        if self.seen == SETTLE:
            self.first_area = self.averages["area"]
        said = self._said() if self.seen >= SETTLE else {}
        if not any(said.values()):
            self.since = None
        elif self.since is None:
            self.since = step
        return said

    def _said(self) -> dict[str, str | None]:
        a = self.averages
        first = max(self.first_area or 0.0, 1e-6)
        rules = {
            "area": (
                a["area"] > GROWTH * first,
                f"boxes cover {a['area']:.2f} of the image, {a['area'] / first:.1f} times the "
                "start; the reward is being paid for size",
            ),
            "area_large": (
                a["area_large"] > self.base_area_large + LARGE_SHARE,
                f"{a['area_large']:.0%} of the boxes cover more than 0.8 of the image; the "
                "policy collapses to the full image",
            ),
            "parse_rate": (
                a["parse_rate"] < PARSE_FLOOR * self.base_parse_rate,
                f"only {a['parse_rate']:.0%} of the answers can be read as a box (the base's: "
                f"{self.base_parse_rate:.0%}); lower train.lr",
            ),
            "kl": (
                a["kl"] > KL_LIMIT * self.tau,
                f"the KL to the reference is {a['kl']:.2f} nat per token, over {KL_LIMIT:.0f} "
                "times its target; lower train.lr",
            ),
        }
        return {name: text if holds else None for name, (holds, text) in rules.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `load` is the inverse."""
        return {
            "averages": self.averages,
            "first_area": self.first_area,
            "seen": self.seen,
            "since": self.since,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave. Raises KeyError, TypeError, ValueError or AttributeError for what it
        did not give; nothing has changed then.
        """
        averages = {name: _number(value) for name, value in state["averages"].items()}
        first_area = state["first_area"]
        seen = _count(state["seen"])
        since = state["since"]
        if seen and averages.keys() != set(WATCHED):
            raise ValueError("averages of other figures")
        self.first_area = None if first_area is None else _number(first_area)
        self.since = None if since is None else _count(since)
        self.averages = averages
        self.seen = seen


def _number(value: Any) -> float:
    """Raises TypeError for anything else; what is not finite, ValueError."""
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _count(value: Any) -> int:
    """Raises ValueError for anything but a whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise ValueError("no count")
    return value
