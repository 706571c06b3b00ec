"""Figures that leave their healthy range: the full-image collapse, unreadable answers, a policy far
from its reference, answers scored otherwise than they were sampled.

Each alarm over the updates looks at a moving average, so that one odd batch does not raise it; the
ranges are wide on purpose. Those over the evaluations (`looked_at`) stand until the next one. What
is done about an alarm (a line on screen, a flag in metrics.jsonl, an early end) is the caller's
business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vise_fast.evaluate.results import Results, paired_gain

WATCHED = ("area", "area_large", "parse_rate", "kl")
WATCHED_TOO = ("zero_area", "logprob_gap")
"""Where a step has them: a gap only where an answer was scored."""
MEMORY = 0.8
SETTLE = 5
GROWTH = 2.0
LARGE_SHARE = 0.3
PARSE_FLOOR = 0.7
KL_LIMIT = 10.0
ZERO_SHARE = 0.1
"""Of the readable answers, beyond the base's: one in ten that pays nothing was paid before."""
GAP_LIMIT = 0.02
GAP_LIMIT_QUANTISED = 0.15
"""Nat per token, mean. fp32 is at 1e-6, bf16 at .005; LLM.int8 at its default threshold reached
.09 without a fault.
"""
GREEDY_GROWTH = 1.1
"""Times the base's own: 1.07 times the truth became 1.21 in a run that no other alarm noticed."""
FREE_LENGTH = 2.0
"""Times, or by which the base's is divided."""
FREE_YES = 0.2
"""Share of the answers, from the base's."""
CONFIRMED = 2
"""Evaluations in a row that must raise an alarm before it ends a run that asked for it."""


