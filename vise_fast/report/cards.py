"""Sample cards: what one image went through in one step, as pictures with boxes and as verdicts.
Data for the page, no markup.

The view and the ghost are made again from the stored image with the run's own settings, so that
they show what the model and the judge saw. Left out: the look (report.html, report.css).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.images import geometry, views
from vise_fast.images import picture_file as decode
from vise_fast.method.experience import WITHOUT_GHOSTS
from vise_fast.report.record import Record
from vise_fast.system.errors import DataError

LONGEST = 480  # pixels of a picture on the page
MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Box:
    """A box in percent of the picture; `kind`: sampled, chosen, expected, found."""

    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Picture:
    """`src` a data URI; `ratio` width over height."""

    caption: str
    src: str
    ratio: float
    boxes: list[Box]


@dataclass(frozen=True)
class Verdict:
    """p(visible) of one picture; `wanted`: what a right answer is."""

    label: str
    p: float
    wanted: bool

    @property
    def right(self) -> bool:
        return (self.p >= 0.5) == self.wanted


@dataclass(frozen=True)
class Card:
    """`query` and `written` are the model's words: for escaping, not for trusting."""

    query: str
    name: str
    written: str
    reward: float | None
    pictures: list[Picture]
    verdicts: list[Verdict]


def cards(record: Record) -> list[tuple[str, list[Card]]]:
    """(title, cards) for the first, the middle and the last step shown.

    Raises DataError for cards a run does not write.
    """
    try:
        return [
            (title, [_card(record, sample) for sample in samples])
            for title, samples in record.shown_samples()
        ]
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, decode.BadImage) as fault:
        path = record.directory / "samples.jsonl"
        raise DataError(
            f"{path} is damaged: {type(fault).__name__} {fault}; delete it and write the report "
            "again"
        ) from fault


def _card(record: Record, sample: dict[str, Any]) -> Card:
    image = _pixels(record.directory, sample["image"])
    boxes = np.array(sample["boxes_1000"], float).reshape(-1, 4)
    readable = sample["readable"]
    rewards = sample.get("rewards") or [None] * len(boxes)
    placed = [n for n, box in enumerate(boxes) if readable[n] and (box[2:] > box[:2]).all()]
    best = (
        max(placed, key=lambda n: (rewards[n] if rewards[n] is not None else 0.0, -n))
        if placed
        else None
    )
    kinds = ["chosen" if n == best else "sampled" for n in placed]
    pictures = [
        Picture(
            _count(len(placed), len(boxes)),
            *_encoded(image),
            [_box(k, boxes[n]) for k, n in sorted(zip(kinds, placed, strict=True), reverse=True)],
        )
    ]
    if best is not None:
        pictures += _views(image, boxes[best], sample, record.config) + _ghost(
            image, boxes[best], record.config
        )
    written = (sample.get("written") or [""])[best or 0]
    judged = best is not None and _ghosts_were_judged(record.config, float(sample["seen"]))
    return Card(
        sample["query"],
        sample.get("name", ""),
        written,
        rewards[best] if best is not None else None,
        pictures,
        _verdicts(sample, best if judged else None),
    )


def _ghosts_were_judged(config: Config, seen: float) -> bool:
    """Whether the run asked about ghosts at all: zeros stand in the samples where it did not."""
    return (
        seen >= config.reward.gate
        and config.reward.w_sem > 0
        and config.reward.name not in WITHOUT_GHOSTS
    )


def _count(placed: int, total: int) -> str:
    return (
        f"{total} sampled boxes"
        if placed == total
        else f"{placed} of {total} sampled answers are boxes"
    )


def _views(image: Tensor, box: np.ndarray, sample: dict[str, Any], config: Config) -> list[Picture]:
    """Each view with the box it should show and the one that was found there."""
    found = []
    height, width = image.shape[:2]
    for entry, answer in zip(
        sample.get("views") or [], sample.get("view_boxes_1000") or [], strict=True
    ):
        view = views.View(entry["kind"], torch.tensor(entry["matrix_px"], dtype=torch.float64))
        expected = geometry.project_1000(
            torch.from_numpy(box), view.matrix_px, height, width, config.reward.projection
        ).numpy()
        boxes = [_box("expected", expected)] + (
            [_box("found", answer)] if geometry.proper(answer) else []
        )
        found.append(
            Picture(
                f"{view.kind}: expected, found", *_encoded(views.apply([image], [view])[0]), boxes
            )
        )
    return found


def _ghost(image: Tensor, box: np.ndarray, config: Config) -> list[Picture]:
    ghost = views.ghost(
        [image],
        torch.tensor([0]),
        torch.from_numpy(box)[None],
        config.ghost,
        literal=config.view.literal_pixels,
    )[0]
    return [Picture("the box hidden, as judged", *_encoded(ghost), [])]


def _verdicts(sample: dict[str, Any], best: int | None) -> list[Verdict]:
    """What the judge said of the image and, where a judged box is given, of its ghosts."""
    found = [Verdict("as it is", float(sample["seen"]), True)]
    for name, label, wanted in (
        ("gone", "box hidden", False),
        ("control", "elsewhere hidden", True),
        ("keep", "the rest hidden", True),
    ):
        values = sample.get(name)
        if best is not None and values is not None:
            found.append(Verdict(label, float(np.mean(values[best])), wanted))
    return found


def _box(kind: str, box_1000: Sequence[float]) -> Box:
    x1, y1, x2, y2 = (float(v) / 10 for v in geometry.clean_1000(box_1000).tolist())
    return Box(kind, x1, y1, x2 - x1, y2 - y1)


def _pixels(directory: Path, name: str) -> Tensor:
    """The stored picture, uint8 (H, W, 3).

    Raises BadImage, ValueError for a path that leaves the run.
    """
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ValueError(f"{name} lies outside the run")
    return torch.from_numpy(np.array(decode.decode(path, MAX_PIXELS)))


def _encoded(pixels: Tensor) -> tuple[str, float]:
    """(data URI, width over height): PNG for small pictures, JPEG for large ones."""
    height, width = pixels.shape[:2]
    picture = Pillow.fromarray(pixels.numpy())
    buffer = io.BytesIO()
    if max(height, width) <= 256:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((LONGEST, LONGEST))
        picture.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return (
        f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        width / height,
    )
