"""One batch of images played through the method: queries, boxes, boxes in the views, verdicts. What the rewards and the update need.

Follows METHOD section 1, steps 1-7. Every draw is named by (seed, step, purpose, index in the batch), so playing a batch in slices
gives the same experience as playing it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.attention_meter import image_share
from vise_fast.engine.fast import Engine, Features, Prefixes
from vise_fast.images import geometry, views
from vise_fast.images.sources import Image
from vise_fast.method import roles
from vise_fast.method.rewards import Evidence
from vise_fast.system import randomness
from vise_fast.text import sides

Truth = Callable[[Image, str], tuple[float, float, float, float] | None]
"""The true box of a query on an image: for the oracle study only; training never has one."""
WITHOUT_GHOSTS = ("oracle", "random", "area_only")
"""Rewards that read no verdict about ghosts: none is asked for."""

GHOSTS_AT_ONCE = 8
"""Ghosts encoded and judged together, per image of the slice: bounds their memory as the micro-batch does everything else's."""


@dataclass
class Played:
    """A slice of the batch after its rollouts: the evidence, and what scoring the sampled boxes needs again.

    `boxes` holds the G answers of each image, then (if they were sampled in one batch) one answer per view; `features` the images, then (if asked for) the views.
    """

    images: list[Image]
    views: list[list[views.View]]
    queries: roles.Queries
    boxes: roles.Boxes
    evidence: Evidence
    features: Features
    reference: Prefixes | None
    attention: Tensor | None = None
    """(images,) share of attention on the image while the first box was written, mean over layers; on steps that measure it"""
    rewards: Tensor | None = None
    """(samples,) of this slice, once the learner has scored the batch."""


@dataclass(frozen=True)
class Draws:
    """The named randomness of one step; `first` is the slice's first image in the batch."""

    seed: int
    step: int
    first: int = 0

    def keys(self, purpose: str, count: int, per_image: int = 1) -> list[int]:
        return [
            randomness.key(self.seed, self.step, purpose, self.first * per_image + i)
            for i in range(count)
        ]

    def generator(self, purpose: str, index: int, per_image: int = 1) -> np.random.Generator:
        return randomness.generator(self.seed, self.step, purpose, self.first * per_image + index)


def play(
    engine: Engine, images: list[Image], config: Config, draws: Draws, truth: Truth | None = None
) -> Played:
    """Ask, ground on images and views in one batch, then verify images and ghosts."""
    count = len(images)
    samples = config.rollout.samples
    many = config.rollout.views
    limits = config.rollout
    pixels = [image.pixels.to(engine.device, non_blocking=True) for image in images]
    originals = list(range(len(images)))
    phase = engine.clock.phase
    with phase("views"):
        drawn = [
            [
                views.draw_view(
                    draws.generator("view", i * many + k, many), *image.shape[:2], config.view
                )
                for k in range(many)
            ]
            for i, image in enumerate(pixels)
        ]
        moved = views.apply(
            [image for image in pixels for _ in range(many)],
            [view for group in drawn for view in group],
        )
    with phase("encode"):
        features = engine.encode(pixels + moved)
    with phase("prefill"):
        prefixes, elsewhere = prefixes_of(engine, features, count, config)
    with phase("ask"):
        asked = (
            prefixes
            if limits.asker == "policy"
            else engine.prefill(features.select(originals), adapters=False)
        )
        queries = roles.ask(
            engine,
            asked,
            originals,
            draws.keys("ask", count),
            limits.query_tokens,
            limits.temperature,
        )
    texts = [
        sides.query_for(text, view, config.view)
        for text, group in zip(queries.texts, drawn, strict=True)
        for view in group
    ]
    with phase("ground"):
        boxes, view_boxes = _ground(
            engine, prefixes, elsewhere, queries.texts, texts, config, draws
        )
    attention = (
        _attention(engine, prefixes, boxes, originals, samples)
        if _measures_attention(engine, config, draws.step)
        else None
    )
    kept = features if config.update.views_too else features.select(originals)
    judges = (
        prefixes
        if config.reward.judge == "policy"
        else asked
        if limits.asker == "reference"
        else None
    )
    del (
        features,
        prefixes,
        elsewhere,
        asked,
        moved,
    )  # from here on nothing lies about that the verdicts do not need
    with phase("verify"):
        judges = judges or engine.prefill(kept.select(originals), adapters=False)
        seen = roles.verify_forked(engine, judges, originals, queries.texts)
    # A batch that had to be cut into slices has no room for the prefixes of all: the update
    # computes them again.
    reference = (
        judges
        if config.reward.judge == "reference"
        and config.train.micro_batch in (0, config.train.batch)
        else None
    )
    del judges
    known = _before_ghosts(pixels, drawn, queries, boxes, view_boxes, seen, config)
    with phase("verify"):
        ghosts = _judge_ghosts(engine, pixels, queries.texts, known, config, draws)
    truths = None if truth is None else _truths(truth, images, queries.texts, samples)
    return Played(
        images,
        drawn,
        queries,
        boxes,
        Evidence(**known, **ghosts, truth_1000=truths),
        kept,
        reference,
        attention,
    )


