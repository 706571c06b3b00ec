"""Grounding: every object of a scene is asked for, and its boxes are measured against the truth.

A gain may be one of size alone. So each arm's boxes are also measured after the constant rescale
that suits this arm best on other images: what survives that is a gain of place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate.look import Look, Tally
from vise_fast.evaluate.objects import Objects
from vise_fast.evaluate.results import Marks
from vise_fast.images import geometry
from vise_fast.images.image import Image
from vise_fast.images.listing.through import Through
from vise_fast.images.scenes import Scene
from vise_fast.method import roles
from vise_fast.method.roles import Question, Sampling
from vise_fast.system import randomness

# Of equals the gentlest is taken.
SCALES = sorted(np.linspace(0.5, 1.5, 41).tolist(), key=lambda scale: abs(scale - 1))
KINDS = ("greedy", "sampled")


@dataclass(frozen=True)
class Answers:
    """Boxes of one kind (greedy or sampled) for the objects of a batch; `rows`: the object of each
    box.
    """

    kind: str
    boxes: roles.Boxes
    rows: list[int]


def answers_of(look: Look, objects: Objects, arm: bool) -> Iterator[Answers]:
    """The greedy answers, then eval.samples sampled ones per object."""
    greedy = look.boxes(look.prefix(arm), objects.owner, objects.names)
    yield Answers("greedy", greedy, list(range(len(objects))))
    sampling = Sampling(look.config.rollout.box_tokens)
    questions = _sampled_questions(look, objects)
    sampled = roles.ground(look.engine, look.prefix(arm), questions, sampling)
    yield Answers("sampled", sampled, sampled.owner)


def _sampled_questions(look: Look, objects: Objects) -> list[Question]:
    samples = look.config.eval.samples
    questions = []
    for name, scene, rank in zip(objects.names, objects.owner, objects.ranks, strict=True):
        places = range(rank * samples, (rank + 1) * samples)
        seeds = [look.key(scene, "ground", place) for place in places]
        questions.append(Question(scene, name, seeds))
    return questions


def measure(look: Look, objects: Objects, arm: bool, scales: dict[str, float]) -> Marks:
    """Figures of both kinds of answer; `scales`: the arm's best rescale per kind, none for labelled
    pictures, whose figures are also made by class, and whose rescale is `cross_fitted` later.
    """
    marks: Marks = {}
    for answers in answers_of(look, objects, arm):
        rows = Tally([objects.owner[row] for row in answers.rows], len(look))
        truth = objects.box_1000[answers.rows]
        figures = _figures(answers.boxes, truth, rows)
        if scales:
            scale = scales[answers.kind]
            figures |= _rescaled(answers.boxes, truth, rows, scale)
        else:
            names = [objects.names[row] for row in answers.rows]
            figures |= _by_class(answers.boxes, truth, rows, names)
            figures |= _at_every_scale(answers.boxes, truth, rows)
        marks |= {f"{answers.kind}_{name}": value for name, value in figures.items()}
    return marks


def _figures(boxes: roles.Boxes, truth: Tensor, mark: Tally) -> Marks:
    """Boxes (N,) against truth (N, 4); lengths are shares of the image's side."""
    box = boxes.box_1000
    placed = geometry.proper(box)
    centre = _centre(box)
    error = torch.linalg.vector_norm(centre - _centre(truth), dim=1) / 1000
    return {
        **_main(boxes, truth, mark),
        "centre_error": mark(error, placed),
        "parse_rate": mark(boxes.readable),
        "area": mark(geometry.area_share(box), placed),
    }


def _main(boxes: roles.Boxes, truth: Tensor, mark: Tally, of: Tensor | None = None) -> Marks:
    """The figures that classes have as well; `of` (N,) bool: the rows of one."""
    box = boxes.box_1000
    placed = geometry.proper(box)
    iou = geometry.iou(box, truth)
    inside = _within(_centre(box), truth) & placed
    sized = placed if of is None else placed & of
    area = mark(geometry.area_share(box), sized)
    true_area = mark(geometry.area_share(truth), sized)
    return {
        "iou": mark(iou, of),
        "iou_50": mark(iou >= 0.5, of),
        "centre_inside": mark(inside, of),
        "area_ratio": (area[0], true_area[0]),
    }


def _centre(box: Tensor) -> Tensor:
    return (box[:, :2] + box[:, 2:]) / 2


def _within(point: Tensor, box: Tensor) -> Tensor:
    return ((point >= box[:, :2]) & (point <= box[:, 2:])).all(1)


def _rescaled(boxes: roles.Boxes, truth: Tensor, mark: Tally, scale: float) -> Marks:
    return {"iou_rescaled": mark(geometry.iou(rescaled(boxes.box_1000, scale), truth))}


def _at_every_scale(boxes: roles.Boxes, truth: Tensor, mark: Tally) -> Marks:
    """For `cross_fitted`."""
    return {
        f"iou@{n}": _rescaled(boxes, truth, mark, scale)["iou_rescaled"]
        for n, scale in enumerate(SCALES)
    }


