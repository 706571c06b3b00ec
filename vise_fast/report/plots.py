"""The curves and bars of a report, drawn once with matplotlib: as PNG for slides, as SVG that takes
the page's colours.

`draw(run)` names the plots in reading order. A plot whose metrics were not recorded is left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from vise_fast.evaluate.results import Estimate, paired_gain
from vise_fast.report.stored_run import StoredRun

# Light-theme colours; in the SVG each becomes the CSS variable of its name, so that a dark page
# recolours it.
COLORS = {
    "ink": "#1d2126",
    "muted": "#6b737c",
    "line": "#e3e3dd",
    "c1": "#2c6aa8",
    "c2": "#c46f3a",
    "c3": "#4b8b6a",
    "c4": "#9a9fa7",
    "c5": "#b24a5c",
}
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "text.color": COLORS["ink"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": COLORS["muted"],
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "vise_fast",
    "figure.constrained_layout.use": True,
    "axes.xmargin": 0.01,
}
RUNS = ("c1", "c2", "c3", "c5", "c4")
"""Colours of runs beside each other."""
SIZE = (4.7, 2.55)
DPI = 200
POINTS = 300


@dataclass(frozen=True)
class Plot:
    """`svg` is trusted markup without model-written text; `png` the file's bytes."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


class Curve(NamedTuple):
    """A training metric as a curve; `color`: a name of COLORS."""

    metric: str
    label: str
    color: str


STRENGTHS = (
    Curve("sampled_iou", "IoU, sampled", "c1"),
    Curve("greedy_iou", "IoU, greedy", "c2"),
    Curve("visible_accuracy", "visibility", "c3"),
    Curve("invariance", "agreement across views", "c4"),
)
"""What is drawn over alpha; figures of the evaluation."""


COURSE = (
    Curve("sampled_iou", "IoU, sampled", "c1"),
    Curve("greedy_iou", "IoU, greedy", "c2"),
    Curve("visible_accuracy", "visibility", "c3"),
)
UNLABELLED = (
    Curve("invariance", "agreement across views", "c1"),
    Curve("own_TU", "hides its object", "c2"),
)
"""What is drawn of the evaluations while it trained, with truth and without."""


def draw(run: StoredRun) -> list[Plot]:
    """Every plot that this run has numbers for."""
    makers = (
        _reward,
        _course,
        _kl,
        _area,
        _readable,
        _verdicts,
        _gradient,
        _attention,
        _attention_steps,
        _strengths,
        _time,
        _speed,
    )
    with matplotlib.rc_context(STYLE):
        plots = [make(run) for make in makers]
    found = [plot for plot in plots if plot is not None]
    return [replace(plot, png=_headed(plot, run.directory.name)) for plot in found]


def _headed(plot: Plot, name: str) -> bytes:
    """The PNG with its title and the run's name over it: on a slide it stands alone."""
    picture = Pillow.open(io.BytesIO(plot.png)).convert("RGB")
    head = round(0.28 * DPI)
    whole = Pillow.new("RGB", (picture.width, picture.height + head), "white")
    whole.paste(picture, (0, head))
    draw = ImageDraw.Draw(whole)
    margin = round(0.08 * DPI)
    middle = head // 2 + margin // 2
    title = ImageFont.truetype(_font(), round(0.135 * DPI))
    draw.text((margin, middle), plot.title, COLORS["ink"], title, anchor="lm")
    room = whole.width - 3 * margin - draw.textlength(plot.title, title)
    small = ImageFont.truetype(_font(), round(0.105 * DPI))
    while name and draw.textlength(name, small) > room:
        name = name[:-2].rstrip("…") + "…" if len(name) > 2 else ""
    draw.text((whole.width - margin, middle), name, COLORS["muted"], small, anchor="rm")
    out = io.BytesIO()
    whole.save(out, "PNG", optimize=True)
    return out.getvalue()


def _font() -> str:
    """matplotlib's own, which is there wherever it is."""
    return font_manager.findfont("DejaVu Sans")


OVERLAID = (
    ("reward", "Reward"),
    ("geometric", "Agreement across views"),
    ("semantic", "Hides its object"),
    ("area", "Mean box area"),
    ("kl", "KL to the reference, nat per token"),
    ("parse_rate", "Readable boxes"),
)
"""(metric, title) of what `overlay` draws."""


