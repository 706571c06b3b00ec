"""The page that shows a run: `write(directory)` makes report.html and plots/*.png in it.

The page stands alone (pictures, curves and style inside, no scripts, nothing fetched) and follows
the reader's light or dark setting. Everything a model wrote is escaped by the template engine. Left
out: reading (stored_run.py), judging (diagnosis.py), curves (plots.py), sample pictures
(samples.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from vise_fast import __version__
from vise_fast.config import schema as configuration
from vise_fast.evaluate.results import Estimate, Results, paired_gain
from vise_fast.evaluate.titles import ENTRIES, GROUPS, Entry
from vise_fast.report.diagnosis import diagnose
from vise_fast.report.plots import Plot, draw
from vise_fast.report.samples import Sample, samples
from vise_fast.report.stored_run import StoredRun, read
from vise_fast.system import files
from vise_fast.system.console import duration

HERE = Path(__file__).parent
TILES = (
    "sampled_iou",
    "greedy_iou",
    "sampled_area_ratio",
    "visible_accuracy",
    "invariance",
    "attention_share",
    "own_TU",
    "own_area",
    "own_parse_rate",
    "distinct_queries",
)
TILE_COUNT = 6
REMEDY = "free space or make the run's folder writable"
PERCENTAGES = ("attention_share", "own_area", "own_area_large", "greedy_area", "sampled_area")


@dataclass(frozen=True)
class Row:
    """One figure before and after.

    `gain` and its interval are nan where the two cannot be paired.
    """

    name: str
    entry: Entry
    before: float | None
    after: float | None
    gain: Estimate

    @property
    def paired(self) -> bool:
        """Whether there is a gain."""
        return bool(np.isfinite(self.gain.value))

    @property
    def tone(self) -> str:
        """good or bad where the interval excludes zero and a direction is better, else even."""
        sign = (self.gain.low > 0) - (self.gain.high < 0)
        return {1: "good", -1: "bad", 0: "even"}[sign * self.entry.better]

    @property
    def format(self) -> str:
        """How the figure is written: attention and areas as percentages."""
        return "percent" if self.name in PERCENTAGES else "plain"


@dataclass(frozen=True)
class Group:
    """Rows under one title; `reach` is the half-width of their interval plots."""

    title: str
    rows: list[Row]
    reach: float


def write(directory: Path) -> Path:
    """Writes report.html and plots/ into a run; returns the page.

    Raises DataError for what is no run, EnvironmentFault where disk refuses.
    """
    run = read(directory)
    shown = samples(run)
    plots = draw(run)
    page = render(run, plots, shown)
    for plot in plots:
        files.write(directory / "plots" / f"{plot.name}.png", plot.png, REMEDY)
    files.write(directory / "report.html", page, REMEDY)
    return directory / "report.html"


def render(run: StoredRun, plots: list[Plot], shown: Mapping[str, list[Sample]]) -> str:
    """The page as text; `shown`: title -> samples."""
    rows = {name: row for name in ENTRIES if (row := _row(run, name)) is not None}
    return _template().render(
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        run=run,
        version=__version__,
        diagnosis=diagnose(run),
        facts=_facts(run),
        tiles=[rows[name] for name in TILES if name in rows][:TILE_COUNT],
        groups=_groups(rows),
        plots={plot.name: plot for plot in plots},
        samples=shown,
        alarms=run.alarms(),
        settings=configuration.to_yaml(run.config),
        environment=_single_values(run.environment),
    )


@functools.cache
def _template() -> jinja2.Template:
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"number": _number, "signed": _signed, "svg": lambda plot: Markup(plot.svg)}
    return engine.get_template("report.html")


def _single_values(environment: Mapping[str, object]) -> dict[str, object]:
    """What fits on a line each."""
    return {
        name: value for name, value in environment.items() if not isinstance(value, (dict, list))
    }


def _row(run: StoredRun, name: str) -> Row | None:
    """None where neither arm measured the figure."""
    before = _value(run.before, name)
    after = _value(run.after, name)
    if before is None and after is None:
        return None
    return Row(name, ENTRIES[name], before, after, paired_gain(run.before, run.after, name))


def _value(arm: Results | None, name: str) -> float | None:
    return None if arm is None else arm.values.get(name)


def _groups(rows: dict[str, Row]) -> list[Group]:
    """The groups of titles.py that have rows."""
    found = []
    for title, entries in GROUPS.items():
        group = [rows[name] for name in entries if name in rows]
        if group:
            found.append(Group(title, group, _reach(group)))
    return found


def _reach(rows: list[Row]) -> float:
    ends = [0.02]
    for row in rows:
        if row.paired:
            ends += [abs(row.gain.low), abs(row.gain.high)]
    return max(ends) * 1.06


def _facts(run: StoredRun) -> dict[str, str]:
    """The run in a few words."""
    config = run.config
    reward = "" if config.reward.name == "vise" else f", reward {config.reward.name}"
    facts = {
        "model": config.model.path,
        "preset": config.reward.preset + reward,
        "updates": (
            f"{run.steps} of {config.train.batch} images, {config.rollout.samples} boxes each"
        ),
        "learning rate": f"{config.train.lr:g}",
        "seed": str(config.train.seed),
        "data": config.data.places,
    }
    _, seconds = run.series("seconds")
    if len(seconds):
        facts["training time"] = duration(float(seconds.sum()))
    if "device" in run.environment:
        facts["device"] = str(run.environment["device"])
    if run.before:
        facts["held out"] = f"{run.before.n} images"
    return facts


def _number(value: float | None, kind: str = "plain") -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if kind == "percent" else f"{value:.3f}"


def _signed(value: float, kind: str = "plain") -> str:
    """With a real minus sign, and none on zero."""
    text = f"{100 * value:+.1f}" if kind == "percent" else f"{value:+.3f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]
