"""Figures over alpha: the same held-out images with a share of the adapter's update.

Alpha 0 is the base, 1 the adapter as trained, beyond 1 further than training went; `export --alpha`
makes an adapter of any of them. The up factors are scaled in place, so there is no second copy of a
model, and laid back as they were. Left out: how it looks (report/plots.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate.held_out import held_out
from vise_fast.evaluate.results import Results
from vise_fast.images.sources import Source
from vise_fast.model.load import Policy
from vise_fast.system.errors import ConfigError

FILE = "strengths.json"
"""In a run; the report draws it."""
UP = ".lora_B."
FURTHEST = 4.0


def parsed(words: str) -> list[float]:
    """Alphas as written with commas between them, sorted. Raises ConfigError."""
    try:
        found = sorted({float(word) for word in words.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 <= alpha <= FURTHEST for alpha in found):
        raise ConfigError(
            f"--alphas {words} are no numbers from 0 to {FURTHEST:g}; 0 is the base and 1 the "
            "adapter; write --alphas 0,0.5,1"
        )
    return found


@contextlib.contextmanager
def strength(policy: Policy, alpha: float) -> Iterator[None]:
    """Inside, the adapter's update counts `alpha` times; afterwards once, to the bit."""
    ups = {name: factor for name, factor in policy.parameters().items() if UP in name}
    kept = {name: factor.detach().clone() for name, factor in ups.items()}
    try:
        with torch.no_grad():
            for factor in ups.values():
                factor.mul_(alpha)
        policy.backbone.refresh()
        yield
    finally:
        with torch.no_grad():
            for name, factor in ups.items():
                factor.copy_(kept[name])
        policy.backbone.refresh()


def measure(
    policy: Policy, engine: Engine, source: Source, config: Config, alphas: Sequence[float]
) -> Iterator[tuple[float, Results]]:
    """(alpha, results) of each, as they are ready."""
    for alpha in alphas:
        with strength(policy, alpha):
            yield alpha, held_out(engine, source, config, adapters=alpha > 0)


def write_down(results: Mapping[float, Results]) -> dict[str, Any]:
    """For strengths.json; `read` is the inverse."""
    return {"strengths": [{"alpha": a} | found.json() for a, found in results.items()]}


def read(content: Mapping[str, Any]) -> dict[float, Results]:
    """Results by alpha, {} where none were measured. Raises ValueError for what `write_down` did
    not make.
    """
    rows = content.get("strengths", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("no list of strengths")
    found = {_alpha(row): _results(row) for row in rows}
    if len({results.n for results in found.values()}) > 1:
        raise ValueError("strengths of other images")
    return dict(sorted(found.items()))


def _alpha(row: Mapping[str, Any]) -> float:
    alpha = row.get("alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError("a strength that is no number")
    return float(alpha)


def _results(row: Mapping[str, Any]) -> Results:
    measured = {name: value for name, value in row.items() if name != "alpha"}
    found = Results.of({"row": measured}, "row")
    if found is None:
        raise ValueError("no figures")
    return found


def cells(results: Mapping[float, Results], name: str) -> Iterator[str]:
    """One figure at every alpha, as a table shows it."""
    for found in results.values():
        yield f"{found.values[name]:.3f}" if name in found.values else "-"
