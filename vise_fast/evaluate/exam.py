"""The questions of the held-out exam, for one batch of images and one arm (adapters on or off) at a
time. Answers become marks.

An image is encoded once for both arms and read once per arm; everything asked about it forks that
prefix. Every draw is named by (eval.seed, scene), so neither the batch size nor the other arm
changes an answer. Left out: which images, which arms, statistics (evaluate.py, figures.py); what
the figures are called (glossary.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.attention_meter import image_share
from vise_fast.engine.fast import Engine, Features, Prefixes
from vise_fast.evaluate.figures import Marks
from vise_fast.images import geometry, views
from vise_fast.images.scenes import NAMES, Scene, Thing
from vise_fast.images.sources import Image
from vise_fast.method import roles
from vise_fast.method.rewards import LARGE_AREA
from vise_fast.system import randomness
from vise_fast.text import sides

CLEARLY_VISIBLE = 0.5  # objects of which less shows are not asked about with yes or no
GREY = 128


class Look:
    """A batch of images as the engine sees it; `first` is its place in the whole exam.

    What both arms need is made once.
    """

    def __init__(self, engine: Engine, images: list[Image], first: int, config: Config) -> None:
        self.engine = engine
        self.images = images
        self.first = first
        self.config = config
        self.pixels = [image.pixels.to(engine.device, non_blocking=True) for image in images]
        self.everyone = list(range(len(images)))
        self.features = engine.encode(self.pixels)
        self._prefixes: dict[bool, Prefixes] = {}

    def __len__(self) -> int:
        return len(self.images)

    def prefix(self, arm: bool) -> Prefixes:
        if arm not in self._prefixes:
            self._prefixes[arm] = self.engine.prefill(self.features, adapters=arm)
        return self._prefixes[arm]

    @cached_property
    def queries(self) -> list[str]:
        """The base's most likely query about each image."""
        limit = self.config.rollout.query_tokens
        return roles.ask(
            self.engine, self.prefix(False), self.everyone, [0] * len(self), limit, temperature=0.0
        ).texts

    @cached_property
    def views(self) -> tuple[list[list[views.View]], Features]:
        """rollout.views views of each image, and their features in that order."""
        many = self.config.rollout.views
        config = self.config.view
        drawn = [
            [views.draw_view(self.rng(i, "view", k), *p.shape[:2], config) for k in range(many)]
            for i, p in enumerate(self.pixels)
        ]
        moved = views.apply(
            [p for p in self.pixels for _ in range(many)], [view for row in drawn for view in row]
        )
        return drawn, self.engine.encode(moved)

    def own_queries(self, arm: bool) -> roles.Queries:
        """A sampled query of the arm's own about each image."""
        seeds = [self.key(i, "ask") for i in self.everyone]
        return roles.ask(
            self.engine, self.prefix(arm), self.everyone, seeds, self.config.rollout.query_tokens
        )

    def rng(self, image: int, purpose: str, index: int = 0) -> np.random.Generator:
        return randomness.generator(self.config.eval.seed, self.first + image, purpose, index)

    def key(self, image: int, purpose: str, index: int = 0) -> int:
        return randomness.key(self.config.eval.seed, self.first + image, purpose, index)


