"""Drawn scenes on disk with their labels in every form that is read, for tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from vise_fast.images import scenes
from vise_fast.system.randomness import generator

SIZE = 128


def drawn(count, seed=0):
    """So many scenes."""
    return [scenes.draw(generator(seed, i, "labelled"), size=SIZE) for i in range(count)]


def save(folder, drawn, first=0):
    """Pictures 000.png …; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{first + i:03d}.png" for i in range(len(drawn))]
    for path, scene in zip(paths, drawn, strict=True):
        Pillow.fromarray(scene.pixels).save(path)
    return paths


def px(thing, size=SIZE):
    return [value * size / 1000 for value in thing.box_1000]


def as_coco(place, paths, drawn):
    categories = {name: i + 1 for i, name in enumerate(scenes.NAMES)}
    rows = []
    for number, scene in enumerate(drawn):
        for thing in scene.objects:
            x1, y1, x2, y2 = px(thing)
            rows.append(
                {
                    "id": len(rows),
                    "image_id": number,
                    "category_id": categories[thing.name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                }
            )
    images = [
        {"id": i, "file_name": path.name, "height": SIZE, "width": SIZE}
        for i, path in enumerate(paths)
    ]
    named = [{"id": i, "name": name.replace(" ", "_")} for name, i in categories.items()]
    content = {"images": images, "annotations": rows, "categories": named}
    path = place / "labels.json"
    path.write_text(json.dumps(content))
    return path


def as_lines(place, paths, drawn):
    path = place / "labels.jsonl"
    rows = [
        {"image": file.name, "name": thing.name, "box": px(thing)}
        for file, scene in zip(paths, drawn, strict=True)
        for thing in scene.objects
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_points(place, paths, drawn):
    path = place / "points.jsonl"
    rows = []
    for file, scene in zip(paths, drawn, strict=True):
        marked = []
        for thing in scene.objects:
            x1, y1, x2, y2 = px(thing)
            marked.append({"label": thing.name, "point": [(x1 + x2) / 2, (y1 + y2) / 2]})
        rows.append({"file_name": file.name, "objects": marked})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_yolo(place, paths, drawn):
    """Beside the pictures."""
    for file, scene in zip(paths, drawn, strict=True):
        lines = []
        for thing in scene.objects:
            x1, y1, x2, y2 = np.array(thing.box_1000) / 1000
            numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            which = scenes.NAMES.index(thing.name)
            lines.append(" ".join([str(which), *(f"{value:.6f}" for value in numbers)]))
        file.with_suffix(".txt").write_text("\n".join(lines))
    folder = Path(paths[0]).parent
    (folder / "classes.txt").write_text("\n".join(scenes.NAMES))
    return folder


def as_voc(place, paths, drawn):
    folder = place / "Annotations"
    folder.mkdir()
    for file, scene in zip(paths, drawn, strict=True):
        parts = [f"<filename>{file.name}</filename>"]
        parts.append(f"<size><width>{SIZE}</width><height>{SIZE}</height></size>")
        for thing in scene.objects:
            corners = zip(("xmin", "ymin", "xmax", "ymax"), px(thing), strict=True)
            box = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
            parts.append(f"<object><name>{thing.name}</name><bndbox>{box}</bndbox></object>")
        path = folder / f"{file.stem}.xml"
        path.write_text(f"<annotation>{''.join(parts)}</annotation>")
    return folder


FORMS = {"coco": as_coco, "lines": as_lines, "yolo": as_yolo, "voc": as_voc}