def prefixes_of(
    engine: Engine, features: Features, count: int, config: Config
) -> tuple[Prefixes, Prefixes]:
    """Of the images under the policy, and of images and views, or of the views alone, under whoever boxes the views."""
    kept = (
        {"trained": len(features) if config.update.views_too else count}
        if shares_forward(engine, config)
        else {}
    )
    if config.rollout.regrounder == "policy":
        everything = engine.prefill(features, adapters=True, **kept)
        return everything, everything
    originals = list(range(count))
    moved = list(range(count, len(features)))
    return engine.prefill(features.select(originals), adapters=True, **kept), engine.prefill(
        features.select(moved), adapters=False
    )


def shares_forward(engine: Engine, config: Config) -> bool:
    """Whether the update goes on from the rollout's forward pass over prefixes and questions.

    Not where memory is short: their activations live until the update, those of a batch in slices all at once.
    """
    train = config.train
    room = train.share_forward and not train.checkpointing and train.micro_batch in (0, train.batch)
    return room and config.reward.preset != "as_released" and isinstance(engine, Engine)


def _ground(
    engine: Engine,
    prefixes: Prefixes,
    elsewhere: Prefixes,
    queries: list[str],
    view_queries: list[str],
    config: Config,
    draws: Draws,
) -> tuple[roles.Boxes, tuple[Tensor, Tensor]]:
    """The boxes that were sampled, and those in the views: (views, 4), readable (views,).

    One batch where one player samples both alike; the views' answers then follow the samples'.
    """
    limits = config.rollout
    count = len(queries)
    total = len(queries) + len(view_queries)
    fan = [limits.samples] * count
    seeds = draws.keys("ground", count * limits.samples, limits.samples)
    there = [1] * len(view_queries)
    view_seeds = draws.keys("reground", len(view_queries), limits.views)
    rows = count * limits.samples
    tokens = limits.box_tokens
    trained = len(prefixes.trained) if shares_forward(engine, config) else 0
    if elsewhere is prefixes and limits.view_temperature == limits.temperature:
        texts = queries + view_queries
        boxes = roles.ground(
            engine,
            prefixes,
            list(range(total)),
            texts,
            fan + there,
            seeds + view_seeds,
            tokens,
            limits.temperature,
            trained,
        )
        return boxes, (boxes.box_1000[rows:], boxes.readable[rows:])
    boxes = roles.ground(
        engine,
        prefixes,
        list(range(count)),
        queries,
        fan,
        seeds,
        tokens,
        limits.temperature,
        trained,
    )
    places = list(range(len(elsewhere) - len(view_queries), len(elsewhere)))
    found = roles.ground(
        engine, elsewhere, places, view_queries, there, view_seeds, tokens, limits.view_temperature
    )
    return boxes, (found.box_1000, found.readable)


def attention_share(slices: list[Played]) -> dict[str, float]:
    """The training figure `attention_share` of the batch; nothing on steps that did not measure it."""
    measured = [played.attention for played in slices if played.attention is not None]
    return {"attention_share": float(torch.cat(measured).mean())} if measured else {}


def _measures_attention(engine: Engine, config: Config, step: int) -> bool:
    """The stock engine keeps no keys to measure."""
    return (
        config.train.attention_every > 0
        and step % config.train.attention_every == 0
        and isinstance(engine, Engine)
    )


def _attention(
    engine: Engine, prefixes: Prefixes, boxes: roles.Boxes, images: list[int], samples: int
) -> Tensor:
    return image_share(
        engine,
        prefixes,
        images,
        boxes.rows[: len(images)],
        boxes.answers.select([i * samples for i in images]),
    ).mean(0)


def join(slices: list[Played]) -> Evidence:
    """The evidence of the whole batch."""
    parts = [played.evidence for played in slices]
    whole = {
        f.name: [getattr(part, f.name) for part in parts]
        for f in fields(Evidence)
        if f.name != "group_size"
    }
    return Evidence(
        **{name: torch.cat(v) if v[0] is not None else None for name, v in whole.items()},
        group_size=parts[0].group_size,
    )


