"""One prompt style on some pictures, adapters off: what can be read, whether boxes follow the
picture, whether the judge sees what is hidden.

Every image is asked for an object, the object is boxed on it and on one view of it, and the judge
is asked about the picture, about it with the box hidden, with a box of the same size hidden
elsewhere, and about a word that another picture brought up. Draws are named as in a run (eval.seed,
image), so that all styles see the same views. Left out: choosing among styles (verdict.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine, Held
from vise_fast.images import geometry, views
from vise_fast.images.image import Image
from vise_fast.method import roles
from vise_fast.method.evidence import r_geo
from vise_fast.method.roles import Question, Sampling
from vise_fast.system import randomness
from vise_fast.text.prompts import Style
from vise_fast.text.sides import names_side

BATCH = 8


@dataclass
class Asked:
    """Of one picture: what was asked for and written, the box (0..1000), p(visible) by picture."""

    name: str
    query: str
    written: str
    box_1000: tuple[float, float, float, float] | None
    verdicts: dict[str, float] = field(default_factory=dict)


@dataclass
class Measured:
    """One style's figures; rates and p in 0..1, nan where nothing could be asked."""

    style: str
    pictures: int
    readable_queries: float
    readable_boxes: float
    agreement: float
    """R_geo of a box projected into a view and the box found there; 0 where it could not be read"""
    chance: float
    """the same with the box of another picture's view"""
    seen: float
    hidden: float
    elsewhere: float
    absent: float
    """p(visible): on the picture; with the box hidden; with another hidden; of another's word"""
    distinct: float
    area: float
    side_words: float
    query_tokens: float
    box_tokens: float
    seconds: float
    """per picture, all questions together"""
    samples: list[Asked] = field(default_factory=list)


@dataclass
class _Batch:
    """Columns of some pictures."""

    asked: list[Asked]
    query_readable: list[bool]
    box_readable: Tensor
    area: Tensor
    agreement: Tensor
    chance: Tensor
    lengths: list[int]
    box_lengths: list[int]


def measure(engine: Engine, images: Sequence[Image], config: Config, style: Style) -> Measured:
    """Asks in this style; the engine's own is what it was afterwards."""
    before = engine.tokens
    engine.tokens = before.in_style(style)
    start = time.monotonic()
    try:
        parts = []
        for first in range(0, len(images), BATCH):
            parts.append(_ask(engine, list(images[first : first + BATCH]), first, config))
    finally:
        engine.tokens = before
    return _joined(style.name, parts, time.monotonic() - start)


def _ask(engine: Engine, images: list[Image], first: int, config: Config) -> _Batch:
    pixels = [image.pixels.to(engine.device) for image in images]
    everyone = list(range(len(images)))
    features = engine.encode(pixels)
    prefixes = engine.prefill(features, False)
    rollout = config.rollout
    seeds = [randomness.key(config.eval.seed, first + i, "probe", 0) for i in everyone]
    sampling = Sampling(rollout.query_tokens, rollout.temperature)
    queries = roles.ask(engine, prefixes, everyone, seeds, sampling)
    boxes = _boxed(engine, prefixes, queries.texts, config)
    asked = _written(images, queries, boxes)
    agreement = _agreement(engine, pixels, queries.texts, boxes.box_1000, first, config)
    _judge(engine, prefixes, pixels, asked, boxes.box_1000, first, config)
    return _Batch(
        asked,
        queries.readable,
        boxes.readable & geometry.proper(boxes.box_1000),
        geometry.area_share(boxes.box_1000),
        *agreement,
        queries.lengths,
        boxes.answers.lengths,
    )


def _boxed(engine: Engine, prefixes: Held, texts: list[str], config: Config) -> roles.Boxes:
    """One greedy box per picture."""
    questions = [Question(i, text) for i, text in enumerate(texts)]
    return roles.ground(engine, prefixes, questions, Sampling(config.rollout.box_tokens, 0.0))


def _written(images: list[Image], queries: roles.Queries, boxes: roles.Boxes) -> list[Asked]:
    found = []
    for i, image in enumerate(images):
        x1, y1, x2, y2 = boxes.box_1000[i].tolist()
        box = (x1, y1, x2, y2) if boxes.readable[i] else None
        query = queries.texts[i] if queries.readable[i] else ""
        text = f"{queries.written[i]}\n{boxes.written[i]}"
        found.append(Asked(image.name, query, text, box))
    return found


