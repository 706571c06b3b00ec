"""Results of an evaluation with what is needed to say how certain they are: a figure is a ratio of
two sums over scenes, each scene's share kept.

A mean is a ratio whose bottom counts; precision, area ratio and the like are ratios as they stand.
Scenes are what is drawn, so scenes are what the bootstrap resamples: objects of one scene stay
together, and two arms that saw the same scenes are resampled together (paired). Left out: where the
numbers come from (held_out.py), what they are called (titles.py), how they look (report/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from vise_fast.system.randomness import generator

RESAMPLES = 2000
LEVEL = 0.95
FEW = 20
"""Images below which nothing is concluded. From so few the 95 % interval of a skewed figure holds
the truth less often than it says: tests/evaluate/test_results.py measures how often.
"""
TOO_FEW = "too few to tell"

Mark = tuple[np.ndarray, np.ndarray]
"""A figure's (tops, bottoms), float64, one entry per scene."""
Marks = dict[str, Mark]
"""Figure -> mark."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval; nan where there is nothing to estimate from. From
    fewer than FEW images the interval is everything, from -inf to inf, so that nobody concludes
    anything from it.
    """

    value: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether there is an interval to conclude from."""
        return bool(np.isfinite([self.low, self.high]).all())

    def interval(self, style: str = "+.3f") -> str:
        """'95 % +0.012 to +0.050', or that there are too few to tell."""
        if not self.told:
            return TOO_FEW
        return f"95 % {format(self.low, style)} to {format(self.high, style)}"


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


@dataclass
class Results:
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
        ratios = {name: _value(mark) for name, mark in self.marks.items()}
        return {name: value for name, value in ratios.items() if np.isfinite(value)} | self.plain

    def estimate(self, name: str) -> Estimate:
        """A figure of `marks` with its interval. Raises KeyError."""
        mark = self.marks[name]
        return _interval(_value(mark), _resampled(mark), _images(mark))

    def json(self) -> dict[str, Any]:
        """Everything, for evaluation.json; `read` is the inverse."""
        marks = {
            name: {"top": top.tolist(), "bottom": bottom.tolist()}
            for name, (top, bottom) in self.marks.items()
        }
        measured = {
            "n": self.n,
            "values": self.values,
            "plain": self.plain,
            "layers": self.layers,
            "marks": marks,
        }
        return measured | {"sha256": _sum_of(measured)}

    @classmethod
    def read(cls, content: dict[str, Any]) -> Results:
        """Raises KeyError, TypeError, ValueError, AttributeError or OverflowError for what `json`
        did not make.
        """
        measured = {name: value for name, value in content.items() if name != "sha256"}
        if content.get("sha256", _sum_of(measured)) != _sum_of(measured):
            raise ValueError("not what was measured")
        n = int(content["n"])
        marks = {name: _mark(mark, n) for name, mark in content["marks"].items()}
        plain = {name: float(value) for name, value in content["plain"].items()}
        layers = [float(share) for share in content["layers"]]
        if not np.isfinite([*plain.values(), *layers]).all():
            raise ValueError("not finite")
        return cls(n, marks, plain, layers)

    @classmethod
    def of(cls, evaluation: Mapping[str, Any], name: str) -> Results | None:
        """One arm of an evaluation.json; None where that evaluation was not made.

        Raises ValueError for something that `json` did not make.
        """
        if name not in evaluation:
            return None
        try:
            return cls.read(evaluation[name])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
            raise ValueError(f"no figures at '{name}'") from None


def _sum_of(measured: Mapping[str, Any]) -> str:
    """The sha256 of figures as JSON; a digit that changes on a disk is seen by it."""
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _mark(content: dict[str, Any], n: int) -> Mark:
    """Raises ValueError where it is not of `n` scenes, or not finite."""
    top = np.array(content["top"], float)
    bottom = np.array(content["bottom"], float)
    if top.shape != (n,) or bottom.shape != (n,):
        raise ValueError(f"not {n} scenes")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("not finite")
    return top, bottom


def join(parts: list[Marks]) -> Marks:
    """The marks of consecutive batches as one; figures missing from a batch count nothing there."""
    names: dict[str, None] = {}
    for part in parts:
        names |= dict.fromkeys(part)
    return {name: _joined(parts, name) for name in names}


def _joined(parts: list[Marks], name: str) -> Mark:
    """One figure of every batch, zeros where it is missing."""
    marks = []
    for part in parts:
        size = len(next(iter(part.values()))[0])
        marks.append(part.get(name, (np.zeros(size), np.zeros(size))))
    tops, bottoms = zip(*marks, strict=True)
    return np.concatenate(tops), np.concatenate(bottoms)


def difference(before: Results, after: Results, name: str) -> Estimate:
    """after - before of one figure, both resampled by the same scenes.

    Raises ValueError when they did not see the same number, KeyError for a figure that one of them
    has not.
    """
    if before.n != after.n:
        raise ValueError(f"{before.n} and {after.n} scenes cannot be paired")
    old = before.marks[name]
    new = after.marks[name]
    images = min(_images(old), _images(new))
    return _interval(_value(new) - _value(old), _resampled(new) - _resampled(old), images)


def paired_gain(before: Results | None, after: Results | None, name: str) -> Estimate:
    """`difference` where both arms measured the figure on the same scenes, else NOTHING."""
    if before is None or after is None or before.n != after.n:
        return NOTHING
    if name not in before.marks or name not in after.marks:
        return NOTHING
    return difference(before, after, name)


@lru_cache(maxsize=4)
def _weights(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each scene is drawn in each resample; the same for everybody, hence
    paired.
    """
    draw = generator(0, 0, "bootstrap", n)
    return draw.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)


def _value(mark: Mark) -> float:
    """nan where there is nothing to count."""
    tops, bottoms = mark
    return float(_ratio(tops.sum(), bottoms.sum()))


def _resampled(mark: Mark) -> np.ndarray:
    """(RESAMPLES,): the figure in each resample."""
    tops, bottoms = mark
    weights = _weights(len(tops))
    return _ratio(weights @ tops, weights @ bottoms)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(top, bottom)


def _images(mark: Mark) -> int:
    """How many images have anything to say of a figure."""
    return int(np.count_nonzero(mark[1]))


def _interval(value: float, resampled: np.ndarray, images: int) -> Estimate:
    """Percentile interval over the resamples in which the figure exists; everything where too few
    images have it.
    """
    known = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or not len(known):
        return NOTHING
    if images < FEW:
        return Estimate(value, -np.inf, np.inf)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