def _before_ghosts(
    pixels: list[Tensor],
    drawn,
    queries: roles.Queries,
    boxes: roles.Boxes,
    view_boxes: tuple[Tensor, Tensor],
    seen: Tensor,
    config: Config,
) -> dict:
    """Evidence known before the ghosts, one row per sampled box, image-major."""
    count = len(pixels)
    samples = config.rollout.samples
    many = config.rollout.views
    rows = count * samples
    spread = lambda x: x.repeat_interleave(samples, 0)
    sizes = torch.tensor([image.shape[:2] for image in pixels])
    known = dict(
        box_1000=boxes.box_1000[:rows],
        readable=boxes.readable[:rows],
        group_size=samples,
        view_box_1000=spread(view_boxes[0].view(count, many, 4)),
        view_readable=spread(view_boxes[1].view(count, many)),
        matrix_px=spread(views.stack(drawn)),
        height=spread(sizes[:, 0]),
        width=spread(sizes[:, 1]),
        seen=spread(seen),
        query_readable=spread(torch.tensor(queries.readable)),
    )
    rows_of = lambda items: [item for item in items for _ in range(samples)]
    usable = views.usable(
        rows_of(drawn),
        known["box_1000"],
        spread(sides.named_in(queries.texts)),
        known["height"],
        known["width"],
        config.view,
    )
    return known | {"view_usable": usable}


def _truths(truth: Truth, images: list[Image], queries: list[str], samples: int) -> Tensor:
    boxes = [
        truth(image, query) or (0.0,) * 4 for image, query in zip(images, queries, strict=True)
    ]
    return torch.tensor(boxes, dtype=torch.float64).repeat_interleave(samples, 0)


def _judge_ghosts(
    engine: Engine,
    pixels: list[Tensor],
    queries: list[str],
    known: dict,
    config: Config,
    draws: Draws,
) -> dict:
    """p(visible) with the box ghosted, with controls ghosted, with all else ghosted: one verdict per distinct (image, box).

    Nothing is asked about images whose object is not seen anyway, unreadable boxes and rewards that do not read the answer: zeros.
    """
    reward = config.reward
    samples = known["group_size"]
    judged = (
        known["readable"]
        & geometry.proper(known["box_1000"])
        & (known["seen"] >= reward.gate)
        & known["query_readable"]
    )
    rows = (
        judged.nonzero()[:, 0].tolist()
        if reward.w_sem > 0 and reward.name not in WITHOUT_GHOSTS
        else []
    )
    slots: dict[tuple, int] = {}
    where = [
        slots.setdefault((row // samples, *known["box_1000"][row].tolist()), len(slots))
        for row in rows
    ]
    jobs = _ghost_jobs(
        list(slots), [rows[where.index(slot)] for slot in range(len(slots))], config, draws, samples
    )
    owners = [image for image, *_ in slots]
    hide = lambda boxes, region: views.ghost(
        pixels,
        torch.tensor(owners),
        boxes,
        config.ghost,
        region,
        literal=config.view.literal_pixels,
    )
    ghosts = [ghost for _, boxes, region in jobs for ghost in hide(boxes, region)] if rows else []
    questions = [queries[i] for i in owners] * len(jobs)
    p = (
        _verdicts(engine, ghosts, questions, reward.judge == "policy", GHOSTS_AT_ONCE * len(pixels))
        if rows
        else torch.zeros(0, dtype=torch.float64)
    )
    found = {}
    for (name, *_), values in zip(jobs, p.view(len(jobs), len(slots)), strict=True):
        found[name] = torch.zeros(len(known["seen"]), dtype=torch.float64)
        found[name][rows] = values[where]
    controls = [found.pop(name) for name in sorted(found) if name.startswith("control")]
    asked = torch.zeros(len(known["seen"]), dtype=torch.bool).index_fill(
        0, torch.tensor(rows, dtype=torch.long), True
    )
    return found | {"judged": asked} | ({"control": torch.stack(controls, 1)} if controls else {})


def _verdicts(
    engine: Engine, images: list[Tensor], queries: list[str], adapters: bool, at_once: int
) -> Tensor:
    """p(visible) of query n on image n, `at_once` images in memory at a time."""
    cuts = [slice(start, start + at_once) for start in range(0, len(images), at_once)]
    return roles.home(
        engine,
        torch.cat(
            [
                roles.verify(engine, engine.encode(images[cut]), queries[cut], adapters, stay=True)
                for cut in cuts
            ]
        ),
    )


def _ghost_jobs(
    slots: list[tuple], first: list[int], config: Config, draws: Draws, samples: int
) -> list[tuple[str, Tensor, str]]:
    """(name, boxes, region) for each kind of ghost the reward reads. `first`: the sample whose draw places a slot's control."""
    boxes = torch.tensor([box for _, *box in slots], dtype=torch.float64).view(-1, 4)
    jobs = [("gone", boxes, "inside")]
    if config.reward.sem == "contrast":
        for c in range(config.reward.controls):
            placed = [
                views.control_box(draws.generator(f"control{c}", row, samples), box)[0]
                for row, box in zip(first, boxes, strict=True)
            ]
            jobs.append(
                (f"control{c}", torch.tensor(placed, dtype=torch.float64).view(-1, 4), "inside")
            )
    if config.reward.sufficiency:
        jobs.append(("keep", boxes, "outside"))
    return jobs
