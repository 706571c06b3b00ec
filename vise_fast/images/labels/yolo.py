"""YOLO: a text file for each picture, a line for each thing: its class's number, then centre x, y,
width, height as shares of the picture. The classes' names stand in classes.txt, a .names file or a
data.yaml. A line of more numbers is a polygon, whose hull is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vise_fast.images.labels import reading
from vise_fast.images.labels.label import YOLO, Mark, Sheets, number, numbers
from vise_fast.images.labels.reading import Unreadable

NAMES = ("classes.txt", "obj.names", "classes.names")
NOT_LABELS = frozenset({"classes.txt", "train.txt", "val.txt", "test.txt"})


def is_label(path: Path) -> bool:
    """Whether a file may be one, as its name says."""
    return path.suffix.lower() == ".txt" and path.name not in NOT_LABELS


def read(paths: Iterable[Path], names: list[str]) -> Sheets:
    """Of as many files; pictures are called as they are, without their suffix."""
    found = Sheets()
    for path in paths:
        try:
            content = reading.text(path, reading.LARGEST_OF_ONE)
        except Unreadable as fault:
            found.odd[f"files of which the first, {path.name}, {fault}"] += 1
            continue
        sheet = found.of(str(path.with_suffix("")))
        for line in content.splitlines():
            if line.strip():
                mark = _mark(line.split(), names, found)
                sheet.marks += [] if mark is None else [mark]
    return found


def _mark(words: list[str], names: list[str], found: Sheets) -> Mark | None:
    which = words[0]
    values = numbers(words[1:], len(words) - 1)
    if values is None or not which.isascii() or not which.isdigit():
        found.odd["lines that are no class and finite numbers"] += 1
    elif int(which[:9]) >= len(names):
        found.odd["labels of a class without a name"] += 1
    elif len(values) in (4, 5):  # the fifth is a confidence
        return Mark(names[int(which)], YOLO, values[:4])
    elif len(values) >= 6 and len(values) % 2 == 0:
        return Mark(names[int(which)], YOLO, _hull(values))
    else:
        found.odd["lines of neither four numbers nor a polygon"] += 1
    return None


def _hull(values: tuple[float, ...]) -> tuple[float, ...]:
    """Centre and sides of a polygon's."""
    left, right = min(values[::2]), max(values[::2])
    top, bottom = min(values[1::2]), max(values[1::2])
    return ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)


def names_at(folder: Path) -> list[str]:
    """The classes' names, from the folder or the one above it. Raises Unreadable."""
    for place in (folder, folder.parent):
        found = [path for name in NAMES if (path := place / name).is_file()]
        found += sorted(place.glob("*.names"))
        if found:
            content = reading.text(found[0], reading.LARGEST_OF_ONE)
            return [line.strip() for line in content.splitlines() if line.strip()]
        for path in sorted(place.glob("*.y*ml")):
            content = reading.text(path, reading.LARGEST_OF_ONE)
            if "names" in reading.settings(content):
                return names_of(reading.settings(content))
    raise Unreadable("holds no classes.txt, .names or data.yaml that names the classes")


def names_of(settings: dict[str, Any]) -> list[str]:
    """Those of a data.yaml, a list or a mapping from numbers. Raises Unreadable."""
    if "kpt_shape" in settings:
        raise Unreadable("is of keypoints, which are not read")
    names = settings.get("names")
    if isinstance(names, dict):
        keys = [number(key) for key in names]
        if keys != list(range(len(keys))):
            raise Unreadable("names classes by other numbers than 0, 1, 2 …")
        names = list(names.values())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unreadable("has no names")
    return names


def labels_of(path: Path, settings: dict[str, Any]) -> Path:
    """The folder of labels of a data.yaml's pictures to validate with. Raises Unreadable."""
    root = settings.get("path")
    base = path.parent / root if isinstance(root, str) else path.parent
    for share in ("val", "test", "train"):
        images = settings.get(share)
        if isinstance(images, str) and images:
            parts = list((base / images).parts)
            for place in reversed(range(len(parts))):
                if parts[place] == "images":
                    parts[place] = "labels"
                    break
            return Path(*parts)
    raise Unreadable("names no folder of pictures (val, test or train)")
