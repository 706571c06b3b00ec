"""COCO's JSON: `images`, `annotations` with `bbox` [x, y, width, height] in pixels, `categories`.

Left out: masks, keypoints. A crowd is no thing that could be asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vise_fast.images.labels import reading
from vise_fast.images.labels.label import XYWH, Mark, Sheets, number, numbers
from vise_fast.images.labels.reading import Unreadable


def read(path: Path) -> Sheets:
    """Raises Unreadable."""
    content = reading.parsed(reading.text(path))
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), list) for p in parts):
        raise Unreadable("has no lists images, annotations and categories, as COCO's files do")
    found = Sheets()
    names = {_key(row.get("id")): row.get("name") for row in _rows(content["categories"])}
    pictures = _pictures(found, content["images"])
    for row in content["annotations"]:
        _take(found, row, names, pictures)
    return found


def _rows(values: list) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]


def _key(value: Any) -> str:
    """Ids are numbers or texts."""
    return str(value)[:100]


def _pictures(found: Sheets, rows: list) -> dict[str, str]:
    """{id: name}, and a sheet for each."""
    pictures = {}
    for row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            found.odd["pictures without a file_name"] += 1
            continue
        pictures[_key(row.get("id"))] = name
        height = number(row.get("height"))
        width = number(row.get("width"))
        known = height is not None and width is not None and height >= 1 and width >= 1
        found.of(name).size = (int(height), int(width)) if known else None  # type: ignore[arg-type]
    return pictures


def _take(found: Sheets, row: Any, names: dict[str, Any], pictures: dict[str, str]) -> None:
    row = row if isinstance(row, dict) else {}
    picture = pictures.get(_key(row.get("image_id")))
    name = names.get(_key(row.get("category_id")))
    box = numbers(row.get("bbox"), 4)
    if picture is None:
        found.odd["labels of no picture"] += 1
    elif not isinstance(name, str):
        found.odd["labels of no category"] += 1
    elif box is None:
        found.odd["labels without four finite numbers"] += 1
    else:
        found.of(picture).marks.append(Mark(name, XYWH, box, not row.get("iscrowd")))