def _agreement(
    engine: Engine,
    pixels: list[Tensor],
    texts: list[str],
    box_1000: Tensor,
    first: int,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """R_geo of each picture's box with the one in its view, and with the one in the next picture's:
    (N,) each, nan where the picture has no box.
    """
    drawn = []
    for i, image in enumerate(pixels):
        rng = randomness.generator(config.eval.seed, first + i, "probe view", 0)
        drawn.append(views.draw_view(rng, image.shape[0], image.shape[1], config.view))
    moved = views.apply(pixels, drawn)
    prefixes = engine.prefill(engine.encode(moved), False)
    found = _boxed(engine, prefixes, texts, config).box_1000
    height = torch.tensor([image.shape[0] for image in pixels])
    width = torch.tensor([image.shape[1] for image in pixels])
    matrices = views.matrices(drawn)
    expected = geometry.project_1000(box_1000, matrices, height, width, config.reward.projection)
    placed = geometry.proper(box_1000)
    own = torch.where(placed, r_geo(expected, found), torch.nan)
    return own, torch.where(placed, r_geo(expected, found.roll(1, 0)), torch.nan)


def _judge(
    engine: Engine,
    prefixes: Held,
    pixels: list[Tensor],
    asked: list[Asked],
    box_1000: Tensor,
    first: int,
    config: Config,
) -> None:
    """Writes the verdicts down."""
    rows = [i for i, one in enumerate(asked) if one.query]
    if not rows:
        return
    words = [asked[i].query for i in rows]
    _note(asked, rows, "seen", roles.verify_forked(engine, prefixes, rows, words))
    _absent(engine, prefixes, asked, rows)
    placed = geometry.proper(box_1000)
    rows = [i for i in rows if bool(placed[i])]
    if not rows:
        return
    words = [asked[i].query for i in rows]
    elsewhere = []
    for i in rows:
        rng = randomness.generator(config.eval.seed, first + i, "probe control", 0)
        elsewhere.append(views.control_box(rng, box_1000[i])[0])
    tables = {"hidden": box_1000[rows], "elsewhere": torch.tensor(elsewhere)}
    for name, table in tables.items():
        ghosts = views.ghost(
            pixels,
            torch.tensor(rows),
            table.double(),
            config.ghost,
            literal=config.view.literal_pixels,
        )
        _note(asked, rows, name, roles.verify(engine, engine.encode(ghosts), words, False))


def _absent(engine: Engine, prefixes: Held, asked: list[Asked], rows: list[int]) -> None:
    """About the first word that is not the picture's own, of the pictures after it."""
    pairs = []
    for place, i in enumerate(rows):
        others = [asked[j].query for j in rows[place + 1 :] + rows[:place]]
        other = next((word for word in others if word != asked[i].query), None)
        if other is not None:
            pairs.append((i, other))
    if pairs:
        owner = [i for i, _ in pairs]
        words = [word for _, word in pairs]
        _note(asked, owner, "absent", roles.verify_forked(engine, prefixes, owner, words))


def _note(asked: list[Asked], rows: list[int], name: str, p: Tensor) -> None:
    for i, value in zip(rows, p.tolist(), strict=True):
        asked[i].verdicts[name] = value


def _joined(style: str, parts: list[_Batch], seconds: float) -> Measured:
    """The figures of all pictures."""
    asked: list[Asked] = []
    for part in parts:
        asked += part.asked
    readable = torch.cat([part.box_readable for part in parts])
    area = torch.cat([part.area for part in parts])
    queries = [one.query for one in asked if one.query]
    count = len(asked)
    return Measured(
        style=style,
        pictures=count,
        readable_queries=len(queries) / count,
        readable_boxes=float(readable.float().mean()),
        agreement=_mean(torch.cat([part.agreement for part in parts])),
        chance=_mean(torch.cat([part.chance for part in parts])),
        **{name: _verdict(asked, name) for name in ("seen", "hidden", "elsewhere", "absent")},
        distinct=len(set(queries)) / len(queries) if queries else float("nan"),
        area=_mean(torch.where(readable, area, torch.nan)),
        side_words=sum(map(names_side, queries)) / max(len(queries), 1),
        query_tokens=_average([n for part in parts for n in part.lengths]),
        box_tokens=_average([n for part in parts for n in part.box_lengths]),
        seconds=seconds / count,
        samples=asked,
    )


def _verdict(asked: list[Asked], name: str) -> float:
    """Mean p of the pictures that were judged so."""
    return _average([one.verdicts[name] for one in asked if name in one.verdicts])


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _mean(values: Tensor) -> float:
    """Without nan."""
    known = values[values.isfinite()]
    return float(known.mean()) if len(known) else float("nan")
