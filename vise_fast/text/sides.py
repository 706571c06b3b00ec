"""Left and right in a query: which queries name a side, and what to ask where a view mirrors it.

Run: `pytest tests/text/test_sides.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from vise_fast.config.schema import ViewConfig
from vise_fast.images.views import View

_SIDE = re.compile(r"\b(left|right)(?=(?:most|hand|ward|wards|side)?\b)", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}


def names_side(query: str) -> bool:
    """Whether a query speaks of left or right, so that a flip changes its meaning."""
    return _SIDE.search(query) is not None


def named_in(queries: Sequence[str | None]) -> Tensor:
    """Which of N queries name a side, bool (N,) on the CPU; None (unreadable) names none."""
    named = [query is not None and names_side(query) for query in queries]
    return torch.tensor(named, dtype=torch.bool)


def swap_sides(query: str) -> str:
    """left <-> right, also in leftmost, right-hand and the like; casing is kept."""
    return _SIDE.sub(
        lambda found: _in_casing_of(found.group(), _OTHER[found.group().lower()]), query
    )


def query_for(query: str, view: View, settings: ViewConfig) -> str:
    """The query to ask on a view: sides are swapped under a flip when `settings.side_words` says
    so.
    """
    return swap_sides(query) if view.kind == "flip" and settings.side_words == "swap" else query


def _in_casing_of(model: str, word: str) -> str:
    """`word` in lower case, as a title or in capitals, like `model`."""
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
