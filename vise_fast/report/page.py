"""The page that shows a run: `write(directory)` makes report.html and plots/*.png in it.

The page stands alone (pictures, curves and style inside, no scripts, nothing fetched) and follows
the reader's light or dark setting. Everything a model wrote is escaped by the template engine. Left
out: reading (stored_run.py), judging (diagnosis.py), curves (plots.py), sample pictures
(samples.py).
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from markupsafe import Markup

from vise_fast import __version__
from vise_fast.config import commands
from vise_fast.config import schema as configuration
from vise_fast.evaluate.results import Estimate, Results, paired_gain
from vise_fast.evaluate.titles import BRIEF, BY_CLASS, ENTRIES, GROUPS, Entry, entry, of_class
from vise_fast.evaluate.titles import classes as classes_of
from vise_fast.report.diagnosis import diagnose
from vise_fast.report.samples import samples, strip
from vise_fast.report.stored_run import StoredRun, read
from vise_fast.system import files
from vise_fast.system.console import duration

if TYPE_CHECKING:
    from vise_fast.report.plots import Plot

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
        """What the gain is."""
        return tone(self.gain, self.entry)

    @property
    def format(self) -> str:
        """How the figure is written: attention and areas as percentages."""
        return "percent" if self.name in PERCENTAGES else "plain"


def tone(gain: Estimate, entry: Entry) -> str:
    """good or bad where the interval excludes zero and a direction is better, else even."""
    sign = (gain.low > 0) - (gain.high < 0)
    return {1: "good", -1: "bad", 0: "even"}[sign * entry.better]


@dataclass(frozen=True)
class Group:
    """Rows under one title; `reach` is the half-width of their interval plots."""

    title: str
    rows: list[Row]
    reach: float


def silent(text: str) -> None:
    """Says nothing."""


def write(directory: Path, say: Callable[[str], None] = silent) -> Path:
    """Writes report.html and plots/ into a run; returns the page. say: takes what is missing.

    Raises DataError for what is no run, EnvironmentFault where disk refuses.
    """
    run = read(directory)
    plots = curves(run, say)
    page = render(run, plots)
    for plot in plots:
        files.write(directory / "plots" / f"{plot.name}.png", plot.png, REMEDY)
    files.write(directory / "report.html", page, REMEDY)
    return directory / "report.html"


def curves(run: StoredRun, say: Callable[[str], None]) -> list[Plot]:
    """The curves; none where matplotlib is missing or broken: it never ends a run."""
    try:
        from vise_fast.report.plots import draw
    except Exception as fault:  # a library that is half installed fails in any way
        say(
            f"the report has no curves: matplotlib cannot be imported ({fault}); pip install "
            f"matplotlib, then {commands.spoken('report')} {run.directory}"
        )
        return []
    return draw(run)


def render(run: StoredRun, plots: list[Plot], refresh: int = 0) -> str:
    """The page as text; refresh: seconds after which a reader's browser asks again, 0: never."""
    names = [*ENTRIES, *_of_classes(run)]
    rows = {name: row for name in names if (row := _row(run, name)) is not None}
    return (
        environment()
        .get_template("report.html")
        .render(
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            run=run,
            version=__version__,
            diagnosis=diagnose(run),
            facts=_facts(run),
            tiles=[rows[name] for name in TILES if name in rows][:TILE_COUNT],
            refresh=refresh,
            brief=_groups({name: rows[name] for name in BRIEF if name in rows}),
            groups=_groups(rows),
            commands=_commands(run),
            command=shlex.join(["vise-fast", "train", *run.command]),
            bad=run.bad_files(),
            strip=strip(run),
            plots={plot.name: plot for plot in plots},
            samples=samples(run),
            alarms=run.alarms(),
            settings=configuration.to_yaml(run.config),
            environment=_single_values(run.environment),
        )
    )


@functools.cache
def environment() -> jinja2.Environment:
    """The templates beside this file, and how they write figures. Every text is escaped."""
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {
        "number": _number,
        "signed": _signed,
        "svg": lambda plot: Markup(plot.svg),
        "tone": tone,
    }
    return engine