def _by_class(boxes: roles.Boxes, truth: Tensor, mark: Tally, names: list[str]) -> Marks:
    """The main figures of each class, called `figure:class`."""
    found: Marks = {}
    for name in dict.fromkeys(names):
        of = torch.tensor([other == name for other in names])
        main = _main(boxes, truth, mark, of)
        found |= {f"{figure}:{name}": value for figure, value in main.items()}
    return found


def cross_fitted(marks: Marks) -> tuple[Marks, dict[str, float]]:
    """Of labelled pictures, which cannot be drawn anew: `iou_rescaled` in place of the IoU at every
    scale, and the best scale of each kind. Each half of the pictures is rescaled by what suits the
    other half best, so that none has a say in its own.
    """
    found = dict(marks)
    best = {}
    for kind in KINDS:
        names = [f"{kind}_iou@{n}" for n in range(len(SCALES))]
        if names[0] not in found:
            continue
        rows = [found.pop(name) for name in names]
        tops = np.stack([top for top, _ in rows])
        bottom = rows[0][1]
        odd = np.cumsum(bottom > 0) % 2 == 1
        of_odd = tops[:, odd].sum(1).argmax()
        of_even = tops[:, ~odd].sum(1).argmax()
        found[f"{kind}_iou_rescaled"] = (np.where(odd, tops[of_even], tops[of_odd]), bottom)
        best[f"{kind}_scale"] = SCALES[int(tops.sum(1).argmax())]
    return found, best


def measure_points(look: Look, points: Objects, arm: bool) -> Marks:
    """Boxes against places that were marked: whether the box holds the place, how far its centre
    lies from it in sides of the image, and how much the box covers.
    """
    marks: Marks = {}
    for answers in answers_of(look, points, arm):
        mark = Tally([points.owner[row] for row in answers.rows], len(look))
        box = answers.boxes.box_1000
        place = points.box_1000[answers.rows][:, :2]
        placed = geometry.proper(box)
        error = torch.linalg.vector_norm(_centre(box) - place, dim=1) / 1000
        figures = {
            "point_inside": mark(_within(place, box) & placed),
            "point_error": mark(error, placed),
            "point_area": mark(geometry.area_share(box), placed),
        }
        marks |= {f"{answers.kind}_{name}": value for name, value in figures.items()}
    return marks


# ---- the rescale ---------------------------------------------------------------------------------


def rescaled(box_1000: Tensor, scale: float) -> Tensor:
    """Boxes (..., 4) with both sides times `scale` about their centres, clamped to the image."""
    centre = (box_1000[..., :2] + box_1000[..., 2:]) / 2
    half = (box_1000[..., 2:] - box_1000[..., :2]) / 2 * scale
    return torch.cat([centre - half, centre + half], -1).clamp(0, 1000)


def best_scales(
    engine: Engine,
    draw: Callable[[int], Scene],
    config: Config,
    through: Through,
    arms: Sequence[bool],
) -> list[dict[str, float]]:
    """Per arm and kind of answer, the factor of SCALES under which its boxes fit best, on half as
    many scenes that are not reported. `draw`: image key -> scene; through: shows how far it is.
    """
    tables = [_ScaleTable() for _ in arms]
    count = (config.eval.scenes + 1) // 2
    for first in through(range(0, count, config.eval.batch), "evaluate sizes"):
        places = range(first, min(first + config.eval.batch, count))
        keys = [randomness.key(config.eval.seed, 0, "validation scene", i) for i in places]
        scenes = [draw(key) for key in keys]
        images = [
            Image(torch.from_numpy(scene.pixels), "validation scene", key)
            for scene, key in zip(scenes, keys, strict=True)
        ]
        # Places after the reported scenes', so that no draw is used twice.
        look = Look(engine, images, config.eval.scenes + first, config)
        objects = Objects.of(scenes)
        for arm, table in zip(arms, tables, strict=True):
            table.add(look, objects, arm)
    return [table.best() for table in tables]


class _ScaleTable:
    """IoU of one arm's boxes with the truth under every scale."""

    def __init__(self) -> None:
        self.iou: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}

    def add(self, look: Look, objects: Objects, arm: bool) -> None:
        """The answers about one batch, (len(SCALES), N) per kind."""
        for answers in answers_of(look, objects, arm):
            box = answers.boxes.box_1000
            truth = objects.box_1000[answers.rows]
            iou = [geometry.iou(rescaled(box, scale), truth) for scale in SCALES]
            self.iou[answers.kind].append(torch.stack(iou))

    def best(self) -> dict[str, float]:
        """The best scale of each kind."""
        means = {kind: torch.cat(iou, 1).mean(1) for kind, iou in self.iou.items()}
        return {kind: SCALES[int(mean.argmax())] for kind, mean in means.items()}
