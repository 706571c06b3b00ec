"""Pascal VOC: an XML file for each picture, `object` with `name` and `bndbox` (xmin, ymin, xmax,
ymax in pixels). Corners are taken as they stand: VOC's own count from 1, a pixel's difference.

An object that is marked difficult is no thing that could be asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree.ElementTree import Element

from vise_fast.images.labels import reading
from vise_fast.images.labels.label import XYXY, Mark, Sheet, Sheets, number, numbers
from vise_fast.images.labels.reading import Unreadable

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(paths: Iterable[Path]) -> Sheets:
    """Of as many files; one that is none is counted."""
    found = Sheets()
    for path in paths:
        try:
            root = reading.tree(reading.text(path, reading.LARGEST_OF_ONE))
        except Unreadable as fault:
            found.odd[f"files of which the first, {path.name}, {fault}"] += 1
            continue
        name = (root.findtext("filename") or "").strip() or path.stem
        sheet = found.of(name)
        _size(sheet, root)
        for thing in root.findall("object"):
            _take(found, sheet, thing)
    return found


def _size(sheet: Sheet, root: Element) -> None:
    height = number(root.findtext("size/height"))
    width = number(root.findtext("size/width"))
    if height is not None and width is not None and height >= 1 and width >= 1:
        sheet.size = (int(height), int(width))


def _take(found: Sheets, sheet: Sheet, thing: Element) -> None:
    name = (thing.findtext("name") or "").strip()
    box = numbers([thing.findtext(f"bndbox/{corner}") for corner in CORNERS], 4)
    if not name:
        found.odd["labels without a name"] += 1
    elif box is None:
        found.odd["labels without four finite numbers"] += 1
    else:
        easy = (thing.findtext("difficult") or "0").strip() != "1"
        sheet.marks.append(Mark(name, XYXY, box, easy))
