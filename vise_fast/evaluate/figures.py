"""Figures of an evaluation with what is needed to say how certain they are: a ratio of two sums
over scenes, each scene's share kept.

A mean is a ratio whose bottom counts; precision, area ratio and the like are ratios as they stand.
Scenes are what is drawn, so scenes are what the bootstrap resamples: objects of one scene stay
together, and two arms that saw the same scenes are resampled together (paired). Left out: where the
numbers come from (evaluate.py), how they look (report.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from vise_fast.system.randomness import generator

RESAMPLES = 2000
LEVEL = 0.95

Marks = dict[str, tuple[np.ndarray, np.ndarray]]
"""Figure -> (tops, bottoms), float64, one entry per scene."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval; nan where there is nothing to estimate from."""

    value: float
    low: float
    high: float


@dataclass
class Figures:
    """All figures of one arm over `n` scenes. `marks`: with intervals; `plain`: single numbers;
    `layers`: one number per decoder layer.
    """

    n: int = 0
    marks: Marks = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)
    layers: list[float] = field(default_factory=list)

    @property
    def values(self) -> dict[str, float]:
        """Every figure that could be measured, as a plain float."""
        found = {
            name: _ratio(top.sum(), bottom.sum()) for name, (top, bottom) in self.marks.items()
        }
        return {
            name: float(value) for name, value in found.items() if np.isfinite(value)
        } | self.plain

    def estimate(self, name: str) -> Estimate:
        """A figure of `marks` with its interval. Raises KeyError."""
        tops, bottoms = self.marks[name]
        return _estimate(
            _ratio(tops.sum(), bottoms.sum()),
            _ratio(_weights(len(tops)) @ tops, _weights(len(tops)) @ bottoms),
        )

    def json(self) -> dict[str, Any]:
        """Everything, for evaluation.json; `read` is the inverse."""
        marks = {
            name: {"top": top.tolist(), "bottom": bottom.tolist()}
            for name, (top, bottom) in self.marks.items()
        }
        return {
            "n": self.n,
            "values": self.values,
            "plain": self.plain,
            "layers": self.layers,
            "marks": marks,
        }

    @classmethod
    def read(cls, content: dict[str, Any]) -> Figures:
        """Raises KeyError or TypeError for something that `json` did not make."""
        marks = {
            name: (np.array(mark["top"], float), np.array(mark["bottom"], float))
            for name, mark in content["marks"].items()
        }
        return cls(int(content["n"]), marks, dict(content["plain"]), list(content["layers"]))


def join(parts: list[Marks]) -> Marks:
    """The marks of consecutive batches as one; figures missing from a batch count nothing there."""
    sizes = [len(next(iter(part.values()))[0]) for part in parts]
    absent = [(np.zeros(size), np.zeros(size)) for size in sizes]
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: tuple(
            np.concatenate(
                [part.get(name, empty)[side] for part, empty in zip(parts, absent, strict=True)]
            )
            for side in (0, 1)
        )
        for name in names
    }


def difference(before: Figures, after: Figures, name: str) -> Estimate:
    """after - before of one figure, both resampled by the same scenes.

    Raises ValueError when they did not see the same number.
    """
    if before.n != after.n:
        raise ValueError(f"{before.n} and {after.n} scenes cannot be paired")
    (top0, bottom0) = before.marks[name]
    (top1, bottom1) = after.marks[name]
    weights = _weights(len(top0))
    value = _ratio(top1.sum(), bottom1.sum()) - _ratio(top0.sum(), bottom0.sum())
    return _estimate(
        value, _ratio(weights @ top1, weights @ bottom1) - _ratio(weights @ top0, weights @ bottom0)
    )


@lru_cache(maxsize=4)
def _weights(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each scene is drawn in each resample; the same for everybody, hence
    paired.
    """
    return (
        generator(0, 0, "bootstrap", n)
        .multinomial(n, np.full(n, 1 / n), RESAMPLES)
        .astype(np.float64)
    )


def _ratio(top, bottom):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.float64(top) / np.float64(bottom)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    """Percentile interval over the resamples in which the figure exists."""
    known = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
