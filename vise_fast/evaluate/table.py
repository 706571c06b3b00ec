"""An evaluation as a table: title, base, adapter with its paired gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from vise_fast.evaluate.results import Results, paired_gain
from vise_fast.evaluate.titles import ENTRIES, title


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
