"""The curves and bars of a report, drawn once with matplotlib: as PNG for slides, as SVG that takes
the page's colours.

`draw(record)` names the plots in reading order. A plot whose metrics were not recorded is left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vise_fast.report.record import Record

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
STYLE = {
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
SIZE = (4.7, 2.55)
POINTS = 300


@dataclass(frozen=True)
class Plot:
    """`svg` is trusted markup without model-written text; `png` the file's bytes."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def draw(record: Record) -> list[Plot]:
    """Every plot that this run has numbers for."""
    with matplotlib.rc_context(STYLE):
        return [
            plot
            for make in (
                _reward,
                _kl,
                _area,
                _readable,
                _verdicts,
                _gradient,
                _attention,
                _attention_steps,
                _time,
                _speed,
            )
            if (plot := make(record)) is not None
        ]


def _plot(name: str, title: str, caption: str, paint: Callable[[Figure], None]) -> Plot:
    figure = Figure(SIZE)
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.91), hspace=0.16)
    paint(figure)
    figure.get_layout_engine().execute(figure)  # once for both formats
    figure.set_layout_engine("none")
    png = io.BytesIO()
    svg = io.StringIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    figure.savefig(
        svg,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
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


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means over equal stretches."""
    parts = min(POINTS, len(steps))
    means = lambda x: np.array([part.mean() for part in np.array_split(x, parts)])
    return means(steps), means(values)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a fifteenth of the run."""
    half = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], values.cumsum()])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _curves(axes: Axes, record: Record, curves: dict[str, tuple[str, str]]) -> bool:
    """metric -> (label, colour): the recorded values faint, their moving mean strong.

    False when nothing was recorded.
    """
    drawn = False
    for name, (label, color) in curves.items():
        steps, values = _thinned(*record.series(name)) if len(record.series(name)[0]) else ((), ())
        if len(steps):
            axes.plot(steps, values, color=COLORS[color], linewidth=0.8, alpha=0.28)
            axes.plot(steps, _smooth(values), color=COLORS[color], label=label)
            drawn = True
    return drawn


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
    record: Record,
    name: str,
    title: str,
    caption: str,
    curves: dict[str, tuple[str, str]],
    finish: Callable[[Axes], None] = lambda axes: None,
) -> Plot | None:
    if not any(len(record.series(metric)[0]) for metric in curves):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _curves(axes, record, curves)
        axes.set_xlabel("step")
        finish(axes)
        _legend(axes)

    return _plot(name, title, caption, paint)


def _reward(record: Record) -> Plot | None:
    curves = {
        "reward": ("reward", "c1"),
        "geometric": ("agreement across views", "c2"),
        "semantic": ("hides its object", "c3"),
    }
    caption = "What the policy is paid, and its two parts. It should rise slowly; a jump is a loophole found."
    return _time_plot(record, "reward", "Reward and its parts", caption, curves)


def _kl(record: Record) -> Plot | None:
    if not len(record.series("kl")[0]):
        return None

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _curves(top, record, {"kl": ("KL to the reference, nat per token", "c1")})
        top.axhline(
            record.config.update.tau,
            color=COLORS["muted"],
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            label="target",
        )
        _legend(top)
        if _curves(bottom, record, {"beta": ("KL weight", "c2")}):
            bottom.set_yscale("log"), bottom.minorticks_off()
            low = record.series("beta")[1].min()
            high = record.series("beta")[1].max()
            bottom.set_yticks(
                sorted({low, high}), [f"{value:.2g}" for value in sorted({low, high})]
            )
            bottom.set_ylim(
                low / 1.3, high * 1.3
            )  # a constant weight is a line, not the rounding of its mean
            _legend(bottom)
        bottom.set_xlabel("step")

    return _plot(
        "kl",
        "Distance from the base",
        "How far the answers have moved, and the weight that pulls them back.",
        paint,
    )


