"""Evaluations between updates (`eval.every`): which are due, the best adapter so far
(`eval.keep_best`), and when to stop (`eval.patience`).

Every rank knows the same: rank 0 measures and tells the figures. What a checkpoint carries
(`state`, `tensors`) is all that a resumed run needs to choose as the undisturbed one would. Left
out: what is measured (evaluate/), where it is written (directory.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vise_fast.config.schema import EvalConfig
from vise_fast.evaluate.results import Estimate, Results
from vise_fast.evaluate.titles import BRIEF, ENTRIES
from vise_fast.system.errors import ConfigError

WIDTH = 80
PREFIX = "held_out/"
"""Of its figures in metrics.jsonl."""
NOT_THE_FIGURES = {"every", "patience", "batch", "attention", "describe"}
"""Settings of `eval` that change no figure by which adapters are compared."""


@dataclass(frozen=True)
class Best:
    """An adapter and the figure by which it is the best so far."""

    step: int
    value: float
    adapter: dict[str, Tensor]


class Seen(NamedTuple):
    """What rank 0 tells of an evaluation: its figures, and what each alarm says of them."""

    values: dict[str, float]
    alarms: dict[str, str | None]


class Interim:
    """What the evaluations said so far. last: the step of the latest (0: none yet); without: how
    many came since the best.
    """

    def __init__(self, settings: EvalConfig) -> None:
        self.settings = settings
        self.last = 0
        self.without = 0
        self.best: Best | None = None

    def due(self, done: int, steps: int) -> bool:
        """Whether an evaluation comes after update `done` of `steps`; the last one has its own."""
        every = self.settings.every
        return every > 0 and done > self.last and (done % every == 0 or done == steps)

    @property
    def over(self) -> bool:
        """Whether the patience is at its end."""
        return 0 < self.settings.patience <= self.without

    def take(
        self, step: int, values: Mapping[str, float], adapter: Callable[[], dict[str, Tensor]]
    ) -> None:
        """The figures after an update; a new best keeps a copy of what `adapter` gives. Equal is no
        new best, and a figure that could not be measured never is.
        """
        self.last = step
        name = self.settings.keep_best
        if name is None:
            return
        value = values.get(name)
        if value is not None and self._beats(value, ENTRIES[name].better):
            self.best = Best(step, value, adapter())
            self.without = 0
        else:
            self.without += 1

    def _beats(self, value: float, better: int) -> bool:
        return self.best is None or better * value > better * self.best.value

    # ---- checkpoints ---------------------------------------------------------------------------

    @property
    def basis(self) -> dict[str, Any]:
        """The settings under which the best is the best."""
        return self.settings.model_dump(mode="json", exclude=NOT_THE_FIGURES)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; `load` is the inverse."""
        best = None
        if self.best is not None:
            best = {"step": self.best.step, "value": self.best.value}
        return {"last": self.last, "without": self.without, "best": best, "basis": self.basis}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: the best adapter, where there is one."""
        return {} if self.best is None else {"best": self.best.adapter}

    def load(
        self, state: Mapping[str, Any], stored: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> str | None:
        """What `state` and `tensors` gave; like: tensors of the adapter's shapes. Returns what a
        person should know: the best is forgotten where figures are taken otherwise now.

        Raises KeyError, TypeError, ValueError or AttributeError for what they did not give.
        """
        last = _count(state["last"])
        without = _count(state["without"])
        best = state["best"]
        known = None
        if best is not None:
            known = Best(_count(best["step"]), _number(best["value"]), _checked(stored, like))
        self.last = last
        if self.settings.keep_best is None or known is None:
            return None
        if state["basis"] != self.basis:
            return (
                f"the best adapter so far (step {known.step}) was chosen by other settings of "
                "eval; it is forgotten, and chosen anew from here on"
            )
        self.without = without
        self.best = known
        return None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("no count")
    return value


def _number(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError("not finite")
    return float(value)


def _checked(stored: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raises ValueError for an adapter of another model, or one that is not finite."""
    if {name: t.shape for name, t in stored.items()} != {n: t.shape for n, t in like.items()}:
        raise ValueError("the best adapter has other tensors")
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in stored.values()):
        raise ValueError("the best adapter is not finite")
    return dict(stored)


def copied(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """A copy of an adapter in the machine's memory, not the device's."""
    return {name: p.detach().cpu().clone() for name, p in parameters.items()}


# ---- the figure ----------------------------------------------------------------------------------


def check(settings: EvalConfig) -> None:
    """Raises ConfigError where `eval.keep_best` is no figure, or one that has no better side."""
    name = settings.keep_best
    if name is None or (name in ENTRIES and ENTRIES[name].better != 0):
        return
    sided = ", ".join(known for known in BRIEF if ENTRIES[known].better != 0)
    why = "is to be read, not to be raised" if name in ENTRIES else "is no figure of the evaluation"
    raise ConfigError(f"eval.keep_best {name} {why}; take one of {sided}")


def check_measured(settings: EvalConfig, base: Results) -> None:
    """Raises ConfigError where the base's evaluation could not have `eval.keep_best`."""
    name = settings.keep_best
    known = base.marks.keys() | base.plain.keys()
    if name is None or name in known:
        return
    sided = ", ".join(entry for entry in BRIEF if entry in known and ENTRIES[entry].better != 0)
    raise ConfigError(
        f"eval.keep_best {name} is not measured on these images; it would choose nothing; take "
        f"one of {sided or 'none: there is no held-out image'}"
    )


# ---- lines ---------------------------------------------------------------------------------------


def record(step: int, results: Results, seconds: float) -> dict[str, Any]:
    """An evaluation as a line of metrics.jsonl: `held_out/NAME`, and the ends of its 95 % interval
    for the figures of the short table.
    """
    line: dict[str, Any] = {"step": step, f"{PREFIX}images": results.n}
    line[f"{PREFIX}seconds"] = seconds
    for name, value in results.values.items():
        line[PREFIX + name] = value
        if name in BRIEF and name in results.marks:
            line |= _ends(PREFIX + name, results.estimate(name))
    return line


def _ends(key: str, estimate: Estimate) -> dict[str, float]:
    """Of an interval; nothing where there are too few images to tell."""
    return {f"{key}/low": estimate.low, f"{key}/high": estimate.high} if estimate.told else {}


def said(step: int, base: Results | None, results: Results, settings: EvalConfig) -> str:
    """An evaluation in one line, with as many figures as fit into WIDTH columns."""
    names = [settings.keep_best, "sampled_iou", "invariance", "own_TU"]
    before = {} if base is None else base.values
    line = f"held out, step {step}:"
    for name in dict.fromkeys(names):
        if name not in results.values:
            continue
        from_base = f" (base {before[name]:.3f})" if name in before else ""
        more = f" {name} {results.values[name]:.3f}{from_base}"
        if len(line + more) > WIDTH and line[-1] != ":":
            break
        line += more
    return line if line[-1] != ":" else f"{line} nothing could be measured"
