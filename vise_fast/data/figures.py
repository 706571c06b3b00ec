"""A survey as tables: rows of words and numbers for the screen and for the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vise_fast.data.survey import Survey
from vise_fast.system.console import counted

MOST_GRIDS = 6
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
SPREAD = ("", "least", "10 %", "median", "90 %", "most")
GRIDS = ("width x height", "pictures", "image tokens")
RULES = ("setting", "", "leaves out")
Rows = list[list[str]]


def counts(survey: Survey) -> str:
    """All pictures in a line."""
    others = f", {counted(survey.ignored, 'other file')}" if survey.ignored else ""
    return (
        f"{survey.train} to train on, {survey.held} held out, {len(survey.bad)} cannot be used"
        f"{others}, {survey.title}"
    )


def spread(survey: Survey) -> Rows:
    """What was measured: a row each, of every usable picture."""
    measured = list(survey.measures.values())
    columns = {
        "shorter side, px": [one.side for one in measured],
        "sharpness": [one.sharpness / 1000 for one in measured],
        "contrast": [one.contrast / 1000 for one in measured],
        "image tokens, to train on": survey.tokens.tolist(),
    }
    return [[name, *_shares(values)] for name, values in columns.items()]


def _shares(values: Sequence[float]) -> list[str]:
    return [f"{value:.4g}" for value in np.quantile(values, SHARES, method="nearest")]


def grids(survey: Survey) -> Rows:
    """The most frequent sizes after the resize, and the rest in one row."""
    rows = []
    for (height, width), count in list(survey.grids.items())[:MOST_GRIDS]:
        tokens = height * width // survey.multiple**2
        rows.append([f"{width} x {height}", str(count), str(tokens)])
    rest = list(survey.grids.values())[MOST_GRIDS:]
    if rest:
        rows.append([f"{len(rest)} others", str(sum(rest)), ""])
    return rows


def rules(survey: Survey) -> Rows:
    """What each setting leaves out by itself."""
    return [
        [rule.word, "set" if rule.is_set else "if set", str(len(rule.dropped))]
        for rule in survey.rules
    ]


def time_lines(survey: Survey, batch: int) -> list[str]:
    """What follows for a run."""
    steps = -(-survey.train // batch)
    seconds = survey.decode_s * survey.train
    return [
        f"an epoch is {steps} steps of {batch}, and {int(survey.tokens.sum())} image tokens",
        f"decoding takes {1000 * survey.decode_s:.1f} ms of a core for one, "
        f"{seconds:.0f} s for an epoch",
    ]
