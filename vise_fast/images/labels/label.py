"""A thing that somebody marked: as a file has it (`Mark`), and as it is measured against (`Label`).

Each file format writes boxes in a form of its own; a form turns its numbers into 0..1000.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vise_fast.images.geometry import Box

INSIDE = 0.5
"""A box of which less lies in the picture is left out; of others the part that does is taken."""
EDGE = 0.01
"""As a share of the side: so far beyond the edge is still meant as the edge."""


@dataclass(frozen=True)
class Mark:
    """`numbers` in the form's own order and unit; `asked`: whether it may be asked for (a crowd may
    not, and neither may others of its name beside it).
    """

    name: str
    form: str
    numbers: tuple[float, ...]
    asked: bool = True


@dataclass
class Sheet:
    """What a file says of one picture; `size` (height, width) in pixels where it says so."""

    picture: str
    marks: list[Mark] = field(default_factory=list)
    size: tuple[int, int] | None = None


@dataclass
class Sheets:
    """A label file that was read: `odd` counts what it holds that cannot be meant, by reason."""

    sheets: dict[str, Sheet] = field(default_factory=dict)
    odd: Counter[str] = field(default_factory=Counter)

    def of(self, picture: str) -> Sheet:
        """That of a picture, a new one where there is none."""
        return self.sheets.setdefault(picture, Sheet(picture))


@dataclass(frozen=True)
class Label:
    """`box_1000` x1, y1, x2, y2 in 0..1000; of a point both corners are it."""

    name: str
    box_1000: Box
    visible_share: float = 1.0

    @property
    def is_point(self) -> bool:
        """Whether a place was marked, not an extent."""
        return self.box_1000[:2] == self.box_1000[2:]


def numbers(values: Any, count: int) -> tuple[float, ...] | None:
    """So many finite numbers; None for anything else."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    found = [number(value) for value in values]
    known = tuple(value for value in found if value is not None)
    return known if len(known) == count else None


def number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


# ---- forms ---------------------------------------------------------------------------------------


def _corners_px(n: tuple[float, ...], height: int, width: int) -> Box:
    across = 1000 / width
    down = 1000 / height
    return (n[0] * across, n[1] * down, n[2] * across, n[3] * down)


def _corner_and_sides_px(n: tuple[float, ...], height: int, width: int) -> Box:
    return _corners_px((n[0], n[1], n[0] + n[2], n[1] + n[3]), height, width)


def _centre_and_sides(n: tuple[float, ...], height: int, width: int) -> Box:
    x, y, w, h = n
    return (1000 * (x - w / 2), 1000 * (y - h / 2), 1000 * (x + w / 2), 1000 * (y + h / 2))


def _corners_1000(n: tuple[float, ...], height: int, width: int) -> Box:
    return (n[0], n[1], n[2], n[3])


def _point_px(n: tuple[float, ...], height: int, width: int) -> Box:
    return _corners_px((n[0], n[1], n[0], n[1]), height, width)


def _point_1000(n: tuple[float, ...], height: int, width: int) -> Box:
    return (n[0], n[1], n[0], n[1])


def _corners(n: tuple[float, ...], height: int, width: int) -> Box:
    return (1000 * n[0], 1000 * n[1], 1000 * n[2], 1000 * n[3])


Form = Callable[[tuple[float, ...], int, int], Box]
"""(numbers, height, width in pixels) -> corners in 0..1000, as they come."""
FORMS: dict[str, Form] = {
    "x,y,w,h in pixels": _corner_and_sides_px,
    "x1,y1,x2,y2 in pixels": _corners_px,
    "centre x,y,w,h as shares": _centre_and_sides,
    "x1,y1,x2,y2 as shares": _corners,
    "x1,y1,x2,y2 in 0..1000": _corners_1000,
    "x,y in pixels": _point_px,
    "x,y in 0..1000": _point_1000,
}
XYWH, XYXY, YOLO, _, BOX_1000, POINT, POINT_1000 = FORMS
MISTAKEN_FOR = {
    XYWH: (XYXY, "x1,y1,x2,y2 as shares"),
    XYXY: (XYWH, "x1,y1,x2,y2 as shares"),
    YOLO: ("x1,y1,x2,y2 as shares", XYWH, XYXY),
}
"""What people write instead."""
MISTAKES = 0.25
"""Share of the boxes that cannot be meant in their form, from which on another is looked for. (Of
corners in a file for sides, and of sides in one for corners, half and more cannot.)
"""
NEARLY = 0.1
"""Of those, so many may be odd in the other form as well."""
SMALLEST_PX = 0.5
Sized = tuple[Mark, tuple[int, int]]
"""A mark, and (height, width) of its picture."""


def in_1000(mark: Mark, size: tuple[int, int]) -> Box | str:
    """The part of it in the picture of (height, width) pixels; a text says why there is none."""
    box = FORMS[mark.form](mark.numbers, *size)
    x1, y1, x2, y2 = (min(max(value, 0.0), 1000.0) for value in box)
    if len(mark.numbers) == 2:
        return (x1, y1, x2, y2) if _within(box) else "points outside their picture"
    if not _has_area(box, size):
        return "boxes without area"
    inside = (x2 - x1) * (y2 - y1)
    whole = (box[2] - box[0]) * (box[3] - box[1])
    return (x1, y1, x2, y2) if inside > INSIDE * whole else "boxes mostly outside their picture"


def _within(box: Box) -> bool:
    return min(box) >= -1000 * EDGE and max(box) <= 1000 * (1 + EDGE)


def _has_area(box: Box, size: tuple[int, int]) -> bool:
    """Whether its corners are in order, and half a pixel apart at least."""
    across = (box[2] - box[0]) * size[1] / 1000
    down = (box[3] - box[1]) * size[0] / 1000
    return min(across, down) >= SMALLEST_PX


def _odd(boxes: Sequence[Sized], form: str) -> int:
    """How many cannot be meant in a form."""
    found = [(FORMS[form](mark.numbers, *size), size) for mark, size in boxes]
    return sum(not (_within(box) and _has_area(box, size)) for box, size in found)


def mistaken(boxes: Sequence[Sized]) -> tuple[str, str] | None:
    """(the form that boxes should have, the one they are in): where a quarter of them and more
    (two at least) cannot be meant in their own form, and nearly all of them can in another. None
    where they are as they should be.

    boxes: with the (height, width) of their pictures, all of one form.
    """
    form = boxes[0][0].form if boxes else ""
    odd = _odd(boxes, form) if boxes else 0
    if odd < max(MISTAKES * len(boxes), 2):
        return None
    for other in MISTAKEN_FOR.get(form, ()):
        if _odd(boxes, other) <= NEARLY * odd:
            return form, other
    return None
