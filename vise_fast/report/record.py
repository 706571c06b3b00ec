"""A run read back from its directory: configuration, environment, metrics, sample cards,
evaluation. What the report is made from.

A run that is still going on, or that ended early, reads as far as it got. Left out: judging it
(diagnosis.py), showing it (report.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vise_fast.config import schema as configuration
from vise_fast.config.schema import Config
from vise_fast.evaluate.figures import Figures
from vise_fast.system.console import read_lines
from vise_fast.system.errors import DataError


@dataclass(frozen=True)
class Record:
    """`metrics`: one dict per step, at least one; `before`, `after`: None where that evaluation was
    not made.
    """

    directory: Path
    config: Config
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    before: Figures | None
    after: Figures | None

    @property
    def steps(self) -> int:
        return int(self.metrics[-1].get("step", len(self.metrics)))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric where it is a number; two empty arrays where it never is."""
        pairs = [
            (m["step"], m[name])
            for m in self.metrics
            if isinstance(m.get(name), (int, float)) and isinstance(m.get("step"), int)
        ]
        return np.array([step for step, _ in pairs], int), np.array(
            [value for _, value in pairs], float
        )

    def phases(self) -> dict[str, float]:
        """Seconds per step of each phase, mean over the steps that recorded it."""
        names = dict.fromkeys(name for m in self.metrics for name in m.get("phases") or {})
        return {
            name: float(
                np.mean(
                    [m["phases"][name] for m in self.metrics if name in (m.get("phases") or {})]
                )
            )
            for name in names
        }

    def alarms(self) -> dict[str, list[int]]:
        """The steps at which each alarm was on."""
        found: dict[str, list[int]] = {}
        for m in self.metrics:
            for name in m.get("alarms") or []:
                found.setdefault(str(name), []).append(int(m["step"]))
        return found

    def shown_samples(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(title, cards) of the first, the middle and the last step that left cards; fewer when
        there are fewer.
        """
        steps = sorted({card["step"] for card in self.samples})
        if not steps:
            return []
        middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
        chosen = dict.fromkeys([steps[0], middle, steps[-1]])
        return [
            (f"Step {step}", [card for card in self.samples if card["step"] == step])
            for step in chosen
        ]


def read(directory: Path) -> Record:
    """Raises DataError for a directory that holds no run, and for files of it that are damaged."""
    metrics = [m for m in read_lines(directory / "metrics.jsonl") if isinstance(m.get("step"), int)]
    if not metrics:
        raise DataError(
            f"{directory} holds no run: no step in {directory / 'metrics.jsonl'}; give the "
            "directory that a training made"
        )
    file = directory / "config.yaml"
    evaluation = _json(directory / "evaluation.json")
    cards = [
        card
        for card in read_lines(directory / "samples.jsonl")
        if isinstance(card.get("step"), int)
    ]
    return Record(
        directory,
        configuration.load(file if file.exists() else None),
        _json(directory / "env.json"),
        metrics,
        cards,
        _figures(evaluation, "before", directory),
        _figures(evaluation, "after", directory),
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} cannot be read; it is not the JSON object a run writes; delete it and write "
            "the report again"
        )
    return content


def _figures(evaluation: dict[str, Any], name: str, directory: Path) -> Figures | None:
    try:
        return Figures.read(evaluation[name]) if name in evaluation else None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{directory / 'evaluation.json'} is damaged at '{name}'; no figures there; delete it "
            "and write the report again"
        ) from None
