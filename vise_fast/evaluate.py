"""Held-out figures of a model with and without its adapter: grounding, visibility, attention, controls.

    python -m vise_fast.evaluate --adapter runs/nano/adapter [--model PATH] [--data.dir photos] [--scenes N] [--json FILE]

Drawn scenes come with their truth: every object of a scene is asked for. Photographs have none: only what needs no labels is measured.
Base and adapter are two states of one loaded model; an image is encoded once for both, and read once per state. Every draw is named
by (eval.seed, scene), so neither the batch size nor the other arm changes a figure. What the figures mean: docs/EVALUATION.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vise_fast import geometry, randomness, roles, views
from vise_fast.attention_meter import image_share
from vise_fast.config import Config
from vise_fast.console import Console, run
from vise_fast.engine import Engine, Features, Prefixes
from vise_fast.errors import EnvironmentFault
from vise_fast.figures import Figures, Marks, difference, join
from vise_fast.images import Folder, Image, Scenes, Source
from vise_fast.model import grid_multiple, load
from vise_fast.rewards import LARGE_AREA
from vise_fast.scenes import NAMES, Scene, Thing
from vise_fast.words import parse

CLEARLY_VISIBLE = 0.5  # objects of which less shows are not asked about with yes or no
SCALES = np.linspace(0.5, 1.5, 41)
GREY = 128


def held_out(engine: Engine, source: Source, config: Config, adapters: bool) -> Figures:
    """The figures of one arm on `source.held_out(eval.scenes)`."""
    return examine(engine, source, config, (adapters,))[0]


def compare(engine: Engine, source: Source, config: Config) -> tuple[Figures, Figures]:
    """(base, adapter) on the same images."""
    base, adapter = examine(engine, source, config, (False, True))
    return base, adapter


def examine(engine: Engine, source: Source, config: Config, arms: Sequence[bool]) -> list[Figures]:
    """Figures of each arm (adapters on or off); empty ones when there is no held-out image."""
    images, draw = source.held_out(config.eval.scenes), getattr(source, "scene", None)
    rescale = [_best_scales(engine, source, config, arm) for arm in arms] if draw and images else [None] * len(arms)
    sheets = [_Sheet() for _ in arms]
    for first in range(0, len(images), config.eval.batch):
        look = _look(engine, images[first : first + config.eval.batch], first, config)
        truths = _truths(look, draw) if draw else None
        for sheet, arm, scales in zip(sheets, arms, rescale, strict=True):
            sheet.marks.append(_without_labels(look, arm, sheet) | (_with_truth(look, truths, arm, scales) if truths else {}))
    return [sheet.figures(len(images), scales) for sheet, scales in zip(sheets, rescale, strict=True)]


@dataclass
class Look:
    """A batch of images as the engine sees it: encoded once, one prefix per adapter state; `first` is its place in the whole exam."""

    engine: Engine
    config: Config
    images: list[Image]
    first: int
    features: Features
    prefixes: dict[bool, Prefixes]

    def prefix(self, arm: bool) -> Prefixes:
        if arm not in self.prefixes:
            self.prefixes[arm] = self.engine.prefill(self.features, adapters=arm)
        return self.prefixes[arm]

    @property
    def pixels(self) -> list[Tensor]:
        return [image.pixels for image in self.images]

    def rng(self, image: int, purpose: str, index: int = 0) -> np.random.Generator:
        return randomness.generator(self.config.eval.seed, self.first + image, purpose, index)

    def key(self, image: int, purpose: str, index: int = 0) -> int:
        return randomness.key(self.config.eval.seed, self.first + image, purpose, index)


def _look(engine: Engine, images: list[Image], first: int, config: Config) -> Look:
    return Look(engine, config, images, first, engine.encode([image.pixels for image in images]), {})


class _Sheet:
    """What one arm has answered so far."""

    def __init__(self) -> None:
        self.marks: list[Marks] = []
        self.queries: list[str] = []
        self.shares: list[Tensor] = []

    def figures(self, n: int, scales: dict[str, float] | None) -> Figures:
        plain = {f"{name}_scale": scale for name, scale in (scales or {}).items()}
        if self.queries:
            plain["distinct_queries"] = len(set(self.queries)) / len(self.queries)
        layers = torch.cat(self.shares, 1).mean(1).tolist() if self.shares else []
        return Figures(n, join(self.marks) if self.marks else {}, plain, layers)


def _mark(values, owner: Sequence[int], count: int, of=None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values (N,) and of the rows counted (`of` (N,) bool; all), per scene: owner[n] of `count`."""
    weights = np.ones(len(owner)) if of is None else np.asarray(of, float)
    values = np.where(weights > 0, np.asarray(values, float), 0.0)
    return np.bincount(owner, values * weights, count), np.bincount(owner, weights, count)