def overlay(runs: Mapping[str, StoredRun]) -> list[Plot]:
    """Metrics of several runs, by name, on top of each other; those that none recorded are left
    out.
    """
    with matplotlib.rc_context(STYLE | {"text.parse_math": False}):
        plots = [_overlaid(runs, metric, title) for metric, title in OVERLAID]
    return [plot for plot in plots if plot is not None]


def _overlaid(runs: Mapping[str, StoredRun], metric: str, title: str) -> Plot | None:
    if not any(_recorded(run, metric) for run in runs.values()):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, run) in enumerate(runs.items()):
            color = RUNS[number % len(RUNS)]
            _curve(axes, run, Curve(metric, name[-24:], color))
        axes.set_xlabel("step")
        _legend(axes, columns=3)

    caption = "Faint: every step; strong: the moving mean."
    return _plot(f"compare_{metric}", title, caption, paint)


def _plot(name: str, title: str, caption: str, paint: Callable[[Figure], None]) -> Plot:
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.91), hspace=0.16)
    figure = Figure(SIZE, layout=layout)
    paint(figure)
    layout.execute(figure)  # once for both formats
    figure.set_layout_engine("none")
    png = io.BytesIO()
    svg = io.StringIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    nameless = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(svg, format="svg", transparent=True, metadata=nameless)
    return Plot(name, title, caption, _themed(svg.getvalue(), title), png.getvalue())


def _themed(svg: str, title: str) -> str:
    """matplotlib's SVG for inlining: scales with its box, inherits the font, and its colours are
    the page's.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{title}">',
        svg,
        count=1,
    )
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most POINTS points: means over equal stretches."""
    stretches = np.array_split(values, min(POINTS, len(values)))
    return np.array([stretch.mean() for stretch in stretches])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a fifteenth of the run."""
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], values.cumsum()])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _recorded(run: StoredRun, metric: str) -> bool:
    return len(run.series(metric)[0]) > 0


def _curve(axes: Axes, run: StoredRun, curve: Curve) -> None:
    """The recorded values faint, their moving mean strong; nothing where none were recorded."""
    if not _recorded(run, curve.metric):
        return
    steps, values = map(_thinned, run.series(curve.metric))
    color = COLORS[curve.color]
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.28)
    axes.plot(steps, _smooth(values), color=color, label=curve.label)


def _level(axes: Axes, value: float, label: str) -> None:
    """A dashed line at a value to compare with."""
    axes.axhline(value, color=COLORS["muted"], linewidth=0.9, linestyle=(0, (4, 3)), label=label)


def _legend(axes: Axes, columns: int = 4) -> None:
    """Above the axes, in room that `_plot` and the rows of subplots leave."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        borderaxespad=0.1,
        handlelength=1.1,
        columnspacing=1.1,
        handletextpad=0.5,
    ).set_in_layout(False)


def _time_plot(
    run: StoredRun,
    name: str,
    title: str,
    caption: str,
    curves: tuple[Curve, ...],
    *,
    finish: Callable[[Axes], object] | None = None,
) -> Plot | None:
    """Curves over the steps; None where no metric of them was recorded."""
    if not any(_recorded(run, curve.metric) for curve in curves):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in curves:
            _curve(axes, run, curve)
        axes.set_xlabel("step")
        if finish is not None:
            finish(axes)
        _legend(axes)

    return _plot(name, title, caption, paint)


def _reward(run: StoredRun) -> Plot | None:
    caption = (
        "What the policy is paid, the two parts it is paid for, and what its boxes' size costs "
        "it. It should rise slowly; a jump is a loophole found."
    )
    curves = (
        Curve("reward", "reward", "c1"),
        Curve("geometric", "agreement across views", "c2"),
        Curve("semantic", "hides its object", "c3"),
    )
    finish = partial(_charge, run=run) if run.config.reward.w_area > 0 else None
    return _time_plot(run, "reward", "Reward and its parts", caption, curves, finish=finish)


