"""Evidence of no image, to try a reward on before anything is loaded: whatever may happen to a row
happens to one here.

Four groups of three boxes with two views. Group 0 is sound, but for one box that is in no view; in
group 1 an answer is unreadable, a box has no area and a view's answer is unreadable; the query of
group 2 is unreadable; the object of group 3 is not seen. Where nothing was judged stands NaN.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from vise_fast.config.schema import RewardConfig
from vise_fast.images import geometry
from vise_fast.method.evidence import Evidence

GROUPS = 4
SAMPLES = 3
VIEWS = 2
ROWS = GROUPS * SAMPLES
OUT_OF_VIEW, UNREADABLE, FLAT, UNREADABLE_VIEW = 1, 3, 4, 5
UNREADABLE_QUERY, UNSEEN = 2, 3
"""Rows, then groups."""


def evidence(config: RewardConfig, truth: bool) -> Evidence:
    """The evidence that a run with this reward would make, of no image; always the same."""
    draws = torch.Generator().manual_seed(0)
    group = torch.arange(ROWS) // SAMPLES
    readable = torch.arange(ROWS) != UNREADABLE
    query_readable = group != UNREADABLE_QUERY
    box = _boxes(draws)
    judged = readable & query_readable & geometry.proper(box)
    view_readable = _all_but(UNREADABLE_VIEW)
    seen = torch.where(group == UNSEEN, 0.1, 0.9).double()
    return Evidence(
        box_1000=box * readable[:, None],
        readable=readable,
        view_box_1000=box[:, None] * view_readable[..., None],
        view_readable=view_readable,
        view_usable=_all_but(OUT_OF_VIEW),
        matrix_px=torch.eye(3, dtype=torch.float64).repeat(ROWS, VIEWS, 1, 1),
        height=torch.full((ROWS,), 480),
        width=torch.full((ROWS,), 640),
        seen=torch.where(readable & query_readable, seen, torch.nan),
        gone=_verdicts(judged, draws)[:, 0],
        query_readable=query_readable,
        group_size=SAMPLES,
        control=_verdicts(judged, draws, config.controls) if config.sem == "contrast" else None,
        keep=_verdicts(judged, draws)[:, 0] if config.sufficiency else None,
        judged=judged,
        named_again=group != UNSEEN if config.unique else None,
        truth_1000=box.clone() if truth else None,
    )


def same(one: Evidence, other: Evidence) -> bool:
    """Whether both hold the same numbers; NaN is the same as NaN."""
    return all(_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Evidence))


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return a == b


def _boxes(draws: torch.Generator) -> Tensor:
    """(ROWS, 4), one of them without area."""
    corner = torch.rand(ROWS, 2, generator=draws, dtype=torch.float64) * 500
    box = torch.cat([corner, corner + 100 + corner.flip(1) / 2], 1)
    box[FLAT] = box[FLAT, [0, 1, 0, 1]]
    return box


def _all_but(row: int) -> Tensor:
    """Bool (ROWS, VIEWS)."""
    return (torch.arange(ROWS) != row)[:, None].repeat(1, VIEWS)


def _verdicts(judged: Tensor, draws: torch.Generator, count: int = 1) -> Tensor:
    """(ROWS, count) where judged (ROWS,), else NaN."""
    drawn = torch.rand(ROWS, count, generator=draws, dtype=torch.float64)
    return torch.where(judged[:, None], drawn, torch.nan)
