"""A run read back from its directory: configuration, environment, metrics, samples, evaluation.
What the report is made from.

A run that is still going on, or that ended early, reads as far as it got. Left out: judging it
(diagnosis.py), showing it (page.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vise_fast.config import schema as configuration
from vise_fast.config.schema import Config
from vise_fast.evaluate import strengths
from vise_fast.evaluate.results import Results
from vise_fast.system import files
from vise_fast.system.console import read_lines
from vise_fast.system.errors import DataError

LAST_STEP = 2**53
"""Larger numbers are no steps."""
EVALUATIONS = "evaluations.jsonl"
"""The evaluations between updates: a line each, of its step and what evaluation.json would hold."""


@dataclass(frozen=True)
class Chosen:
    """Which of its adapters a run exported: the best by `figure`, after `step` of the `last` ones
    that it made; patience: whether it ended there because none was better for so long.
    """

    figure: str
    step: int
    value: float
    last: int
    patience: bool


@dataclass(frozen=True)
class StoredRun:
    """`metrics`: one dict per step, at least one; `samples`: the lines of samples.jsonl; `before`,
    `after`: None where that evaluation was not made; `strengths`: results by share of the update,
    {} where `evaluate --alphas` was not run; `course`: of the evaluations between updates, by step;
    `chosen`: None where the last adapter is the one.
    """

    directory: Path
    config: Config
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    before: Results | None
    after: Results | None
    strengths: dict[float, Results]
    course: dict[int, Results] = field(default_factory=dict)
    chosen: Chosen | None = None

    @property
    def finished(self) -> bool:
        """Whether it came to its end: the adapter was measured, or every step is done."""
        return self.after is not None or self.steps >= self.config.train.steps

    @property
    def adapter(self) -> Path | None:
        """Where its adapter lies; None where it has not been exported."""
        place = self.directory / "adapter"
        return place if (place / "adapter_config.json").is_file() else None

    @property
    def command(self) -> list[str]:
        """The words it was started with, as env.json keeps them; [] where it does not."""
        words = self.environment.get("argv")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return []
        return words[1:] if words[:1] == ["train"] else words

    def bad_files(self) -> dict[str, str]:
        """{name: reason} of the pictures that could not be used."""
        lines = read_lines(self.directory / "bad_images.jsonl")
        return {str(line.get("name")): str(line.get("reason")) for line in lines}

    @property
    def steps(self) -> int:
        """The last step that was finished."""
        return int(self.metrics[-1]["step"])

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric where it is a number; two empty arrays where it never is."""
        known = [m for m in self.metrics if _is_number(m.get(name))]
        steps = np.array([m["step"] for m in known], np.int64)
        values = np.array([m[name] for m in known], float)
        return steps, values

    def phases(self) -> dict[str, float]:
        """Seconds per step of each phase, mean over the steps that recorded it."""
        seconds: dict[str, list[float]] = {}
        for m in self.metrics:
            phases = m.get("phases")
            for name, value in phases.items() if isinstance(phases, dict) else ():
                if _is_number(value):
                    seconds.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in seconds.items()}

    def of_ranks(self, name: str) -> np.ndarray:
        """(steps, ranks): a figure of each rank, over the steps that as many ranks did as the last
        one; (0, 0) where one process did it.
        """
        rows = [m["ranks"].get(name) for m in self.metrics if isinstance(m.get("ranks"), dict)]
        whole = [row for row in rows if isinstance(row, list) and all(map(_is_number, row))]
        alike = [row for row in whole if row and len(row) == len(whole[-1])]
        return np.array(alike, float) if alike else np.empty((0, 0))

    def alarms(self) -> dict[str, list[int]]:
        """The steps at which each alarm was on."""
        found: dict[str, list[int]] = {}
        for m in self.metrics:
            alarms = m.get("alarms")
            for name in alarms if isinstance(alarms, list) else ():
                found.setdefault(str(name), []).append(int(m["step"]))
        return found

    def shown_samples(self) -> dict[str, list[dict[str, Any]]]:
        """The samples of the first, the middle and the last step that left some, by title; fewer
        when there are fewer.
        """
        steps = sorted({sample["step"] for sample in self.samples})
        if not steps:
            return {}
        middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
        return {f"Step {step}": self._samples_of(step) for step in (steps[0], middle, steps[-1])}

    def _samples_of(self, step: int) -> list[dict[str, Any]]:
        return [sample for sample in self.samples if sample["step"] == step]


def read(directory: Path) -> StoredRun:
    """Raises DataError for a directory that holds no run, and for files of it that are damaged."""
    numbered = _numbered(directory / "metrics.jsonl")
    metrics = [line for line in numbered if not is_evaluation(line)]
    if not directory.exists():
        raise DataError(
            f"{directory} is not there; a run is the directory that a training made (its run.dir); "
            "name one"
        )
    if not metrics:
        raise DataError(
            f"{directory} holds no run: no step in {directory / 'metrics.jsonl'}; give the "
            "directory that a training made"
        )
    file = directory / "config.yaml"
    evaluation = _json(directory / "evaluation.json")
    return StoredRun(
        directory,
        config=configuration.load(file if file.exists() else None, plugins=False),
        environment=_json(directory / "env.json"),
        metrics=metrics,
        samples=_numbered(directory / "samples.jsonl"),
        before=_figures(evaluation, "before", directory),
        after=_figures(evaluation, "after", directory),
        strengths=_strengths(directory / strengths.FILE),
        course=evaluations(directory, _refuse),
        chosen=_chosen(evaluation, directory),
    )


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is of an evaluation between updates, not of an update."""
    return "held_out/images" in line


def evaluations(directory: Path, say: Callable[[str], None]) -> dict[int, Results]:
    """What the evaluations between updates measured, by step, in their order; say: is told of a
    line that holds something else.
    """
    path = directory / EVALUATIONS
    found = {}
    for line in _numbered(path):
        step = line.pop("step")
        try:
            found[step] = Results.read(line)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            say(f"{path} is damaged at step {step}")
    return dict(sorted(found.items()))


def _numbered(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that say which step they belong to."""
    return [line for line in read_lines(path) if _is_step(line.get("step"))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAST_STEP


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    return files.read_json(path, _refuse) or {}


def _refuse(text: str) -> NoReturn:
    raise DataError(f"{text}; it is what the report shows; delete it and write the report again")


def _figures(evaluation: dict[str, Any], name: str, directory: Path) -> Results | None:
    try:
        return Results.of(evaluation, name)
    except ValueError as fault:
        raise DataError(
            f"{directory / 'evaluation.json'} is damaged: {fault}; delete it and write the report "
            "again"
        ) from None


def _chosen(evaluation: dict[str, Any], directory: Path) -> Chosen | None:
    said = evaluation.get("best")
    if said is None:
        return None
    kinds = {"figure": str, "step": int, "value": float, "last": int, "patience": bool}
    if not isinstance(said, dict) or {key: type(value) for key, value in said.items()} != kinds:
        _refuse(f"{directory / 'evaluation.json'} is damaged: no adapter is named at 'best'")
    return Chosen(**said)


def _strengths(path: Path) -> dict[float, Results]:
    try:
        return strengths.read(_json(path))
    except ValueError as fault:
        raise DataError(
            f"{path} is damaged: {fault}; delete it and write the report again"
        ) from None