def _charge(axes: Axes, run: StoredRun) -> None:
    """What size costs: w_area sqrt(area), the part of the reward that is subtracted."""
    if _recorded(run, "size"):
        steps, values = map(_thinned, run.series("size"))
        values = run.config.reward.w_area * values
        axes.plot(steps, values, color=COLORS["c5"], linewidth=0.8, alpha=0.28)
        axes.plot(steps, _smooth(values), color=COLORS["c5"], label="less: size")


def _kl(run: StoredRun) -> Plot | None:
    if not _recorded(run, "kl"):
        return None

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _curve(top, run, Curve("kl", "KL to the reference, nat per token", "c1"))
        _level(top, run.config.update.tau, "target")
        _legend(top)
        if _recorded(run, "beta"):
            _weight(bottom, run)
        bottom.set_xlabel("step")

    caption = "How far the answers have moved, and the weight that pulls them back."
    return _plot("kl", "Distance from the base", caption, paint)


def _weight(axes: Axes, run: StoredRun) -> None:
    """The weight of the KL, with ticks at its extremes."""
    _curve(axes, run, Curve("beta", "KL weight", "c2"))
    axes.set_yscale("log")
    axes.minorticks_off()
    _, values = run.series("beta")
    low = values.min()
    high = values.max()
    ticks = sorted({low, high})
    axes.set_yticks(ticks, [f"{value:.2g}" for value in ticks])
    # A constant weight is a line, not the rounding of its mean.
    axes.set_ylim(low / 1.3, high * 1.3)
    _legend(axes)


def _area(run: StoredRun) -> Plot | None:
    def finish(axes: Axes) -> None:
        axes.set_ylim(0, max(axes.get_ylim()[1], 0.25))
        values = run.before.values if run.before else {}
        if values.get("sampled_area_ratio"):
            true = values["sampled_area"] / values["sampled_area_ratio"]
            _level(axes, true, "true mean area")

    caption = "Shares of the image. Growing boxes are how this method is cheated."
    curves = (
        Curve("area", "mean box area", "c1"),
        Curve("area_large", "boxes over 0.8 of the image", "c5"),
    )
    return _time_plot(run, "area", "Box size", caption, curves, finish=finish)


def _readable(run: StoredRun) -> Plot | None:
    caption = "Shares of answers that can be read, and of samples the update learns from."
    curves = (
        Curve("parse_rate", "boxes", "c1"),
        Curve("view_parse_rate", "boxes in views", "c2"),
        Curve("query_parse_rate", "queries", "c3"),
        Curve("carries", "carry gradient", "c4"),
    )
    finish = partial(Axes.set_ylim, bottom=0, top=1.04)
    return _time_plot(run, "readable", "Readable answers", caption, curves, finish=finish)


def _verdicts(run: StoredRun) -> Plot | None:
    cells = (
        Curve("TU", "yes → no (TU)", "c1"),
        Curve("SB", "yes → yes (SB)", "c2"),
        Curve("IG", "no → yes (IG)", "c5"),
        Curve("ID", "no → no (ID)", "c4"),
    )
    if not all(_recorded(run, cell.metric) for cell in cells):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps = _thinned(run.series("TU")[0])
        low = np.zeros(len(steps))
        for cell in cells:
            high = low + _smooth(_thinned(run.series(cell.metric)[1]))
            color = COLORS[cell.color]
            axes.fill_between(
                steps, low, high, color=color, alpha=0.82, linewidth=0, label=cell.label
            )
            low = high
        axes.set_ylim(0, 1)
        axes.set_xlabel("step")
        _legend(axes)

    title = "Is it visible? On the image → with the box ghosted"
    caption = "Yes, then no is right: the box holds what the query names."
    return _plot("verdicts", title, caption, paint)


def _gradient(run: StoredRun) -> Plot | None:
    curves = (Curve("grad_norm", "gradient norm", "c1"),)
    return _time_plot(run, "gradient", "Gradient norm", "Before clipping.", curves)


def _attention(run: StoredRun) -> Plot | None:
    base = run.before.layers if run.before else []
    adapter = run.after.layers if run.after else []
    if not base and not adapter:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if base:
            _layers(axes, base, "base", "c4")
        if adapter:
            _layers(axes, adapter, "adapter", "c1")
        axes.set_ylim(0, None)
        axes.set_xlabel("decoder layer")
        axes.locator_params(axis="x", integer=True)
        _legend(axes)

    caption = (
        "Share of attention on image tokens while a box is written, mean over heads and tokens. "
        "The paper reports 8.2 % → 11.0 % at 2B."
    )
    return _plot("attention", "Attention on the image, by layer", caption, paint)


