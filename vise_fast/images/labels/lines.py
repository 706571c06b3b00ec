"""JSON lines: a picture and a thing, or several, on each.

{"image": "a.jpg", "name": "red cup", "box": [x1, y1, x2, y2]}         pixels, two corners
{"image": "a.jpg", "name": "red cup", "bbox": [x, y, width, height]}   pixels, as COCO
{"image": "a.jpg", "name": "red cup", "box_1000": [x1, y1, x2, y2]}    0..1000 of either side
{"image": "a.jpg", "name": "red cup", "point": [x, y]}                 pixels; or point_1000
{"image": "a.jpg", "objects": [{"name": …, "box": …}, …]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vise_fast.images.albums.listed import COLUMNS
from vise_fast.images.labels import reading
from vise_fast.images.labels.label import (
    BOX_1000,
    POINT,
    POINT_1000,
    XYWH,
    XYXY,
    Mark,
    Sheet,
    Sheets,
    number,
    numbers,
)

KEYS = {"box": XYXY, "bbox": XYWH, "box_1000": BOX_1000, "point": POINT, "point_1000": POINT_1000}
NAMES = ("name", "label", "class", "category")


def read(path: Path) -> Sheets:
    """Raises Unreadable."""
    found = Sheets()
    for _, row in reading.lines(reading.text(path)):
        picture = _first(row, COLUMNS)
        if picture is None:
            found.odd["lines that name no picture"] += 1
            continue
        sheet = found.of(picture)
        _size(sheet, row)
        things = row.get("objects", [row])
        for thing in things if isinstance(things, list) else [None]:
            _take(found, sheet, thing)
    return found


def _first(row: Any, keys: tuple[str, ...]) -> str | None:
    """The first text under one of some keys."""
    texts = [row.get(key) for key in keys] if isinstance(row, dict) else []
    return next((text for text in texts if isinstance(text, str) and text), None)


def _size(sheet: Sheet, row: dict[str, Any]) -> None:
    height = number(row.get("height"))
    width = number(row.get("width"))
    if height is not None and width is not None and height >= 1 and width >= 1:
        sheet.size = (int(height), int(width))


def _take(found: Sheets, sheet: Sheet, thing: Any) -> None:
    name = _first(thing, NAMES)
    if name is None:
        found.odd["labels without a name"] += 1
        return
    key = next((key for key in KEYS if key in thing), "box")
    values = numbers(thing.get(key), 2 if key.startswith("point") else 4)
    if values is None:
        found.odd["labels without four finite numbers, or two of a point"] += 1
    else:
        sheet.marks.append(Mark(name, KEYS[key], values, not thing.get("crowd")))
