"""An evaluation as a table: title, base, adapter with its paired gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from vise_fast.evaluate.results import Results, paired_gain
from vise_fast.evaluate.titles import ENTRIES, classes, of_class, title


def side_by_side(
    evaluation: Mapping[str, dict], names: Iterable[str] = ENTRIES
) -> dict[str, tuple[str, str]]:
    """{"before": Results.json(), "after": …} as title -> (base, adapter), the latter with its
    paired difference and 95 % interval.

    `names`: the figures to show, those that were measured (titles.BRIEF for a short table).
    """
    before = Results.of(evaluation, "before") or Results()
    after = Results.of(evaluation, "after") or Results()
    known = before.values.keys() | after.values.keys()
    rows = {}
    for name in names:
        if name in known:
            adapter = _shown(after, name) + _gain(before, after, name)
            rows[title(name)] = (_shown(before, name), adapter)
    return rows


BY_CLASS = ("class", "things", "IoU base", "adapter", "IoU ≥ 0.5 base", "adapter")
"""The columns of `by_class`."""


def by_class(evaluation: Mapping[str, dict]) -> list[list[str]]:
    """Rows of BY_CLASS: greedy answers about each class of labelled pictures, the most frequent
    first; none where nothing was labelled.
    """
    before = Results.of(evaluation, "before") or Results()
    after = Results.of(evaluation, "after") or Results()
    rows = []
    for name, count in classes(before.marks or after.marks).items():
        cells = []
        for figure in of_class(name)[:2]:
            cells += [_shown(before, figure), _shown(after, figure) + _gain(before, after, figure)]
        rows.append([name, str(count), *cells])
    return rows


def _shown(arm: Results, name: str) -> str:
    return f"{arm.values[name]:.3f}" if name in arm.values else "-"


def _gain(before: Results, after: Results, name: str) -> str:
    """' (+0.031, 95 % +0.012 to +0.050)' where both arms answered the same scenes;
    ' (+0.031, too few to tell)' where that were a handful.
    """
    gain = paired_gain(before, after, name)
    if not np.isfinite(gain.value):
        return ""
    return f" ({gain.value:+.3f}, {gain.interval()})"
