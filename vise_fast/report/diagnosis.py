"""Was this run healthy, and why: plain sentences from a run's metrics and evaluation. A pure
function of a Record.

The limits are those of alarms.py where it has them. Nothing is called a gain whose 95 % interval
includes zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vise_fast.evaluate.figures import Estimate, difference
from vise_fast.report import alarms
from vise_fast.report.record import Record

Level = Literal["good", "note", "warn", "bad"]
SIZE = 0.2  # boxes within this of the truth's area are the right size
FEW_CARRY = 0.05
ALARM_SHARE = 0.1


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """`level` is the page's colour; `findings` are its reasons, the gravest first."""

    level: Level
    headline: str
    findings: list[Finding]


def diagnose(record: Record) -> Diagnosis:
    found = [
        *_evaluation(record),
        *_collapse(record),
        *_readable(record),
        *_drift(record),
        *_signal(record),
        *_end(record),
    ]
    order: list[Level] = ["bad", "warn", "good", "note"]
    found.sort(key=lambda finding: order.index(finding.level))
    gained = any(
        finding.level == "good" and finding.text.startswith("Grounding improved")
        for finding in found
    )
    if found[0].level == "bad":
        return Diagnosis("bad", "Not healthy", found)
    if record.before is None or record.after is None:
        return Diagnosis("warn", "No sign of trouble, but nothing shows that it learned", found)
    if gained:
        return Diagnosis(
            "warn" if found[0].level == "warn" else "good",
            "Healthy: it learned, with reservations"
            if found[0].level == "warn"
            else "Healthy: it learned",
            found,
        )
    return Diagnosis("warn", "Healthy, but no gain is shown", found)


def _evaluation(record: Record) -> Iterator[Finding]:
    """What the held-out figures say; with truth (scenes) or without (photographs)."""
    if record.before is None or record.after is None:
        yield Finding(
            "warn",
            (
                "There are no held-out figures before and after training, so whether anything was "
                "learned is not known."
            ),
        )
        return
    if "sampled_iou" in record.before.marks:
        yield from _grounding(record)
        yield from _visibility(record)
    else:
        yield from _invariance(record)


def _grounding(record: Record) -> Iterator[Finding]:
    gains = {label: _gain(record, f"{label}_iou") for label in ("sampled", "greedy")}
    said = "; ".join(f"{label} {_change(record, f'{label}_iou')}" for label in gains)
    if any(gain.high < 0 for gain in gains.values()):
        yield Finding("bad", f"Grounding got worse on held-out scenes: mean IoU {said}.")
    elif any(gain.low > 0 for gain in gains.values()):
        yield Finding("good", f"Grounding improved on held-out scenes: mean IoU {said}.")
        yield from _tightening(record, [label for label, gain in gains.items() if gain.low > 0])
    else:
        yield Finding(
            "note",
            (
                f"Grounding did not change measurably on held-out scenes: mean IoU {said}. The "
                "intervals include zero."
            ),
        )
    yield _size(record)


def _tightening(record: Record, labels: list[str]) -> Iterator[Finding]:
    """A gain that a constant factor on all boxes would also give is one of size, not of place."""
    survives = [label for label in labels if _gain(record, f"{label}_iou_rescaled").low > 0]
    said = "; ".join(f"{label} {_change(record, f'{label}_iou_rescaled')}" for label in labels)
    if survives:
        yield Finding(
            "good",
            (
                "The gain is not one of size alone: with each arm's boxes rescaled as suits it "
                f"best, mean IoU {said}."
            ),
        )
    else:
        yield Finding(
            "warn",
            (
                "The gain may be one of size: with each arm's boxes rescaled as suits it best, "
                f"mean IoU {said}."
            ),
        )


def _size(record: Record) -> Finding:
    ratio = record.after.values.get("sampled_area_ratio", float("nan"))
    before = record.before.values.get("sampled_area_ratio", float("nan"))
    text = f"Boxes cover {ratio:.2f} times the area of the true ones (base: {before:.2f})."
    if not np.isfinite(ratio):
        return Finding("bad", "No sampled answer is a box with area.")
    if abs(ratio - 1) <= SIZE:
        return Finding("good", text)
    worse = abs(np.log(ratio)) > abs(np.log(before)) + 0.2 if before > 0 else True
    return Finding("bad" if worse and ratio > 1.5 else "warn", text)


def _visibility(record: Record) -> Iterator[Finding]:
    gain = _gain(record, "visible_accuracy")
    said = f"Telling what is visible (present, absent, hidden objects): accuracy {_change(record, 'visible_accuracy')}."
    yield Finding(
        "bad"
        if gain.high < -0.02
        else "warn"
        if gain.high < 0
        else "good"
        if gain.low > 0
        else "note",
        said,
    )


