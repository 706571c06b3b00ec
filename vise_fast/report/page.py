"""One page that shows a training run: `python -m vise_fast.report RUN` writes RUN/report.html and
RUN/plots/*.png.

The page stands alone (pictures, curves and style inside, no scripts, nothing fetched) and follows
the reader's light or dark setting. Everything a model wrote is escaped by the template engine. Left
out: reading (record.py), judging (diagnosis.py), curves (plots.py), sample pictures (cards.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from vise_fast import __version__
from vise_fast.config import schema as configuration
from vise_fast.config.command_line import Syntax
from vise_fast.evaluate.figures import Estimate, difference
from vise_fast.evaluate.titles import ENTRIES, GROUPS, Entry
from vise_fast.report.cards import Card, cards
from vise_fast.report.diagnosis import diagnose
from vise_fast.report.plots import Plot, draw
from vise_fast.report.record import Record, read
from vise_fast.system.console import Console, duration
from vise_fast.system.errors import ConfigError, EnvironmentFault

HERE = Path(__file__).parent
NOTHING = Estimate(*[float("nan")] * 3)
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
        return bool(np.isfinite(self.gain.value))

    @property
    def tone(self) -> str:
        """good or bad where the interval excludes zero and a direction is better, else even."""
        sign = (self.gain.low > 0) - (self.gain.high < 0)
        return {1: "good", -1: "bad", 0: "even"}[sign * self.entry.better]

    @property
    def format(self) -> str:
        """How the figure is written: attention and areas as percentages."""
        return (
            "percent"
            if self.name
            in ("attention_share", "own_area", "own_area_large", "greedy_area", "sampled_area")
            else "plain"
        )


def write(directory: Path) -> Path:
    """Writes report.html and plots/ into a run; returns the page.

    Raises DataError for what is no run, EnvironmentFault where disk refuses.
    """
    record = read(directory)
    shown = cards(record)
    plots = draw(record)
    page = render(record, plots, shown)
    try:
        (directory / "plots").mkdir(exist_ok=True)
        for plot in plots:
            (directory / "plots" / f"{plot.name}.png").write_bytes(plot.png)
        (directory / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write the report of {directory}; {error.strerror or error}; free space or "
            "make it writable"
        ) from error
    return directory / "report.html"


def render(record: Record, plots: list[Plot], shown: list[tuple[str, list[Card]]]) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(HERE)
    engine = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"number": _number, "signed": _signed, "svg": lambda plot: Markup(plot.svg)}
    rows = {name: row for name in ENTRIES if (row := _row(record, name)) is not None}
    return engine.get_template("report.html").render(
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        record=record,
        version=__version__,
        diagnosis=diagnose(record),
        facts=_facts(record),
        tiles=[rows[name] for name in TILES if name in rows][:TILE_COUNT],
        groups=_groups(rows),
        plots={plot.name: plot for plot in plots},
        cards=shown,
        alarms=record.alarms(),
        settings=configuration.to_yaml(record.config),
        environment={
            name: value
            for name, value in record.environment.items()
            if not isinstance(value, (dict, list))
        },
    )


def _row(record: Record, name: str) -> Row | None:
    before, after = (arm.values.get(name) if arm else None for arm in (record.before, record.after))
    if before is None and after is None:
        return None
    both = (
        record.before
        and record.after
        and record.before.n == record.after.n
        and name in record.before.marks
        and name in record.after.marks
    )
    return Row(
        name,
        ENTRIES[name],
        before,
        after,
        difference(record.before, record.after, name) if both else NOTHING,
    )


def _groups(rows: dict[str, Row]) -> list[tuple[str, list[Row], float]]:
    """(title, rows, reach): `reach` is the half-width of the group's interval plots."""
    found = []
    for title, entries in GROUPS.items():
        group = [rows[name] for name in entries if name in rows]
        ends = [abs(end) for row in group if row.paired for end in (row.gain.low, row.gain.high)]
        if group:
            found.append((title, group, max([*ends, 0.02]) * 1.06))
    return found


def _facts(record: Record) -> dict[str, str]:
    """The run in a few words."""
    config = record.config
    seconds = record.series("seconds")[1]
    facts = {
        "model": config.model.path,
        "preset": config.reward.preset
        + ("" if config.reward.name == "vise" else f", reward {config.reward.name}"),
        "updates": (
            f"{record.steps} of {config.train.batch} images, {config.rollout.samples} boxes each"
        ),
        "learning rate": f"{config.train.lr:g}",
        "seed": str(config.train.seed),
        "data": config.data.dir or "drawn scenes",
    }
    if len(seconds):
        facts["training time"] = duration(float(seconds.sum()))
    if "device" in record.environment:
        facts["device"] = str(record.environment["device"])
    if record.before:
        facts["held out"] = f"{record.before.n} images"
    return facts


def _number(value: float | None, kind: str = "plain") -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if kind == "percent" else f"{value:.3f}"


def _signed(value: float, kind: str = "plain") -> str:
    """With a real minus sign, and none on zero."""
    text = f"{100 * value:+.1f}" if kind == "percent" else f"{value:+.3f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def main(words: Sequence[str]) -> int:
    """The command."""
    options = Syntax(positional=1).parse(words)
    console = Console()
    if options.help:
        console.say(__doc__)
        return 0
    if not options.positional:
        raise ConfigError(
            "which run? report reads a run directory and takes no settings; write python -m "
            "vise_fast.report runs/nano"
        )
    console.say(f"report   {write(Path(options.positional[0]))}")
    return 0
