"""Was this run healthy, and why: plain sentences from a run's metrics and evaluation. A pure
function of a StoredRun.

The limits are those of alarms.py where it has them. Nothing is called a gain whose 95 % interval
includes zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from vise_fast.evaluate.results import FEW, TOO_FEW, Estimate, Results, paired_gain
from vise_fast.report import alarms
from vise_fast.report.stored_run import StoredRun

Level = Literal["good", "note", "warn", "bad"]
SIZE = 0.2  # boxes within this of the truth's area are the right size
FEW_CARRY = 0.05
ALARM_SHARE = 0.1
GRAVEST_FIRST: tuple[Level, ...] = ("bad", "warn", "good", "note")
GAINED = "Grounding improved"


@dataclass(frozen=True)
class Finding:
    """One sentence and how grave it is."""

    level: Level
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """`level` is the page's colour; `findings` are its reasons, the gravest first."""

    level: Level
    headline: str
    findings: list[Finding]


class _Arms(NamedTuple):
    """The same held-out images before training (base) and after (adapter)."""

    before: Results
    after: Results

    def gain(self, name: str) -> Estimate:
        """What training changed."""
        return paired_gain(self.before, self.after, name)

    def change(self, name: str) -> str:
        """'0.412 → 0.455 (+0.043, 95 % +0.020 to +0.066)'"""
        before = _number(self.before.values.get(name))
        after = _number(self.after.values.get(name))
        gain = self.gain(name)
        return f"{before} → {after} ({gain.value:+.3f}, {gain.interval()})".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def diagnose(run: StoredRun) -> Diagnosis:
    """The verdict on a run, with its reasons."""
    found = [
        *_evaluation(run),
        *_collapse(run),
        *_readable(run),
        *_drift(run),
        *_signal(run),
        *_end(run),
    ]
    found.sort(key=lambda finding: GRAVEST_FIRST.index(finding.level))
    return Diagnosis(*_verdict(run, found), found)


def _verdict(run: StoredRun, found: list[Finding]) -> tuple[Level, str]:
    """Level and headline of findings, the gravest first."""
    worst = found[0].level
    if worst == "bad":
        return "bad", "Not healthy"
    if not run.finished:
        done = f"step {run.steps} of {run.config.train.steps}"
        return "warn", f"Not finished ({done}): nothing shows that it learned yet"
    if run.before is None or run.after is None:
        return "warn", "No sign of trouble, but nothing shows that it learned"
    if not any(finding.level == "good" and finding.text.startswith(GAINED) for finding in found):
        return "warn", "Healthy, but no gain is shown"
    if worst == "warn":
        return "warn", "Healthy: it learned, with reservations"
    return "good", "Healthy: it learned"


# ---- what the held-out figures say ---------------------------------------------------------------


def _evaluation(run: StoredRun) -> Iterator[Finding]:
    """With truth (scenes) or without (photographs)."""
    if run.before is None or run.after is None:
        when = "" if run.finished else " yet"
        yield Finding(
            "warn",
            f"There are no held-out figures before and after training{when}, so whether anything "
            "was learned is not known.",
        )
        return
    arms = _Arms(run.before, run.after)
    images = min(run.before.n, run.after.n)
    if images < FEW:
        yield Finding(
            "warn",
            f"Only {images} held-out images: {TOO_FEW} whether anything was learned; give "
            f"{FEW} at least (eval.scenes, data.holdout).",
        )
        return
    if "sampled_iou" in run.before.marks:
        yield from _grounding(arms)
        yield from (_size(arms, label) for label in ("sampled", "greedy"))
        yield _visibility(arms)
    else:
        yield _invariance(arms)


def _grounding(arms: _Arms) -> Iterator[Finding]:
    gains = {label: arms.gain(f"{label}_iou") for label in ("sampled", "greedy")}
    said = "; ".join(f"{label} {arms.change(f'{label}_iou')}" for label in gains)
    if any(gain.high < 0 for gain in gains.values()):
        yield Finding("bad", f"Grounding got worse on held-out images: mean IoU {said}.")
    elif any(gain.low > 0 for gain in gains.values()):
        yield Finding("good", f"{GAINED} on held-out images: mean IoU {said}.")
        yield _tightening(arms, [label for label, gain in gains.items() if gain.low > 0])
    else:
        yield Finding(
            "note",
            f"Grounding did not change measurably on held-out images: mean IoU {said}. The "
            "intervals include zero.",
        )


def _tightening(arms: _Arms, labels: list[str]) -> Finding:
    """A gain that a constant factor on all boxes would also give is one of size, not of place."""
    names = [f"{label}_iou_rescaled" for label in labels]
    pairs = zip(labels, names, strict=True)
    said = "; ".join(f"{label} {arms.change(name)}" for label, name in pairs)
    condition = f"with each arm's boxes rescaled as suits it best, mean IoU {said}."
    if any(arms.gain(name).low > 0 for name in names):
        return Finding("good", f"The gain is not one of size alone: {condition}")
    return Finding("warn", f"The gain may be one of size: {condition}")


def _size(arms: _Arms, label: str) -> Finding:
    """Of sampled boxes and of greedy ones: each is somebody's answer."""
    ratio = arms.after.values.get(f"{label}_area_ratio", float("nan"))
    before = arms.before.values.get(f"{label}_area_ratio", float("nan"))
    boxes = f"{label.capitalize()} boxes"
    text = f"{boxes} cover {ratio:.2f} times the area of the true ones (base: {before:.2f})."
    if not np.isfinite(ratio):
        return Finding("bad", f"No {label} answer is a box with area.")
    if abs(ratio - 1) <= SIZE:
        return Finding("good", text)
    worse = abs(np.log(ratio)) > abs(np.log(before)) + 0.2 if before > 0 else True
    return Finding("bad" if worse and ratio > 1.5 else "warn", text)