def _single_values(environment: Mapping[str, object]) -> dict[str, object]:
    """What fits on a line each."""
    return {
        name: value for name, value in environment.items() if not isinstance(value, (dict, list))
    }


def _row(run: StoredRun, name: str) -> Row | None:
    """None where neither arm measured the figure."""
    before = _value(run.before, name)
    after = _value(run.after, name)
    known = entry(name)
    if known is None or (before is None and after is None):
        return None
    return Row(name, known, before, after, paired_gain(run.before, run.after, name))


def _of_classes(run: StoredRun) -> list[str]:
    """The figures of each class of labelled pictures; none where nothing was labelled."""
    arm = run.before or run.after
    found = {} if arm is None else classes_of(arm.marks)
    return [name for each in found for name in of_class(each)]


def _value(arm: Results | None, name: str) -> float | None:
    return None if arm is None else arm.values.get(name)


def _groups(rows: dict[str, Row]) -> list[Group]:
    """The groups of titles.py that have rows."""
    found = []
    for title, entries in GROUPS.items():
        group = [rows[name] for name in entries if name in rows]
        if group:
            found.append(Group(title, group, _reach(group)))
    by_class = [row for name, row in rows.items() if ":" in name]
    return [*found, Group(BY_CLASS, by_class, _reach(by_class))] if by_class else found


def _reach(rows: list[Row]) -> float:
    ends = [0.02]
    for row in rows:
        if row.gain.told:
            ends += [abs(row.gain.low), abs(row.gain.high)]
    return max(ends) * 1.06


def _commands(run: StoredRun) -> dict[str, str]:
    """What one does next: label -> command."""
    place = str(run.directory)
    if run.adapter is None or not run.finished:
        return {
            "go on with it": shlex.join(["vise-fast", *_on(place)]),
            "watch it": shlex.join(["vise-fast", "report", place, "--live"]),
        }
    adapter = ["--adapter", str(run.adapter)]
    found = {
        "try it in a browser": ["demo", *adapter],
        "ask about one picture": ["infer", *adapter, "--image", "photo.jpg"],
        "measure it closer": ["evaluate", *adapter, "--scenes", "512"],
        "beside another run": ["compare", place, "OTHER_RUN"],
        "a model without PEFT": ["merge", *adapter, "--out", "merged"],
    }
    return {label: shlex.join(["vise-fast", *words]) for label, words in found.items()}


def _on(place: str) -> list[str]:
    return ["train", "--resume", "auto", "--run.dir", place]


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
    facts |= _ranks(run)
    if run.before:
        facts["held out"] = f"{run.before.n} images"
        things = run.before.marks.get("greedy_iou")
        if config.eval.labels is not None and things is not None:
            facts["labelled"] = f"{(things[1] > 0).sum()} of them, {things[1].sum():.0f} things"
    if run.adapter is not None:
        facts["adapter"] = str(run.adapter)
    if run.chosen is not None:
        facts["chosen"] = f"step {run.chosen.step}, the best by {run.chosen.figure}"
    if bad := run.bad_files():
        facts["unusable files"] = str(len(bad))
    return facts


def _ranks(run: StoredRun) -> dict[str, str]:
    """Of the processes that trained together; nothing where there was one."""
    rates = run.of_ranks("images_per_s")
    peaks = run.of_ranks("peak_gib")
    _, shares = run.series("communication_share")
    if not (len(rates) and len(peaks) and len(shares)):
        return {}
    slowest = int(rates.mean(0).argmin())
    return {
        "ranks": f"{rates.shape[1]}; the slowest is rank {slowest}",
        "images/s of each rank": ", ".join(f"{rate:.2f}" for rate in rates.mean(0)),
        "memory of each rank": ", ".join(f"{peak:.2f}" for peak in peaks.max(0)) + " GiB at most",
        "communication": f"{float(shares.mean()):.1%} of a step",
    }


def _number(value: float | None, kind: str = "plain") -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if kind == "percent" else f"{value:.3f}"


def _signed(value: float, kind: str = "plain") -> str:
    """With a real minus sign, and none on zero."""
    text = f"{100 * value:+.1f}" if kind == "percent" else f"{value:+.3f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]