# ---- what needs no labels ---------------------------------------------------------------------------------------------------


def _without_labels(look: Look, arm: bool, sheet: _Sheet) -> Marks:
    """Agreement between views, boxes, attention and the hiding of the arm's greedy boxes, on queries that the base wrote.

    Both arms are asked the same queries and judged by the same judge (the base), so that the difference is the boxes'.
    """
    engine, config, count = look.engine, look.config, len(look.images)
    everyone = list(range(count))
    asked = roles.ask(engine, look.prefix(False), everyone, [0] * count, config.rollout.query_tokens, temperature=0.0)
    boxes = _ground(look, arm, everyone, asked.texts)
    own = roles.ask(engine, look.prefix(arm), everyone, [look.key(i, "ask") for i in everyone], config.rollout.query_tokens)
    sheet.queries += [query for query, readable in zip(own.texts, own.readable, strict=True) if readable]
    placed = geometry.proper(boxes.box_1000)
    area = geometry.area_share(boxes.box_1000)
    marks = {
        "query_parse_rate": _mark(own.readable, everyone, count),
        "own_parse_rate": _mark(boxes.readable, everyone, count),
        "own_area": _mark(area, everyone, count, placed),
        "own_area_large": _mark(area > LARGE_AREA, everyone, count, placed),
    }
    if config.eval.attention:
        share = image_share(engine, look.prefix(arm), everyone, boxes.rows, boxes.answers)
        sheet.shares.append(share)
        marks["attention_share"] = _mark(share.mean(0), everyone, count)
    return marks | _invariance(look, arm, asked.texts, boxes.box_1000, placed) | _hiding(look, asked.texts, boxes.box_1000, placed)


def _ground(look: Look, arm: bool, owner: list[int], names: list[str], prefixes: Prefixes | None = None) -> roles.Boxes:
    """One greedy box per name."""
    limit, rows = look.config.rollout.box_tokens, len(names)
    return roles.ground(look.engine, prefixes or look.prefix(arm), owner, names, [1] * rows, [0] * rows, limit, temperature=0.0)


def _invariance(look: Look, arm: bool, queries: list[str], box_1000: Tensor, placed: Tensor) -> Marks:
    """R_geo (METHOD section 1.5) of greedy boxes on rollout.views views per image; an unreadable box in a view agrees by 0."""
    config, many = look.config, look.config.rollout.views
    drawn = [[views.draw_view(look.rng(i, "view", k), *p.shape[:2], config.view) for k in range(many)] for i, p in enumerate(look.pixels)]
    flat, owner = [view for row in drawn for view in row], [i for i in range(len(drawn)) for _ in range(many)]
    moved = look.engine.encode(views.apply([look.pixels[i] for i in owner], flat))
    texts = [views.query_for(queries[i], view, config.view) for i, view in zip(owner, flat, strict=True)]
    found = _ground(look, arm, list(range(len(flat))), texts, look.engine.prefill(moved, arm)).box_1000
    height, width = (torch.tensor([p.shape[side] for p in look.pixels]) for side in (0, 1))
    expected = geometry.project_1000(box_1000[owner], views.stack(drawn).flatten(0, 1), height[owner], width[owner], config.reward.projection)
    agreement = torch.where(geometry.proper(found), (geometry.giou(expected, found) + 1) / 2, 0.0)
    usable = views.usable(drawn, box_1000, queries, height, width, config.view).flatten()
    return {"invariance": _mark(agreement, owner, len(drawn), usable & placed[owner])}


def _hiding(look: Look, queries: list[str], box_1000: Tensor, placed: Tensor) -> Marks:
    """The 2x2 table of (seen, seen after the arm's box was ghosted), judged by the base: TU means the box held the object."""
    count, rows = len(look.images), placed.nonzero()[:, 0].tolist()
    seen = roles.verify_forked(look.engine, look.prefix(False), list(range(count)), queries) >= 0.5
    gone = torch.zeros(count, dtype=torch.bool)
    if rows:
        ghosts = look.engine.encode(_ghosts(look, rows, box_1000[rows]))
        gone[rows] = roles.verify(look.engine, ghosts, [queries[i] for i in rows], adapters=False) >= 0.5
    return {f"own_{name}": _mark(cell, range(count), count, placed) for name, cell in _table(seen, gone).items()}


