"""Grounding: every object of a scene is asked for, and its boxes are measured against the truth.

A gain may be one of size alone. So each arm's boxes are also measured after the constant rescale
that suits this arm best on other scenes: what survives that is a gain of place.
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
from vise_fast.images.listing.scan import Through
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
    """Figures of both kinds of answer; `scales`: the arm's best rescale per kind."""
    marks: Marks = {}
    for answers in answers_of(look, objects, arm):
        mark = Tally([objects.owner[row] for row in answers.rows], len(look))
        truth = objects.box_1000[answers.rows]
        figures = _figures(answers.boxes, truth, mark, scales[answers.kind])
        marks |= {f"{answers.kind}_{name}": value for name, value in figures.items()}
    return marks


def _figures(boxes: roles.Boxes, truth: Tensor, mark: Tally, scale: float) -> Marks:
    """Boxes (N,) against truth (N, 4); lengths are shares of the image's side."""
    box = boxes.box_1000
    placed = geometry.proper(box)
    iou = geometry.iou(box, truth)
    centre = (box[:, :2] + box[:, 2:]) / 2
    inside = ((centre >= truth[:, :2]) & (centre <= truth[:, 2:])).all(1) & placed
    error = torch.linalg.vector_norm(centre - (truth[:, :2] + truth[:, 2:]) / 2, dim=1) / 1000
    area = mark(geometry.area_share(box), placed)
    true_area = mark(geometry.area_share(truth), placed)
    return {
        "iou": mark(iou),
        "iou_50": mark(iou >= 0.5),
        "iou_rescaled": mark(geometry.iou(rescaled(box, scale), truth)),
        "centre_inside": mark(inside),
        "centre_error": mark(error, placed),
        "parse_rate": mark(boxes.readable),
        "area": area,
        "area_ratio": (area[0], true_area[0]),
    }


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
