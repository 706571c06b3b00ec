"""Samples: what one image went through in one step, as pictures with boxes and as verdicts. Data
for the page, no markup.

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
from vise_fast.images import geometry, picture_file, views
from vise_fast.images.picture_file import BadImage
from vise_fast.method.evidence import VISIBLE
from vise_fast.method.step_plan import WITHOUT_GHOSTS
from vise_fast.report.stored_run import StoredRun
from vise_fast.system.errors import DataError

LONGEST = 480  # pixels of a picture on the page
STRIP = 8
"""Frames of the strip of boxes over training."""
SMALL = 200  # pixels of a frame
MAX_PIXELS = 50_000_000
FAULTS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    BadImage,
)
"""What a line raises that no run wrote."""


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
        """Whether the judge said what was wanted; 0.5 counts as yes."""
        return (self.p >= VISIBLE) == self.wanted


@dataclass(frozen=True)
class Sample:
    """`query` and `written` are the model's words: for escaping, not for trusting."""

    query: str
    name: str
    written: str
    reward: float | None
    pictures: list[Picture]
    verdicts: list[Verdict]


def samples(run: StoredRun) -> dict[str, list[Sample]]:
    """Title -> samples, for the first, the middle and the last step that left some.

    Raises DataError for lines a run does not write.
    """
    found = {}
    try:
        for title, lines in run.shown_samples().items():
            found[title] = [_sample(line, run) for line in lines]
    except FAULTS as fault:
        raise _damaged(run.directory, fault) from fault
    return found


def strip(run: StoredRun) -> list[Picture]:
    """The sampled boxes of one image each, from up to STRIP steps spread over the training.

    Raises DataError for lines a run does not write.
    """
    first: dict[int, dict[str, Any]] = {}
    for line in run.samples:
        first.setdefault(line["step"], line)
    steps = sorted(first)
    places = np.linspace(0, len(steps) - 1, min(STRIP, len(steps))).round().astype(int)
    try:
        return [_frame(first[steps[place]], run.directory) for place in places]
    except FAULTS as fault:
        raise _damaged(run.directory, fault) from fault


def _frame(line: dict[str, Any], directory: Path) -> Picture:
    """One image with its sampled boxes, small."""
    image = Pillow.fromarray(_pixels(directory, line["image"]).numpy())
    image.thumbnail((SMALL, SMALL))
    boxes = torch.tensor(line["boxes_1000"], dtype=torch.float64).reshape(-1, 4)
    drawn = [_box("sampled", boxes[n]) for n in _placed(boxes, line["readable"])]
    return _picture(f"step {line['step']}", torch.from_numpy(np.array(image)), drawn)


def _damaged(directory: Path, fault: BaseException) -> DataError:
    return DataError(
        f"{directory / 'samples.jsonl'} is damaged: {type(fault).__name__} {fault}; delete it and "
        "write the report again"
    )


def _sample(line: dict[str, Any], run: StoredRun) -> Sample:
    """One line of samples.jsonl as it is shown."""
    image = _pixels(run.directory, line["image"])
    boxes = torch.tensor(line["boxes_1000"], dtype=torch.float64).reshape(-1, 4)
    rewards = line.get("rewards") or [None] * len(boxes)
    placed = _placed(boxes, line["readable"])
    best = max(placed, key=lambda n: (rewards[n] or 0.0, -n)) if placed else None
    pictures = [_sampled_boxes(image, boxes, placed, best)]
    if best is not None:
        pictures += _views(image, boxes[best], line, run.config)
        pictures.append(_ghost(image, boxes[best], run.config))
    judged = _ghosts_were_judged(run.config, float(line["seen"]))
    return Sample(
        query=line["query"],
        name=line.get("name", ""),
        written=(line.get("written") or [""])[best or 0],
        reward=None if best is None or rewards[best] is None else float(rewards[best]),
        pictures=pictures,
        verdicts=_verdicts(line, best if judged else None),
    )


def _placed(boxes: Tensor, readable: list[bool]) -> list[int]:
    """The answers that are boxes with area."""
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1).tolist()
    return [n for n in range(len(boxes)) if readable[n] and has_area[n]]


def _ghosts_were_judged(config: Config, seen: float) -> bool:
    """Whether the run asked about ghosts at all: zeros stand in the samples where it did not."""
    return (
        seen >= config.reward.gate
        and config.reward.w_sem > 0
        and config.reward.name not in WITHOUT_GHOSTS
    )


def _sampled_boxes(image: Tensor, boxes: Tensor, placed: list[int], best: int | None) -> Picture:
    """The image with every box that was sampled; the chosen one is drawn last, on top."""
    caption = f"{len(boxes)} sampled boxes"
    if len(placed) < len(boxes):
        caption = f"{len(placed)} of {len(boxes)} sampled answers are boxes"
    drawn = [_box("sampled", boxes[n]) for n in reversed(placed) if n != best]
    if best is not None:
        drawn.append(_box("chosen", boxes[best]))
    return _picture(caption, image, drawn)


def _views(image: Tensor, box: Tensor, line: dict[str, Any], config: Config) -> list[Picture]:
    """Each view with the box it should show and the one that was found there."""
    found = []
    height, width = image.shape[:2]
    answers = line.get("view_boxes_1000") or []
    for entry, answer in zip(line.get("views") or [], answers, strict=True):
        view = views.View(entry["kind"], torch.tensor(entry["matrix_px"], dtype=torch.float64))
        expected = geometry.project_1000(
            box, view.matrix_px, height, width, config.reward.projection
        )
        boxes = [_box("expected", expected)]
        if geometry.proper(answer):
            boxes.append(_box("found", answer))
        moved = views.apply([image], [view])[0]
        found.append(_picture(f"{view.kind}: expected, found", moved, boxes))
    return found


def _ghost(image: Tensor, box: Tensor, config: Config) -> Picture:
    ghosts = views.ghost(
        [image],
        torch.tensor([0]),
        box[None],
        config.ghost,
        literal=config.view.literal_pixels,
    )
    return _picture("the box hidden, as judged", ghosts[0], [])


def _verdicts(line: dict[str, Any], best: int | None) -> list[Verdict]:
    """What the judge said of the image and, where a judged box is given, of its ghosts."""
    found = [Verdict("as it is", float(line["seen"]), True)]
    further = line.get("further")
    settled = best is not None and further is not None and not further[best]
    for name, label, wanted in (
        ("gone", "box hidden", False),
        ("control", "elsewhere hidden", True),
        ("keep", "the rest hidden", True),
    ):
        values = None if settled and name != "gone" else line.get(name)
        if best is not None and values is not None:
            found.append(Verdict(label, float(np.mean(values[best])), wanted))
    return found


def _box(kind: str, box_1000: Tensor | Sequence[float]) -> Box:
    x1, y1, x2, y2 = (float(v) / 10 for v in geometry.clean_1000(box_1000).tolist())
    return Box(kind, x1, y1, x2 - x1, y2 - y1)


def _pixels(directory: Path, name: str) -> Tensor:
    """The stored picture, uint8 (H, W, 3).

    Raises BadImage, ValueError for a path that leaves the run.
    """
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ValueError(f"{name} lies outside the run")
    return torch.from_numpy(np.array(picture_file.decode(path, MAX_PIXELS)))


def _picture(caption: str, pixels: Tensor, boxes: list[Box]) -> Picture:
    """Pixels uint8 (H, W, 3), as PNG where they are few, else as JPEG."""
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
    content = base64.b64encode(buffer.getvalue()).decode()
    return Picture(caption, f"data:image/{kind};base64,{content}", width / height, boxes)