def _ghosts(look: Look, owner: list[int], box_1000: Tensor) -> list[Tensor]:
    config = look.config
    return views.ghost(look.pixels, torch.tensor(owner), box_1000, config.ghost, literal=config.view.literal_pixels)


def _table(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """BEAF's cells of (visible, visible after the object was hidden)."""
    return {"TU": before & ~after, "IG": ~before & after, "SB": before & after, "ID": ~before & ~after}


# ---- what a scene's truth adds ----------------------------------------------------------------------------------------------


@dataclass
class Truths:
    """Every object of a batch of scenes, one row each; features of the scenes with the object, or something else, hidden."""

    scenes: list[Scene]
    things: list[Thing]
    owner: list[int]
    lookalikes: list[str]
    gone: Features
    aside: Features | None
    far: list[int]
    grey: Prefixes | None = None

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


def _objects(scenes: list[Scene]) -> tuple[list[Thing], list[int]]:
    """Every object whose name is no other object's, and its scene."""
    rows = [(thing, i) for i, scene in enumerate(scenes) for thing in scene.objects if scene.names.count(thing.name) == 1]
    return [thing for thing, _ in rows], [i for _, i in rows]


def _truths(look: Look, draw: Callable[[int], Scene]) -> Truths:
    scenes = [draw(image.key) for image in look.images]
    things, owner = _objects(scenes)
    ranks = [owner[:n].count(i) for n, i in enumerate(owner)]
    lookalikes = [_lookalike(look.rng(i, "lookalike", rank), thing, scenes[i]) for thing, i, rank in zip(things, owner, ranks, strict=True)]
    placed = [views.control_box(look.rng(i, "aside", rank), thing.box_1000) for thing, i, rank in zip(things, owner, ranks, strict=True)]
    far = [n for n, (_, kind) in enumerate(placed) if kind == "far"]
    gone = look.engine.encode(_ghosts(look, owner, torch.tensor([thing.box_1000 for thing in things], dtype=torch.float64)))
    elsewhere = torch.tensor([placed[n][0] for n in far], dtype=torch.float64)
    aside = look.engine.encode(_ghosts(look, [owner[n] for n in far], elsewhere)) if far else None
    return Truths(scenes, things, owner, lookalikes, gone, aside, far)


def _lookalike(rng: np.random.Generator, thing: Thing, scene: Scene) -> str:
    """An absent name that shares colour or shape with the object (POPE's adversarial negatives, arXiv 2305.10355)."""
    pool = [name for name in NAMES if name not in scene.names and {thing.color, thing.shape} & set(name.split())]
    return pool[int(rng.integers(len(pool)))]


def _with_truth(look: Look, truths: Truths, arm: bool, scales: dict[str, float]) -> Marks:
    count, own = len(look.images), range(len(look.images))
    written = roles.ask(look.engine, look.prefix(arm), list(own), [look.key(i, "ask") for i in own], look.config.rollout.query_tokens)
    present = [query in scene.names for query, scene in zip(written.texts, truths.scenes, strict=True)]
    marks = {"query_present": _mark(present, own, count, written.readable)}
    for label, boxes, rows in _answers(look, truths.owner, truths.names, arm):
        owner = [truths.owner[row] for row in rows]
        marks |= _grounding(label, boxes, truths.box_1000[rows], owner, count, scales[label])
    return marks | _visibility(look, truths, arm) | _blind(look, truths, arm)


def _answers(look: Look, owner: list[int], names: list[str], arm: bool):
    """Yields (label, boxes, object of each box) for greedy answers and for eval.samples sampled ones."""
    samples, objects = look.config.eval.samples, range(len(names))
    yield "greedy", _ground(look, arm, owner, names), list(objects)
    ranks = [owner[:n].count(i) for n, i in enumerate(owner)]
    seeds = [look.key(owner[n], "ground", ranks[n] * samples + s) for n in objects for s in range(samples)]
    limit = look.config.rollout.box_tokens
    boxes = roles.ground(look.engine, look.prefix(arm), owner, names, [samples] * len(names), seeds, limit)
    yield "sampled", boxes, boxes.owner


def _grounding(label: str, boxes: roles.Boxes, truth: Tensor, owner: list[int], count: int, scale: float) -> Marks:
    """Figures of boxes (N,) against truth (N, 4); lengths are shares of the image's side."""
    box, placed = boxes.box_1000, geometry.proper(boxes.box_1000)
    iou, centre = geometry.iou(box, truth), (box[:, :2] + box[:, 2:]) / 2
    inside = ((centre >= truth[:, :2]) & (centre <= truth[:, 2:])).all(1) & placed
    error = torch.linalg.vector_norm(centre - (truth[:, :2] + truth[:, 2:]) / 2, dim=1) / 1000
    area, true_area = geometry.area_share(box), geometry.area_share(truth)
    mark = lambda values, of=None: _mark(values, owner, count, of)  # noqa: E731
    marks = {
        "iou": mark(iou), "iou_50": mark(iou >= 0.5), "iou_rescaled": mark(geometry.iou(rescaled(box, scale), truth)),
        "centre_inside": mark(inside), "centre_error": mark(error, placed), "parse_rate": mark(boxes.readable),
        "area": mark(area, placed), "area_ratio": (mark(area, placed)[0], mark(true_area, placed)[0]),
    }  # fmt: skip
    return {f"{label}_{name}": value for name, value in marks.items()}


def rescaled(box_1000: Tensor, scale: float) -> Tensor:
    """Boxes (..., 4) with both sides times `scale` about their centres, clamped to the image."""
    centre, half = (box_1000[..., :2] + box_1000[..., 2:]) / 2, (box_1000[..., 2:] - box_1000[..., :2]) / 2 * scale
    return torch.cat([centre - half, centre + half], -1).clamp(0, 1000)


def _best_scales(engine: Engine, source: Source, config: Config, arm: bool) -> dict[str, float]:
    """The factor of SCALES under which an arm's boxes fit best, by mean IoU on scenes that are not reported; per kind of answer.

    A gain that survives it is no gain by mere tightening or loosening.
    """
    keys = [randomness.key(config.eval.seed, 0, "validation scene", i) for i in range((config.eval.scenes + 1) // 2)]
    found: dict[str, list] = {"greedy": [], "sampled": []}
    for first in range(0, len(keys), config.eval.batch):
        scenes = [source.scene(key) for key in keys[first : first + config.eval.batch]]
        images = [Image(torch.from_numpy(scene.pixels), "validation scene", key) for scene, key in zip(scenes, keys[first:], strict=False)]
        things, owner = _objects(scenes)
        truth = torch.tensor([thing.box_1000 for thing in things], dtype=torch.float64)
        # other places than the reported scenes', so that no draw is used twice
        look = _look(engine, images, config.eval.scenes + first, config)
        for label, boxes, rows in _answers(look, owner, [thing.name for thing in things], arm):
            found[label].append(torch.stack([geometry.iou(rescaled(boxes.box_1000, s), truth[rows]) for s in SCALES.tolist()]))
    return {label: float(SCALES[int(torch.cat(iou, 1).mean(1).argmax())]) for label, iou in found.items()}


def _visibility(look: Look, truths: Truths, arm: bool) -> Marks:
    """Yes or no about each clearly visible object: as it is, an absent lookalike, hidden, and with another place hidden."""
    engine, prefix, owner, names, count = look.engine, look.prefix(arm), truths.owner, truths.names, len(look.images)
    clear, far = truths.clear, np.isin(np.arange(len(names)), truths.far)
    seen = roles.verify_forked(engine, prefix, owner, names) >= 0.5
    absent = roles.verify_forked(engine, prefix, owner, truths.lookalikes) >= 0.5
    gone = roles.verify(engine, truths.gone, names, arm) >= 0.5
    aside = torch.zeros_like(seen)
    if truths.aside is not None:
        aside[truths.far] = roles.verify(engine, truths.aside, [names[n] for n in truths.far], arm) >= 0.5
    mark = lambda values, of=clear: _mark(values, owner, count, of)  # noqa: E731
    marks = {
        "visible_present": mark(seen), "visible_absent": mark(~absent), "visible_hidden": mark(~gone),
        "visible_elsewhere": mark(aside, clear & far), "changed_elsewhere": mark(aside != seen, clear & far),
    }  # fmt: skip
    marks["visible_accuracy"] = _pooled([marks[f"visible_{kind}"] for kind in ("present", "absent", "hidden", "elsewhere")])
    return marks | _pope(mark(seen), mark(absent)) | {name: mark(cell) for name, cell in _table(seen, gone).items()}


def _pooled(marks: list) -> tuple[np.ndarray, np.ndarray]:
    return sum(top for top, _ in marks), sum(bottom for _, bottom in marks)


def _pope(present: tuple, absent: tuple) -> Marks:
    """POPE's figures from yes counts over as many present as absent names (arXiv 2305.10355, section 4)."""
    (hits, positives), (false_alarms, negatives) = present, absent
    rejections, misses, said = negatives - false_alarms, positives - hits, hits + false_alarms
    return {
        "pope_accuracy": (hits + rejections, positives + negatives), "pope_precision": (hits, said), "pope_recall": (hits, positives),
        "pope_f1": (2 * hits, 2 * hits + false_alarms + misses), "pope_yes_rate": (said, positives + negatives),
    }  # fmt: skip


def _blind(look: Look, truths: Truths, arm: bool) -> Marks:
    """What is answered without looking: the same questions about a grey image. One prefix serves all names of one image size."""
    owner, names, count = truths.owner, truths.names, len(look.images)
    sizes = list(dict.fromkeys(pixels.shape for pixels in look.pixels))
    grey = look.engine.prefill(look.engine.encode([torch.full(size, GREY, dtype=torch.uint8) for size in sizes]), arm)
    asked = list(dict.fromkeys((sizes.index(look.pixels[i].shape), name) for i, name in zip(owner, names, strict=True)))
    where = [asked.index((sizes.index(look.pixels[i].shape), name)) for i, name in zip(owner, names, strict=True)]
    images, texts = [size for size, _ in asked], [name for _, name in asked]
    boxes = _ground(look, arm, images, texts, grey).box_1000[where]
    yes = roles.verify_forked(look.engine, grey, images, texts)[where] >= 0.5
    return {"blind_iou": _mark(geometry.iou(boxes, truths.box_1000), owner, count), "blind_yes_rate": _mark(yes, owner, count)}


# ---- side by side -----------------------------------------------------------------------------------------------------------


def side_by_side(evaluation: Mapping[str, dict]) -> dict[str, tuple[str, str]]:
    """{"before": Figures.json(), "after": …} as figure -> (base, adapter), the latter with its paired difference and 95 % interval."""
    arms = [Figures.read(evaluation[name]) if name in evaluation else None for name in ("before", "after")]
    names = dict.fromkeys(name for arm in arms if arm is not None for name in arm.values)
    return {name: (_shown(arms[0], name), _shown(arms[1], name) + _gain(*arms, name)) for name in names}


def _shown(arm: Figures | None, name: str) -> str:
    return "-" if arm is None or name not in arm.values else f"{arm.values[name]:.3f}"


def _gain(before: Figures | None, after: Figures | None, name: str) -> str:
    """' (+0.031, 95 % +0.012 to +0.050)' where both arms answered the same scenes."""
    if before is None or after is None or before.n != after.n or name not in before.marks or name not in after.marks:
        return ""
    gain = difference(before, after, name)
    return f" ({gain.value:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f})" if np.isfinite(gain.value) else ""


def main(words: Sequence[str]) -> int:
    """The command."""
    options, console = parse(words, ("adapter", "model", "config", "scenes", "json")), Console()
    if options.help:
        console.say(__doc__)
        return 0
    limit = options.whole("scenes")
    config = options.configuration([] if limit is None else [f"--eval.scenes={limit}"])
    source = _source(config)
    policy = load(config, options["adapter"])
    console.say(f"evaluating {config.model.path}{' with and without ' + options['adapter'] if options['adapter'] else ''} on {source.describe()}")
    figures = examine(Engine(policy.backbone, policy.tokens), source, config, (False, True) if options["adapter"] else (False,))
    evaluation = {name: arm.json() for name, arm in zip(("before", "after"), figures, strict=False)}
    console.table(f"{figures[0].n} held-out images", ["", "base", "adapter"], [[name, *pair] for name, pair in side_by_side(evaluation).items()])
    if options["json"]:
        _write(Path(options["json"]), evaluation)
    return 0


def _source(config: Config) -> Source:
    return Scenes(config) if config.data.dir is None else Folder(config.data.dir, config, grid_multiple(config.model.path))


def _write(path: Path, evaluation: dict) -> None:
    try:
        path.write_text(json.dumps(evaluation) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}; {error.strerror or error}; give --json a writable place") from error


if __name__ == "__main__":
    sys.exit(run(main))