def _visibility(arms: _Arms) -> Finding:
    gain = arms.gain("visible_accuracy")
    level: Level = "note"
    if gain.high < -0.02:
        level = "bad"
    elif gain.high < 0:
        level = "warn"
    elif gain.low > 0:
        level = "good"
    return Finding(
        level,
        "Telling what is visible (present, absent, hidden objects): accuracy "
        f"{arms.change('visible_accuracy')}.",
    )


def _invariance(arms: _Arms) -> Finding:
    gains = [arms.gain("invariance"), arms.gain("own_TU")]
    said = (
        f"agreement across views {arms.change('invariance')}; boxes that hide their object "
        f"{arms.change('own_TU')}"
    )
    better = any(gain.low > 0 for gain in gains)
    if any(gain.high < 0 for gain in gains):
        text = f"On held-out photographs something got worse: {said}."
        return Finding("warn" if better else "bad", text)
    if better:
        return Finding("good", f"{GAINED} as far as can be told without labels: {said}.")
    return Finding("note", f"Nothing changed measurably on held-out photographs: {said}.")


# ---- what the training metrics say ---------------------------------------------------------------


class _Ends(NamedTuple):
    """Means of a metric over the first and the last tenth, at least five steps each."""

    first: float
    last: float


def _ends(run: StoredRun, name: str) -> _Ends | None:
    """None where the metric is absent."""
    _, values = run.series(name)
    if not len(values):
        return None
    window = max(5, len(values) // 10)
    return _Ends(float(values[:window].mean()), float(values[-window:].mean()))


def _collapse(run: StoredRun) -> Iterator[Finding]:
    area = _ends(run, "area")
    large = _ends(run, "area_large")
    if area is not None and area.last > alarms.GROWTH * max(area.first, 1e-6):
        yield Finding(
            "bad",
            f"Boxes grew from {area.first:.0%} to {area.last:.0%} of the image during training: "
            "the reward was being paid for size.",
        )
    if large is not None and large.last > _of_base(run, "own_area_large", 0.0) + alarms.LARGE_SHARE:
        yield Finding(
            "bad",
            f"{large.last:.0%} of the last boxes cover more than 0.8 of the image: the policy "
            "collapsed to the full image.",
        )
    for name, steps in run.alarms().items():
        yield _alarm(run, name, steps)
    tau = run.config.update.tau
    said = {} if run.after is None else alarms.looked_at(run.before, run.after, tau)
    yield from (Finding("warn", f"{text[0].upper()}{text[1:]}.") for text in said.values() if text)


def _of_base(run: StoredRun, name: str, otherwise: float) -> float:
    """The base's own rate, where the alarms have their zero."""
    return otherwise if run.before is None else run.before.values.get(name, otherwise)


def _alarm(run: StoredRun, name: str, steps: list[int]) -> Finding:
    """An alarm that was on during `steps`."""
    span = f"{steps[0]} to {steps[-1]}"
    if run.steps in steps or len(steps) > ALARM_SHARE * len(run.metrics):
        return Finding(
            "bad",
            f"The alarm '{name}' was on for {len(steps)} of {len(run.metrics)} steps ({span}).",
        )
    return Finding(
        "note",
        f"The alarm '{name}' was on for {len(steps)} steps ({span}) and went off again.",
    )


def _readable(run: StoredRun) -> Iterator[Finding]:
    ends = _ends(run, "parse_rate")
    if ends is None:
        return
    level: Level = "good"
    if ends.last < alarms.PARSE_FLOOR * _of_base(run, "own_parse_rate", 1.0):
        level = "bad"
    elif ends.last < 0.9:
        level = "warn"
    text = f"{ends.last:.1%} of the last answers could be read as a box (first: {ends.first:.1%})."
    yield Finding(level, text)


def _drift(run: StoredRun) -> Iterator[Finding]:
    ends = _ends(run, "kl")
    if ends is None:
        return
    tau = run.config.update.tau
    level: Level = "note"
    if ends.last > alarms.KL_LIMIT * tau:
        level = "bad"
    elif ends.last > 3 * tau:
        level = "warn"
    yield Finding(
        level,
        f"The policy ended {ends.last:.3g} nat per token from its reference (target {tau:g}).",
    )


def _signal(run: StoredRun) -> Iterator[Finding]:
    reward = _ends(run, "reward")
    carries = _ends(run, "carries")
    if reward is not None:
        yield Finding(
            "note",
            f"The reward went from {reward.first:.3f} to {reward.last:.3f} (means of the first "
            "and the last steps).",
        )
    if carries is not None and carries.last < FEW_CARRY:
        yield Finding(
            "warn",
            f"Only {carries.last:.0%} of the last samples carried any gradient: most queries "
            "named nothing the judge could see.",
        )
    broken = sum(m.get("grad_norm", 0.0) is None for m in run.metrics)
    if broken:
        yield Finding(
            "warn",
            f"{broken} of {len(run.metrics)} steps had a gradient that was not finite and were "
            "skipped.",
        )


def _end(run: StoredRun) -> Iterator[Finding]:
    chosen = run.chosen
    if chosen is not None:
        yield Finding(
            "note",
            f"The adapter is the one after step {chosen.step}, the best by {chosen.figure} "
            f"({chosen.value:.3f}) of {chosen.last} steps.",
        )
    if chosen is not None and chosen.patience and run.steps == chosen.last:
        text = f"Stopped early, after step {run.steps}: no {chosen.figure} was better for so long."
        yield Finding("note", text)
    elif run.steps < run.config.train.steps:
        still = "" if run.after is not None else ", or is still going on"
        text = f"The run ended after {run.steps} of {run.config.train.steps} steps{still}."
        yield Finding("warn", text)