def _mark(values, owner: Sequence[int], count: int, of=None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values (N,) and of the rows counted (`of` (N,) bool; all), per scene: owner[n] of
    `count`.
    """
    weights = np.ones(len(owner)) if of is None else np.asarray(of, float)
    values = np.where(weights > 0, np.asarray(values, float), 0.0)
    return np.bincount(owner, values * weights, count), np.bincount(owner, weights, count)


# ---- what needs no labels ------------------------------------------------------------------------


def without_labels(look: Look, arm: bool, own: roles.Queries) -> tuple[Marks, Tensor | None]:
    """Boxes, agreement between views, hiding, and the attention share (layers, images), on queries
    that the base wrote.

    Both arms are asked the same queries and judged by the same judge (the base), so that the
    difference is the boxes'. `own`: what the arm itself would ask.
    """
    config = look.config
    count = len(look)
    boxes = _ground(look, arm, look.everyone, look.queries)
    placed = geometry.proper(boxes.box_1000)
    area = geometry.area_share(boxes.box_1000)
    mark = lambda values, of=None: _mark(values, look.everyone, count, of)
    marks = {
        "query_parse_rate": mark(own.readable),
        "own_parse_rate": mark(boxes.readable),
        "own_area": mark(area, placed),
        "own_area_large": mark(area > LARGE_AREA, placed),
    }
    marks |= _invariance(look, arm, boxes.box_1000, placed) | _hiding(look, boxes.box_1000, placed)
    if not config.eval.attention or not isinstance(
        look.engine, Engine
    ):  # the stock engine keeps no keys to measure
        return marks, None
    share = image_share(look.engine, look.prefix(arm), look.everyone, boxes.rows, boxes.answers)
    return marks | {"attention_share": mark(share.mean(0))}, share


def _ground(
    look: Look, arm: bool, owner: list[int], names: list[str], prefixes: Prefixes | None = None
) -> roles.Boxes:
    """One greedy box per name."""
    limit = look.config.rollout.box_tokens
    rows = len(names)
    return roles.ground(
        look.engine,
        prefixes or look.prefix(arm),
        owner,
        names,
        [1] * rows,
        [0] * rows,
        limit,
        temperature=0.0,
    )


def _invariance(look: Look, arm: bool, box_1000: Tensor, placed: Tensor) -> Marks:
    """R_geo (METHOD section 1.5) of greedy boxes in the views; a box that cannot be read, or has no
    area, in a view agrees by 0.
    """
    config = look.config
    (drawn, features) = look.views
    flat = [view for row in drawn for view in row]
    owner = [i for i, row in enumerate(drawn) for _ in row]
    texts = [
        sides.query_for(look.queries[i], view, config.view)
        for i, view in zip(owner, flat, strict=True)
    ]
    found = _ground(
        look, arm, list(range(len(flat))), texts, look.engine.prefill(features, arm)
    ).box_1000
    height, width = (torch.tensor([p.shape[side] for p in look.pixels]) for side in (0, 1))
    expected = geometry.project_1000(
        box_1000[owner],
        views.stack(drawn).flatten(0, 1),
        height[owner],
        width[owner],
        config.reward.projection,
    )
    agreement = torch.where(geometry.proper(found), (geometry.giou(expected, found) + 1) / 2, 0.0)
    sided = sides.named_in(look.queries)
    usable = views.usable(drawn, box_1000, sided, height, width, config.view).flatten()
    return {"invariance": _mark(agreement, owner, len(look), usable & placed[owner])}


def _hiding(look: Look, box_1000: Tensor, placed: Tensor) -> Marks:
    """The 2x2 table of (seen, seen after the arm's box was ghosted), judged by the base: TU means
    the box held the object.
    """
    rows = placed.nonzero()[:, 0].tolist()
    seen = roles.verify_forked(look.engine, look.prefix(False), look.everyone, look.queries) >= 0.5
    gone = torch.zeros(len(look), dtype=torch.bool)
    if rows:
        ghosts = look.engine.encode(_ghosts(look, rows, box_1000[rows]))
        gone[rows] = (
            roles.verify(look.engine, ghosts, [look.queries[i] for i in rows], adapters=False)
            >= 0.5
        )
    return {
        f"own_{name}": _mark(cell, look.everyone, len(look), placed)
        for name, cell in _table(seen, gone).items()
    }


def _ghosts(look: Look, owner: list[int], box_1000: Tensor) -> list[Tensor]:
    config = look.config
    return views.ghost(
        look.pixels, torch.tensor(owner), box_1000, config.ghost, literal=config.view.literal_pixels
    )


def _table(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """BEAF's cells of (visible, visible after the object was hidden)."""
    return {
        "TU": before & ~after,
        "IG": ~before & after,
        "SB": before & after,
        "ID": ~before & ~after,
    }


# ---- what a scene's truth adds -------------------------------------------------------------------


@dataclass
class Truths:
    """Every object of a batch of scenes, one row each; features of the scenes with the object, or
    something else, hidden.
    """

    scenes: list[Scene]
    things: list[Thing]
    owner: list[int]
    lookalikes: list[str]
    gone: Features
    aside: Features | None
    far: list[int]

    @property
    def names(self) -> list[str]:
        return [thing.name for thing in self.things]

    @property
    def box_1000(self) -> Tensor:
        return torch.tensor([thing.box_1000 for thing in self.things], dtype=torch.float64)

    @property
    def clear(self) -> np.ndarray:
        """Bool (N,): enough of the object shows for a yes."""
        return np.array([thing.visible_share >= CLEARLY_VISIBLE for thing in self.things])


def objects_of(scenes: list[Scene]) -> tuple[list[Thing], list[int]]:
    """Every object whose name is no other object's, and its scene."""
    rows = [
        (thing, i)
        for i, scene in enumerate(scenes)
        for thing in scene.objects
        if scene.names.count(thing.name) == 1
    ]
    return [thing for thing, _ in rows], [i for _, i in rows]


def truths_of(look: Look, draw: Callable[[int], Scene]) -> Truths:
    """`draw`: image key -> scene."""
    scenes = [draw(image.key) for image in look.images]
    things, owner = objects_of(scenes)
    ranks = [owner[:n].count(i) for n, i in enumerate(owner)]
    lookalikes = [
        _lookalike(look.rng(i, "lookalike", rank), thing, scenes[i])
        for thing, i, rank in zip(things, owner, ranks, strict=True)
    ]
    placed = [
        views.control_box(look.rng(i, "aside", rank), thing.box_1000)
        for thing, i, rank in zip(things, owner, ranks, strict=True)
    ]
    far = [n for n, (_, kind) in enumerate(placed) if kind == "far"]
    gone = look.engine.encode(
        _ghosts(
            look, owner, torch.tensor([thing.box_1000 for thing in things], dtype=torch.float64)
        )
    )
    elsewhere = torch.tensor([placed[n][0] for n in far], dtype=torch.float64)
    aside = look.engine.encode(_ghosts(look, [owner[n] for n in far], elsewhere)) if far else None
    return Truths(scenes, things, owner, lookalikes, gone, aside, far)


def _lookalike(rng: np.random.Generator, thing: Thing, scene: Scene) -> str:
    """An absent name that shares colour or shape with the object (POPE's adversarial negatives,
    arXiv 2305.10355).
    """
    pool = [
        name
        for name in NAMES
        if name not in scene.names and {thing.color, thing.shape} & set(name.split())
    ]
    return pool[int(rng.integers(len(pool)))]


def with_truth(
    look: Look, truths: Truths, arm: bool, own: roles.Queries, scales: dict[str, float]
) -> Marks:
    """Grounding and visibility of every object; `scales`: the arm's best rescale per kind of
    answer.
    """
    present = [query in scene.names for query, scene in zip(own.texts, truths.scenes, strict=True)]
    marks = {"query_present": _mark(present, look.everyone, len(look), own.readable)}
    for label, boxes, rows in answers_of(look, truths.owner, truths.names, arm):
        owner = [truths.owner[row] for row in rows]
        marks |= _grounding(label, boxes, truths.box_1000[rows], owner, len(look), scales[label])
    return marks | _visibility(look, truths, arm) | _blind(look, truths, arm)


def answers_of(
    look: Look, owner: list[int], names: list[str], arm: bool
) -> Iterator[tuple[str, roles.Boxes, list[int]]]:
    """Yields (label, boxes, object of each box) for greedy answers and for eval.samples sampled
    ones.
    """
    samples = look.config.eval.samples
    objects = range(len(names))
    yield "greedy", _ground(look, arm, owner, names), list(objects)
    ranks = [owner[:n].count(i) for n, i in enumerate(owner)]
    seeds = [
        look.key(owner[n], "ground", ranks[n] * samples + s)
        for n in objects
        for s in range(samples)
    ]
    limit = look.config.rollout.box_tokens
    boxes = roles.ground(
        look.engine, look.prefix(arm), owner, names, [samples] * len(names), seeds, limit
    )
    yield "sampled", boxes, boxes.owner


def _grounding(
    label: str, boxes: roles.Boxes, truth: Tensor, owner: list[int], count: int, scale: float
) -> Marks:
    """Figures of boxes (N,) against truth (N, 4); lengths are shares of the image's side."""
    box = boxes.box_1000
    placed = geometry.proper(boxes.box_1000)
    iou = geometry.iou(box, truth)
    centre = (box[:, :2] + box[:, 2:]) / 2
    inside = ((centre >= truth[:, :2]) & (centre <= truth[:, 2:])).all(1) & placed
    error = torch.linalg.vector_norm(centre - (truth[:, :2] + truth[:, 2:]) / 2, dim=1) / 1000
    area = geometry.area_share(box)
    true_area = geometry.area_share(truth)
    mark = lambda values, of=None: _mark(values, owner, count, of)
    marks = {
        "iou": mark(iou),
        "iou_50": mark(iou >= 0.5),
        "iou_rescaled": mark(geometry.iou(rescaled(box, scale), truth)),
        "centre_inside": mark(inside),
        "centre_error": mark(error, placed),
        "parse_rate": mark(boxes.readable),
        "area": mark(area, placed),
        "area_ratio": (mark(area, placed)[0], mark(true_area, placed)[0]),
    }
    return {f"{label}_{name}": value for name, value in marks.items()}


def rescaled(box_1000: Tensor, scale: float) -> Tensor:
    """Boxes (..., 4) with both sides times `scale` about their centres, clamped to the image."""
    centre = (box_1000[..., :2] + box_1000[..., 2:]) / 2
    half = (box_1000[..., 2:] - box_1000[..., :2]) / 2 * scale
    return torch.cat([centre - half, centre + half], -1).clamp(0, 1000)


def _visibility(look: Look, truths: Truths, arm: bool) -> Marks:
    """Yes or no about each clearly visible object: as it is, an absent lookalike, hidden, and with
    another place hidden.
    """
    engine = look.engine
    prefix = look.prefix(arm)
    owner = truths.owner
    names = truths.names
    count = len(look)
    clear = truths.clear
    far = np.isin(np.arange(len(names)), truths.far)
    seen = roles.verify_forked(engine, prefix, owner, names) >= 0.5
    absent = roles.verify_forked(engine, prefix, owner, truths.lookalikes) >= 0.5
    gone = roles.verify(engine, truths.gone, names, arm) >= 0.5
    aside = torch.zeros_like(seen)
    if truths.aside is not None:
        aside[truths.far] = (
            roles.verify(engine, truths.aside, [names[n] for n in truths.far], arm) >= 0.5
        )
    mark = lambda values, of=clear: _mark(values, owner, count, of)
    marks = {
        "visible_present": mark(seen),
        "visible_absent": mark(~absent),
        "visible_hidden": mark(~gone),
        "visible_elsewhere": mark(aside, clear & far),
        "changed_elsewhere": mark(aside != seen, clear & far),
    }
    marks["visible_accuracy"] = _pooled(
        [marks[f"visible_{kind}"] for kind in ("present", "absent", "hidden", "elsewhere")]
    )
    return (
        marks
        | _pope(mark(seen), mark(absent))
        | {name: mark(cell) for name, cell in _table(seen, gone).items()}
    )


def _pooled(marks: list) -> tuple[np.ndarray, np.ndarray]:
    return sum(top for top, _ in marks), sum(bottom for _, bottom in marks)


def _pope(present: tuple, absent: tuple) -> Marks:
    """POPE's figures from yes counts over as many present as absent names (arXiv 2305.10355,
    section 4).
    """
    (hits, positives) = present
    (false_alarms, negatives) = absent
    rejections = negatives - false_alarms
    misses = positives - hits
    said = hits + false_alarms
    return {
        "pope_accuracy": (hits + rejections, positives + negatives),
        "pope_precision": (hits, said),
        "pope_recall": (hits, positives),
        "pope_f1": (2 * hits, 2 * hits + false_alarms + misses),
        "pope_yes_rate": (said, positives + negatives),
    }


def _blind(look: Look, truths: Truths, arm: bool) -> Marks:
    """What is answered without looking: the same questions about a grey image.

    One prefix serves all names of one image size.
    """
    owner = truths.owner
    names = truths.names
    count = len(look)
    sizes = list(dict.fromkeys(pixels.shape for pixels in look.pixels))
    grey = look.engine.prefill(
        look.engine.encode([torch.full(size, GREY, dtype=torch.uint8) for size in sizes]), arm
    )
    asked = list(
        dict.fromkeys(
            (sizes.index(look.pixels[i].shape), name) for i, name in zip(owner, names, strict=True)
        )
    )
    where = [
        asked.index((sizes.index(look.pixels[i].shape), name))
        for i, name in zip(owner, names, strict=True)
    ]
    images = [size for size, _ in asked]
    texts = [name for _, name in asked]
    boxes = _ground(look, arm, images, texts, grey).box_1000[where]
    yes = roles.verify_forked(look.engine, grey, images, texts)[where] >= 0.5
    return {
        "blind_iou": _mark(geometry.iou(boxes, truths.box_1000), owner, count),
        "blind_yes_rate": _mark(yes, owner, count),
    }
