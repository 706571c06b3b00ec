"""Runs beside each other: held-out figures with paired intervals, curves on top of each other, and
what their settings differ in. Left out: the page (compare.html), the table on screen (compare.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from vise_fast import __version__
from vise_fast.config import settings
from vise_fast.evaluate.results import NOTHING, Estimate, Results, paired_gain
from vise_fast.evaluate.titles import BRIEF, ENTRIES, Entry
from vise_fast.report import page
from vise_fast.report.stored_run import StoredRun

if TYPE_CHECKING:
    from vise_fast.report.plots import Plot

SAME_IMAGES = (
    "eval.seed",
    "data.dir",
    "data.mix",
    "data.column",
    "data.holdout",
    "data.max_pixels",
    "data.min_pixels",
    "eval.labels",
)
"""Settings, and those of the scenes, that decide which images are held out and how they look."""
PLACES = ("run.dir", "train.resume")
"""Settings in which every two runs differ."""


@dataclass(frozen=True)
class Cell:
    """One figure of one run's adapter. `gain`: over its own base; `lead`: over the first run's
    adapter, on the same images; nan where they cannot be paired.
    """

    value: float | None
    gain: Estimate
    lead: Estimate


@dataclass(frozen=True)
class Line:
    """One figure of all runs, in their order."""

    entry: Entry
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """`names`: of the runs, told apart; `differences`: {setting: its value in each run}."""

    runs: list[StoredRun]
    names: list[str]
    lines: list[Line]
    differences: dict[str, list[str]]

    @property
    def paired(self) -> bool:
        """Whether any two runs were measured on the same images."""
        cells = [cell for line in self.lines for cell in line.cells]
        return any(np.isfinite(cell.lead.value) for cell in cells)


def compare(runs: Sequence[StoredRun]) -> Comparison:
    """Of two runs or more."""
    lines = []
    for name in BRIEF:
        cells = [_cell(runs[0], run, name) for run in runs]
        if any(cell.value is not None for cell in cells):
            lines.append(Line(ENTRIES[name], cells))
    return Comparison(list(runs), _names(runs), lines, _differences(runs))


def _cell(first: StoredRun, run: StoredRun, name: str) -> Cell:
    value = None if run.after is None else run.after.values.get(name)
    lead = NOTHING
    if run is not first and same_images(first, run):
        lead = paired_gain(first.after, run.after, name)
    return Cell(value, paired_gain(run.before, run.after, name), lead)


def same_images(first: StoredRun, other: StoredRun) -> bool:
    """Whether both were measured on the same held-out images, as far as their settings tell."""
    keys = [key for key, _ in settings.fields(type(first.config)) if key.startswith("scenes.")]
    return all(
        settings.get(first.config, key) == settings.get(other.config, key)
        for key in (*SAME_IMAGES, *keys)
    ) and _count(first.after) == _count(other.after)


def _count(arm: Results | None) -> int:
    return 0 if arm is None else arm.n


def _names(runs: Sequence[StoredRun]) -> list[str]:
    """The shortest ends of their paths that tell them apart."""
    places = [run.directory.absolute() for run in runs]
    for length in range(1, max(len(place.parts) for place in places) + 1):
        names = [str(Path(*place.parts[-length:])) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _differences(runs: Sequence[StoredRun]) -> dict[str, list[str]]:
    found = {}
    for key, _ in settings.fields(type(runs[0].config)):
        values = [settings.bare(settings.get(run.config, key)) for run in runs]
        if len(set(values)) > 1 and key not in PLACES:
            found[key] = values
    return found


def render(comparison: Comparison, plots: list[Plot]) -> str:
    """The page as text."""
    return (
        page.environment()
        .get_template("compare.html")
        .render(
            style=Markup((page.HERE / "report.css").read_text(encoding="utf-8")),
            version=__version__,
            shown=comparison,
            plots=plots,
        )
    )


def row(line: Line) -> list[str]:
    """A line of the table on screen."""
    return [line.entry.title, *(_cell_words(cell) for cell in line.cells)]


def _cell_words(cell: Cell) -> str:
    if cell.value is None:
        return "-"
    lead = cell.lead
    if not np.isfinite(lead.value):
        return f"{cell.value:.3f}"
    told = lead.interval().removeprefix("95 % ")
    return f"{cell.value:.3f} ({lead.value:+.3f}, {told})"


def destination(text: str | None) -> Path:
    """Where the page goes."""
    return Path(text or "compare.html")