def _invariance(record: Record) -> Iterator[Finding]:
    gain = _gain(record, "invariance")
    hides = _gain(record, "own_TU")
    said = f"agreement across views {_change(record, 'invariance')}; boxes that hide their object {_change(record, 'own_TU')}"
    better = gain.low > 0 or hides.low > 0
    worse = gain.high < 0 or hides.high < 0
    if worse:
        yield Finding(
            "bad" if not better else "warn", f"On held-out photographs something got worse: {said}."
        )
    elif better:
        yield Finding("good", f"Grounding improved as far as can be told without labels: {said}.")
    else:
        yield Finding("note", f"Nothing changed measurably on held-out photographs: {said}.")


def _gain(record: Record, name: str) -> Estimate:
    both = (
        name in record.before.marks
        and name in record.after.marks
        and record.before.n == record.after.n
    )
    return difference(record.before, record.after, name) if both else Estimate(*[float("nan")] * 3)


def _change(record: Record, name: str) -> str:
    """'0.412 → 0.455 (+0.043, 95 % +0.020 to +0.066)'"""
    before = record.before.values.get(name)
    after = record.after.values.get(name)
    gain = _gain(record, name)
    shown = lambda value: "–" if value is None else f"{value:.3f}"
    return f"{shown(before)} → {shown(after)} ({gain.value:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f})".replace(
        "-", "−"
    )


# ---- what the training metrics say ---------------------------------------------------------------


def _ends(record: Record, name: str) -> tuple[float, float] | None:
    """Means over the first and the last tenth (at least five steps each); None where the metric is
    absent.
    """
    _, values = record.series(name)
    if not len(values):
        return None
    window = max(5, len(values) // 10)
    return float(values[:window].mean()), float(values[-window:].mean())


def _collapse(record: Record) -> Iterator[Finding]:
    area = _ends(record, "area")
    large = _ends(record, "area_large")
    if area is not None and area[1] > alarms.GROWTH * max(area[0], 1e-6):
        yield Finding(
            "bad",
            (
                f"Boxes grew from {area[0]:.0%} to {area[1]:.0%} of the image during training: the "
                "reward was being paid for size."
            ),
        )
    if large is not None and large[1] > alarms.LARGE_SHARE:
        yield Finding(
            "bad",
            (
                f"{large[1]:.0%} of the last boxes cover more than 0.8 of the image: the policy "
                "collapsed to the full image."
            ),
        )
    for name, steps in record.alarms().items():
        if record.steps in steps or len(steps) > ALARM_SHARE * len(record.metrics):
            yield Finding(
                "bad",
                (
                    f"The alarm '{name}' was on for {len(steps)} of {len(record.metrics)} steps "
                    f"({steps[0]} to {steps[-1]})."
                ),
            )
        else:
            yield Finding(
                "note",
                (
                    f"The alarm '{name}' was on for {len(steps)} steps ({steps[0]} to {steps[-1]}) "
                    "and went off again."
                ),
            )


def _readable(record: Record) -> Iterator[Finding]:
    ends = _ends(record, "parse_rate")
    if ends is not None:
        level: Level = (
            "bad" if ends[1] < alarms.PARSE_FLOOR else "warn" if ends[1] < 0.9 else "good"
        )
        yield Finding(
            level,
            f"{ends[1]:.1%} of the last answers could be read as a box (first: {ends[0]:.1%}).",
        )


def _drift(record: Record) -> Iterator[Finding]:
    ends = _ends(record, "kl")
    tau = record.config.update.tau
    if ends is not None:
        level: Level = (
            "bad" if ends[1] > alarms.KL_LIMIT * tau else "warn" if ends[1] > 3 * tau else "note"
        )
        yield Finding(
            level,
            f"The policy ended {ends[1]:.3g} nat per token from its reference (target {tau:g}).",
        )


def _signal(record: Record) -> Iterator[Finding]:
    reward = _ends(record, "reward")
    carries = _ends(record, "carries")
    if reward is not None:
        yield Finding(
            "note",
            (
                f"The reward went from {reward[0]:.3f} to {reward[1]:.3f} (means of the first and "
                "the last steps)."
            ),
        )
    if carries is not None and carries[1] < FEW_CARRY:
        yield Finding(
            "warn",
            (
                f"Only {carries[1]:.0%} of the last samples carried any gradient: most queries "
                "named nothing the judge could see."
            ),
        )
    broken = sum(m.get("grad_norm", 0.0) is None for m in record.metrics)
    if broken:
        yield Finding(
            "warn",
            (
                f"{broken} of {len(record.metrics)} steps had a gradient that was not finite and "
                "were skipped."
            ),
        )


def _end(record: Record) -> Iterator[Finding]:
    if record.steps < record.config.train.steps:
        yield Finding(
            "warn", f"The run ended after {record.steps} of {record.config.train.steps} steps."
        )
