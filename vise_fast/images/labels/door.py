"""The one door to label files: what `eval.labels` names, by its form.

labels.json               COCO
labels.jsonl              JSON lines
data.yaml                 YOLO, the pictures to validate with
a folder                  of .xml (Pascal VOC), else one .json (COCO), else .txt (YOLO)
labels.xml                Pascal VOC, of one picture
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vise_fast.images.labels import coco, lines, reading, voc, yolo
from vise_fast.images.labels.label import Sheets
from vise_fast.images.labels.reading import Unreadable
from vise_fast.images.listing.walk import walk
from vise_fast.system.errors import DataError


def open_labels(place: Path) -> Sheets:
    """Everything that is marked there. Raises DataError, one line."""
    try:
        return _folder(place) if place.is_dir() else _file(place)
    except Unreadable as fault:
        raise DataError(
            f"the labels {place} cannot be used: it {fault}; give --eval.labels a COCO .json, a "
            ".jsonl, a YOLO data.yaml, or a folder of YOLO's .txt or Pascal VOC's .xml"
        ) from None


def _file(path: Path) -> Sheets:
    if not path.exists():
        raise Unreadable("is not there")
    readers: dict[str, Callable[[Path], Sheets]] = {
        ".json": coco.read,
        ".jsonl": lines.read,
        ".xml": lambda path: voc.read([path]),
        ".yaml": _data_yaml,
        ".yml": _data_yaml,
    }
    if path.suffix.lower() not in readers:
        raise Unreadable("is of no form that is known")
    return readers[path.suffix.lower()](path)


def _folder(folder: Path) -> Sheets:
    inside = _inside(folder)
    sheets = [path for path in inside if path.suffix.lower() == ".xml"]
    if sheets:
        return voc.read(sheets)
    of_coco = [path for path in inside if path.suffix.lower() == ".json"]
    if len(of_coco) == 1:
        return coco.read(of_coco[0])
    texts = [path for path in inside if yolo.is_label(path)]
    if texts:
        return yolo.read(texts, yolo.names_at(folder))
    raise Unreadable("holds no .xml, no .txt and not one .json of labels")


def _inside(folder: Path) -> list[Path]:
    """Every file of a folder and of those below it."""
    return sorted(folder / name for name in walk(folder, lambda name, reason: None))


def _data_yaml(path: Path) -> Sheets:
    settings = reading.settings(reading.text(path, reading.LARGEST_OF_ONE))
    folder = yolo.labels_of(path, settings)
    if not folder.is_dir():
        raise Unreadable(f"names pictures whose labels {folder} are not there")
    inside = _inside(folder)
    texts = [path for path in inside if yolo.is_label(path)]
    return yolo.read(texts, yolo.names_of(settings))