def _area(record: Record) -> Plot | None:
    def finish(axes: Axes) -> None:
        axes.set_ylim(0, max(axes.get_ylim()[1], 0.25))
        values = record.before.values if record.before else {}
        if values.get("sampled_area_ratio"):
            true = values["sampled_area"] / values["sampled_area_ratio"]
            axes.axhline(
                true,
                color=COLORS["muted"],
                linewidth=0.9,
                linestyle=(0, (4, 3)),
                label="true mean area",
            )

    curves = {"area": ("mean box area", "c1"), "area_large": ("boxes over 0.8 of the image", "c5")}
    return _time_plot(
        record,
        "area",
        "Box size",
        "Shares of the image. Growing boxes are how this method is cheated.",
        curves,
        finish,
    )


def _readable(record: Record) -> Plot | None:
    curves = {
        "parse_rate": ("boxes", "c1"),
        "view_parse_rate": ("boxes in views", "c2"),
        "query_parse_rate": ("queries", "c3"),
        "carries": ("carry gradient", "c4"),
    }
    finish = lambda axes: axes.set_ylim(0, 1.04)
    return _time_plot(
        record,
        "readable",
        "Readable answers",
        "Shares of answers that can be read, and of samples the update learns from.",
        curves,
        finish,
    )


def _verdicts(record: Record) -> Plot | None:
    cells = {
        "TU": ("yes → no (TU)", "c1"),
        "SB": ("yes → yes (SB)", "c2"),
        "IG": ("no → yes (IG)", "c5"),
        "ID": ("no → no (ID)", "c4"),
    }
    if not all(len(record.series(name)[0]) for name in cells):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        steps = _thinned(*record.series("TU"))[0]
        shares = np.array([_smooth(_thinned(*record.series(name))[1]) for name in cells])
        for share, low, (label, color) in zip(
            shares, shares.cumsum(0) - shares, cells.values(), strict=True
        ):
            axes.fill_between(
                steps, low, low + share, color=COLORS[color], alpha=0.82, linewidth=0, label=label
            )
        axes.set_ylim(0, 1), axes.set_xlabel("step")
        _legend(axes)

    return _plot(
        "verdicts",
        "Is it visible? On the image → with the box ghosted",
        "Yes, then no is right: the box holds what the query names.",
        paint,
    )


def _gradient(record: Record) -> Plot | None:
    return _time_plot(
        record,
        "gradient",
        "Gradient norm",
        "Before clipping.",
        {"grad_norm": ("gradient norm", "c1")},
    )


def _attention(record: Record) -> Plot | None:
    arms = {"base": (record.before, "c4"), "adapter": (record.after, "c1")}
    arms = {
        label: (arm.layers, color)
        for label, (arm, color) in arms.items()
        if arm is not None and arm.layers
    }
    if not arms:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for label, (layers, color) in arms.items():
            where = np.arange(1, len(layers) + 1)
            axes.plot(
                where,
                layers,
                color=COLORS[color],
                marker="o",
                markersize=3.5,
                label=f"{label}, mean {np.mean(layers):.1%}",
            )
        axes.set_ylim(0, None), axes.set_xlabel("decoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    caption = "Share of attention on image tokens while a box is written, mean over heads and tokens. The paper reports 8.2 % → 11.0 % at 2B."
    return _plot("attention", "Attention on the image, by layer", caption, paint)


def _attention_steps(record: Record) -> Plot | None:
    caption = "Mean over layers, for the boxes that were sampled."
    return _time_plot(
        record,
        "attention_steps",
        "Attention on the image, by step",
        caption,
        {"attention_share": ("share of attention", "c1")},
    )


def _time(record: Record) -> Plot | None:
    phases = record.phases()
    if not phases:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names = sorted(phases, key=phases.get)
        bars = axes.barh(names, [phases[name] for name in names], color=COLORS["c1"], height=0.62)
        axes.bar_label(bars, [f" {phases[name]:.3g} s" for name in names], color=COLORS["muted"])
        axes.grid(False), axes.spines.left.set_visible(False)
        axes.set_xlabel("seconds per step"), axes.set_xlim(0, max(phases.values()) * 1.2)

    return _plot(
        "phases", "Where a step's time goes", f"Mean over {len(record.metrics)} steps.", paint
    )


def _speed(record: Record) -> Plot | None:
    finish = lambda axes: axes.set_ylim(0, None)
    return _time_plot(
        record,
        "speed",
        "Images per second",
        "Asked, grounded, judged and learned from.",
        {"images_per_s": ("images per second", "c1")},
        finish,
    )
