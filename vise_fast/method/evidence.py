"""What is known about the sampled boxes of a batch before anything is rewarded: boxes, boxes in the
views, matrices, verdicts. Tensors on the CPU, no model, no image.

Rows are in group-major order: the G samples of image 0, then of image 1, ...; K views and C
controls per row. Left out: how it came about (experience.py), what it is worth (rewards.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vise_fast.images import geometry
from vise_fast.system.errors import NumericFault

VISIBLE = 0.5
"""A verdict in words: yes from this probability on."""


@dataclass(frozen=True)
class Evidence:
    """What is known about N = images * G sampled boxes. Probabilities are p(visible) of the row's
    query, 0..1.

    Raises ValueError when rows do not fill whole groups or a tensor has another number of rows,
    NumericFault for a probability that is not a number in 0..1 on a row it was asked for: `seen`
    where query and box could be read, the others where `judged`, `control` and `keep` where
    `further` (elsewhere anything may stand, NaN too).
    """

    box_1000: Tensor
    """(N, 4), any numbers: cleaned here"""
    readable: Tensor
    """(N,) bool: the sampled answer was a box"""
    view_box_1000: Tensor
    """(N, K, 4) answers on the views"""
    view_readable: Tensor
    """(N, K) bool"""
    view_usable: Tensor
    """(N, K) bool: False where the view is dropped (too little of the box is left, side words under
    a flip)
    """
    matrix_px: Tensor
    """(N, K, 3, 3) source to view"""
    height: Tensor
    """(N,) pixels"""
    width: Tensor
    """(N,) pixels"""
    seen: Tensor
    """(N,) p on the image"""
    gone: Tensor
    """(N,) p with the box ghosted"""
    query_readable: Tensor
    """(N,) bool"""
    group_size: int
    """G"""
    control: Tensor | None = None
    """(N, C) p with a box of the same size ghosted elsewhere; needed by `sem: contrast`"""
    keep: Tensor | None = None
    """(N,) p with everything but the box ghosted; needed by `sufficiency`"""
    judged: Tensor | None = None
    """(N,) bool: rows whose ghosts were judged; None: all whose query could be read and whose box
    has area. The others have R_sem = 0
    """
    further: Tensor | None = None
    """(N,) bool: judged rows whose controls and keep were asked for too; None: all of them. The
    others hide no more than `reward.settled` and have R_sem = 0
    """
    named_again: Tensor | None = None
    """(N,) bool: the words came back of what the group's boxes hold; needed by `unique`"""
    truth_1000: Tensor | None = None
    """(N, 4) for the oracle only; a box without area: no truth"""

    def __post_init__(self) -> None:
        rows = self.box_1000.shape[0]
        if rows == 0 or rows % self.group_size:
            raise ValueError(f"{rows} rows are not groups of {self.group_size}")
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.shape[0] != rows:
                raise ValueError(f"{name} has {value.shape[0]} rows, box_1000 has {rows}")
        self._check_probabilities()

    def _check_probabilities(self) -> None:
        for name in ("seen", "gone", "control", "keep"):
            p = getattr(self, name)
            asked = self._asked(name)
            if p is not None and not ((p[asked] >= 0) & (p[asked] <= 1)).all():
                raise NumericFault(
                    f"p({name}) is not within 0..1; the judge's logits are not finite; lower the "
                    "learning rate or use float32"
                )

    def _asked(self, name: str) -> Tensor:
        """(N,) bool: rows on which this probability was asked for."""
        if name == "seen":
            return self.readable & self.query_readable
        return self.has_verdicts if name == "gone" else self.has_all_verdicts

    @property
    def placed(self) -> Tensor:
        """(N,) bool: the answer is a box with area."""
        return self.readable & geometry.proper(self.box_1000)

    @property
    def has_verdicts(self) -> Tensor:
        """(N,) bool: rows with verdicts on their ghosts."""
        placed = self.placed & self.query_readable
        return placed if self.judged is None else placed & self.judged

    @property
    def has_all_verdicts(self) -> Tensor:
        """(N,) bool: rows with verdicts on their controls and on what they keep as well."""
        return self.has_verdicts if self.further is None else self.has_verdicts & self.further

    def group_mean(self, values: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the chosen rows (N,) bool of each group, spread over its rows, and whether
        there was any. Two (N,).
        """
        chosen = of.view(-1, self.group_size).to(values.dtype)
        count = chosen.sum(1, keepdim=True)
        mean = (values.view_as(chosen) * chosen).sum(1, keepdim=True) / count.clamp_min(1)
        return mean.expand_as(chosen).reshape(-1), (count > 0).expand_as(chosen).reshape(-1)


def join(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of a whole batch from that of its slices."""
    tensors = [field.name for field in fields(Evidence) if field.name != "group_size"]
    whole: dict[str, Any] = {"group_size": parts[0].group_size}
    for name in tensors:
        columns = [getattr(part, name) for part in parts]
        whole[name] = None if columns[0] is None else torch.cat(columns)
    return Evidence(**whole)


def r_geo(expected_1000: Tensor, found_1000: Tensor) -> Tensor:
    """(GIoU + 1) / 2 of projected boxes and the boxes found in a view, (..., 4) x2 -> (...); 0
    where the found box has no area.
    """
    value = (geometry.giou(expected_1000, found_1000) + 1) / 2
    return torch.where(geometry.proper(found_1000), value, 0.0)


def beaf_cells(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The 2x2 table of (visible, visible after ghost), bool (N,) each: TU yes-no, IG no-yes, SB
    yes-yes, ID no-no.

    The names are BEAF's (arXiv 2407.13442) for the cells of this table; its own ID counts answers
    that an edit *elsewhere* changes, which is the figure `changed_elsewhere` here.
    """
    return {
        "TU": before & ~after,
        "IG": ~before & after,
        "SB": before & after,
        "ID": ~before & ~after,
    }
