"""Logged samples of both arms as a table: each figure with the paired difference and its 95 %
bootstrap interval, the length of captions, the share of answers that were cut.

Samples are paired by their number in the data; scenes, where a task names them, are what the
bootstrap resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vise_fast.evaluate.results import Estimate, Results, paired_gain
from vise_fast.system.errors import DataError
from vise_fast.table import lmms_eval
from vise_fast.table.rows import Row

Samples = Mapping[str, list[dict[str, Any]]]
"""Arm -> samples of one task, in order."""


def cells(row: Row, samples: Samples, totals: Mapping[str, float | None]) -> list[str]:
    """Title, base, adapter, difference with interval, paper. `totals`: the figure of each arm as
    lmms-eval aggregates it, for what is no mean over samples.
    """
    before = score(samples["base"], row.figure)
    after = score(samples["adapter"], row.figure)
    if before is not None and after is not None:
        base = results(samples["base"], before, row.figure)
        tuned = results(samples["adapter"], after, row.figure)
        gain = _interval(paired_gain(base, tuned, row.figure))
        shown = [_number(arm.values.get(row.figure)) for arm in (base, tuned)]
        return [row.title, *shown, gain, _paper(row)]
    one = totals["base"]
    two = totals["adapter"]
    gain = "-" if one is None or two is None else f"{two - one:+.3f} (no interval)"
    return [row.title, _number(one), _number(two), gain, _paper(row)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def score(rows: list[dict[str, Any]], figure: str) -> np.ndarray | None:
    """A figure of every sample; None where lmms-eval logs none."""
    found = [row.get(figure) for row in rows]
    values = [value.get("score") if isinstance(value, dict) else value for value in found]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return np.array(values, float)


def results(rows: list[dict[str, Any]], values: np.ndarray, figure: str) -> Results:
    """One figure by the picture it is about: sums and counts."""
    pictures = [_picture(row) for row in rows]
    order = {picture: index for index, picture in enumerate(dict.fromkeys(pictures))}
    places = [order[picture] for picture in pictures]
    tops = np.bincount(places, values, len(order))
    bottoms = np.bincount(places, minlength=len(order)).astype(float)
    return Results(len(order), {figure: (tops, bottoms)})


def _picture(row: Mapping[str, Any]) -> Any:
    """What a sample is about: its scene, else itself."""
    return row.get("scene", row["doc_id"])


def check_paired(samples: Samples, task: str) -> None:
    """Both arms answered the same questions. Raises DataError."""
    asked = {arm: [_question(row) for row in rows] for arm, rows in samples.items()}
    if asked["base"] != asked["adapter"]:
        raise DataError(
            f"the arms of {task} did not answer the same questions ({len(asked['base'])} and "
            f"{len(asked['adapter'])}); they cannot be compared; delete both samples folders and "
            "start again"
        )


def _question(row: Mapping[str, Any]) -> tuple:
    """What tells a question: lmms-eval's hash is that of the target alone, where there is one."""
    return row["doc_id"], row["doc_hash"], row.get("input")


def words(rows: list[dict[str, Any]]) -> float:
    """Mean words of an answer."""
    return float(np.mean([len(lmms_eval.answer(row).split()) for row in rows]))


def cut(rows: list[dict[str, Any]], limit: int) -> float | None:
    """The share of answers that are as long as the limit lets them be; None where their tokens were
    not logged.
    """
    counts = [_tokens(row) for row in rows]
    if not counts or None in counts:
        return None
    return float(np.mean([count is not None and count >= limit for count in counts]))


def _tokens(row: Mapping[str, Any]) -> int | None:
    """New tokens of an answer."""
    found = row.get("token_counts")
    while isinstance(found, list) and found:
        found = found[0]
    return found.get("output_tokens") if isinstance(found, dict) else None


def total(out: Path, task: str, figure: str) -> float | None:
    """The figure as lmms-eval aggregated it; None where it did not."""
    files = sorted(out.rglob("*_results.json"))
    if not files:
        return None
    content = json.loads(files[-1].read_text(encoding="utf-8"))
    value = content.get("results", {}).get(task, {}).get(f"{figure},none")
    return float(value) if isinstance(value, int | float) else None


def _interval(gain: Estimate) -> str:
    if not math.isfinite(gain.value):
        return "-"
    return f"{gain.value:+.3f} ({gain.interval()})"


def _paper(row: Row) -> str:
    return "" if row.paper is None else f"{row.paper[0]:.2f} → {row.paper[1]:.2f}"