def _layers(axes: Axes, shares: list[float], arm: str, color: str) -> None:
    """One point per decoder layer."""
    label = f"{arm}, mean {np.mean(shares):.1%}"
    layers = np.arange(1, len(shares) + 1)
    axes.plot(layers, shares, color=COLORS[color], marker="o", markersize=3.5, label=label)


def _attention_steps(run: StoredRun) -> Plot | None:
    title = "Attention on the image, by step"
    caption = "Mean over layers, for the boxes that were sampled."
    curves = (Curve("attention_share", "share of attention", "c1"),)
    return _time_plot(run, "attention_steps", title, caption, curves)


def _strengths(run: StoredRun) -> Plot | None:
    """Gains over the base at each share of the update, with their intervals."""
    base = run.strengths.get(0.0)
    if base is None or len(run.strengths) < 2:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _level(axes, 0.0, "base")
        for curve in STRENGTHS:
            gains = {a: paired_gain(base, r, curve.metric) for a, r in run.strengths.items()}
            _band(axes, {a: gain for a, gain in gains.items() if np.isfinite(gain.value)}, curve)
        axes.set_xlabel("share of the update (alpha)")
        _legend(axes)

    caption = f"Gain over the base on {base.n} held-out images, 95 % intervals. 1 is the adapter."
    return _plot("strengths", "How much of the adapter", caption, paint)


def _course(run: StoredRun) -> Plot | None:
    """Gains over the base between updates, with their intervals."""
    base = run.before
    if base is None or not run.course:
        return None
    curves = COURSE if "sampled_iou" in base.marks else UNLABELLED
    paired = {step: results for step, results in run.course.items() if results.n == base.n}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _level(axes, 0.0, "base")
        for curve in curves:
            gains = {float(s): paired_gain(base, r, curve.metric) for s, r in paired.items()}
            _band(axes, {s: gain for s, gain in gains.items() if np.isfinite(gain.value)}, curve)
        if run.chosen is not None:
            axes.axvline(run.chosen.step, color=COLORS["muted"], linewidth=0.9)
        axes.set_xlabel("step")
        _legend(axes)

    exported = "" if run.chosen is None else " Upright: the step that is exported."
    caption = f"Gain over the base on {base.n} held-out images, 95 % intervals.{exported}"
    return _plot("course", "Held out, while it trained", caption, paint)


def _band(axes: Axes, gains: dict[float, Estimate], curve: Curve) -> None:
    """A line over alpha or steps and its interval; nothing where nothing was measured."""
    if not gains:
        return
    alphas = list(gains)
    middle = [gain.value for gain in gains.values()]
    # from too few images there is no band
    low = [gain.low if gain.told else gain.value for gain in gains.values()]
    high = [gain.high if gain.told else gain.value for gain in gains.values()]
    color = COLORS[curve.color]
    axes.fill_between(alphas, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(alphas, middle, color=color, marker="o", markersize=3.5, label=curve.label)


def _time(run: StoredRun) -> Plot | None:
    phases = run.phases()
    if not phases:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names = sorted(phases, key=phases.__getitem__)
        seconds = [phases[name] for name in names]
        bars = axes.barh(names, seconds, color=COLORS["c1"], height=0.62)
        axes.bar_label(bars, [f" {value:.3g} s" for value in seconds], color=COLORS["muted"])
        axes.grid(False)
        axes.spines.left.set_visible(False)
        axes.set_xlabel("seconds per step")
        axes.set_xlim(0, max(seconds) * 1.2)

    caption = f"Mean over {len(run.metrics)} steps."
    return _plot("phases", "Where a step's time goes", caption, paint)


def _speed(run: StoredRun) -> Plot | None:
    caption = "Asked, grounded, judged and learned from."
    curves = (Curve("images_per_s", "images per second", "c1"),)
    finish = partial(Axes.set_ylim, bottom=0)
    return _time_plot(run, "speed", "Images per second", caption, curves, finish=finish)