@dataclass
class Alarms:
    """Moving averages since the start and what each says. `tau`: the KL target in nat per token;
    `gap_limit`: of the mean log-prob gap.
    """

    tau: float
    gap_limit: float = GAP_LIMIT
    base_parse_rate: float = 1.0
    base_area_large: float = 0.0
    base_zero_area: float = 0.0
    """What the base itself does on held-out images: where an alarm has its zero."""
    averages: dict[str, float] = field(default_factory=dict)
    first_area: float | None = None
    seen: int = 0
    since: int | None = None
    standing: dict[str, str] = field(default_factory=dict)
    """What the latest evaluation raised, in words."""
    confirmed: int = 0
    """Evaluations in a row that raised something."""

    @property
    def on(self) -> bool:
        """Whether any is on."""
        return self.since is not None or bool(self.standing)

    def stays_on(self, step: int, patience: int) -> bool:
        """Whether one has been on for so many steps, or in two evaluations in a row."""
        long = self.since is not None and step - self.since >= patience
        return long or self.confirmed >= CONFIRMED

    def begin_at(self, base: Mapping[str, float]) -> None:
        """Takes the base's own rates, as its evaluation calls them, where it has them."""
        self.base_parse_rate = base.get("own_parse_rate", 1.0)
        self.base_area_large = base.get("own_area_large", 0.0)
        self.base_zero_area = base.get("own_zero_area", 0.0)

    def take(self, said: Mapping[str, str | None]) -> None:
        """What an evaluation says (`looked_at`); it stands until the next one."""
        self.standing = {name: text for name, text in said.items() if text is not None}
        self.confirmed = self.confirmed + 1 if self.standing else 0

    def update(self, step: int, metrics: Mapping[str, float]) -> dict[str, str | None]:
        """What each alarm says after this step, None where all is well."""
        for name in WATCHED:
            self._follow(name, metrics[name])
        for name in WATCHED_TOO:
            if math.isfinite(metrics.get(name, math.nan)):
                self._follow(name, metrics[name])
        self.seen += 1
        if self.seen == SETTLE:
            self.first_area = self.averages["area"]
        said = self._said() if self.seen >= SETTLE else {}
        if not any(said.values()):
            self.since = None
        elif self.since is None:
            self.since = step
        return said | self.standing

    def _follow(self, name: str, value: float) -> None:
        self.averages[name] = MEMORY * self.averages.get(name, value) + (1 - MEMORY) * value

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
            "zero_area": (
                a.get("zero_area", 0.0) > self.base_zero_area + ZERO_SHARE,
                f"{a.get('zero_area', 0.0):.0%} of the readable boxes have no area (the base's: "
                f"{self.base_zero_area:.0%}); they earn nothing; lower train.lr",
            ),
            "logprob_gap": (
                a.get("logprob_gap", 0.0) > self.gap_limit,
                f"answers are scored {a.get('logprob_gap', 0.0):.2g} nat per token from what they "
                f"were sampled with (limit {self.gap_limit:g}); the update learns from other "
                "answers than were given; use model.dtype float32 or another model.engine",
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
            "standing": self.standing,
            "confirmed": self.confirmed,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave. Raises KeyError, TypeError, ValueError or AttributeError for what it
        did not give; nothing has changed then.
        """
        averages = {name: _number(value) for name, value in state["averages"].items()}
        first_area = state["first_area"]
        seen = _count(state["seen"])
        since = state["since"]
        # checkpoints of 0.2 know of no evaluation between updates
        standing = {name: str(text) for name, text in state.get("standing", {}).items()}
        confirmed = _count(state.get("confirmed", 0))
        if seen and averages.keys() - set(WATCHED_TOO) != set(WATCHED):
            raise ValueError("averages of other figures")
        self.first_area = None if first_area is None else _number(first_area)
        self.since = None if since is None else _count(since)
        self.averages = averages
        self.seen = seen
        self.standing = standing
        self.confirmed = confirmed


def looked_at(base: Results | None, now: Results, tau: float) -> dict[str, str | None]:
    """What an evaluation says of the adapter beside the base's own figures, None where all is well
    or there are too few images to tell. tau: the KL target in nat per token.
    """
    return {"greedy_area": _grown(base, now), "forgetting": _forgotten(base, now, tau)}


def _forgotten(base: Results | None, now: Results, tau: float) -> str | None:
    """Free answers that are no longer the base's: the KL over KL_LIMIT times its target, as for
    boxes; descriptions of half or double the length; more or fewer yes by FREE_YES.
    """
    found = []
    if "free_kl" in now.marks and now.estimate("free_kl").low > KL_LIMIT * tau:
        found.append(
            f"free descriptions are {now.values['free_kl']:.2g} nat per token from the base's "
            f"(limit {KL_LIMIT * tau:.2g})"
        )
    if base is not None and _differ(base, now, "free_length"):
        before = base.values["free_length"]
        after = now.values["free_length"]
        if not before / FREE_LENGTH < after < before * FREE_LENGTH:
            found.append(f"they have {after:.0f} tokens instead of {before:.0f}")
    if base is not None and _differ(base, now, "free_yes"):
        before = base.values["free_yes"]
        after = now.values["free_yes"]
        if abs(after - before) > FREE_YES:
            found.append(f"fixed questions get {after:.0%} yes instead of {before:.0%}")
    return f"{'; '.join(found)}; lower train.lr or raise update.beta_min" if found else None


def _differ(base: Results, now: Results, name: str) -> bool:
    gain = paired_gain(base, now, name)
    return gain.low > 0 or gain.high < 0


def _grown(base: Results | None, now: Results) -> str | None:
    """Greedy boxes that grow: against the truth where it is known, else the base's own. Growing
    towards the truth is none.
    """
    known = base is not None and "greedy_area_ratio" in base.marks
    name = "greedy_area_ratio" if known else "own_area"
    gain = paired_gain(base, now, name)
    if base is None or not gain.low > 0:
        return None
    before = base.values[name]
    after = now.values[name]
    if after < GREEDY_GROWTH * before or (known and after < GREEDY_GROWTH):
        return None
    of = "times the truth" if known else "of the image"
    return (
        f"greedy boxes grew from {before:.3g} to {after:.3g} {of}; the reward is being paid for "
        "size; raise reward.w_area or lower train.lr"
    )


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
