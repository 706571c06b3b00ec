"""The three questions a model asks itself: ask (name an object), ground (box it), verify (is it
visible). Texts in, answers out.

ask and ground sample; verify reads one pair of next-token probabilities and decodes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from vise_fast.engine.rollout import Engine, Held, Rollout, owners
from vise_fast.images import geometry
from vise_fast.images.geometry import Box
from vise_fast.system.errors import NumericFault
from vise_fast.system.machine.staging import put
from vise_fast.text import prompts, spaces

UNREADABLE_QUERY = "object"


class Sampling(NamedTuple):
    """How answers are drawn: new tokens at most, temperature (0: greedy)."""

    limit: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Question:
    """Where is `text` on image `image`? One box is sampled per seed."""

    image: int
    text: str
    seeds: Sequence[int] = (0,)


@dataclass
class Queries:
    """One query per image: `texts` to ask with (a stand-in where the answer could not be read),
    `readable`, and what was written.
    """

    texts: list[str]
    readable: list[bool]
    written: list[str]
    lengths: list[int]


@dataclass
class Boxes:
    """One box per answer: box_1000 (N, 4) float64, sorted and clamped, zeros where `readable` (N,)
    is False.

    rows: the ids of each question; owner: the question of each box; asked: the first questions with
    the graph of their forward pass, where the update will go on from it.
    """

    box_1000: Tensor
    readable: Tensor
    written: list[str]
    answers: Rollout
    rows: list[list[int]]
    owner: list[int]
    asked: Held | None = None


def ask(
    engine: Engine, prefixes: Held, owner: list[int], seeds: list[int], sampling: Sampling
) -> Queries:
    """One query for each image in `owner`."""
    tokens = engine.tokens
    rows = [tokens.row(tokens.style.ask())] * len(owner)
    prompted = engine.prompt(prefixes, owner, rows)
    fan = [1] * len(owner)
    answers = engine.generate(prompted, fan, sampling.limit, seeds, sampling.temperature)
    written = [tokens.text(ids) for ids in answers.rows()]
    queries = [prompts.read_query(text) for text in written]
    texts = [query or UNREADABLE_QUERY for query in queries]
    return Queries(texts, [query is not None for query in queries], written, answers.lengths)


def ground(
    engine: Engine,
    prefixes: Held,
    questions: list[Question],
    sampling: Sampling,
    rooted: Held | None = None,
) -> Boxes:
    """Boxes for every question about the images behind `prefixes`.

    rooted: the first of these prefixes with their graph; the first questions, one about each, are
    then asked on them, and keep theirs (`Boxes.asked`).
    """
    tokens = engine.tokens
    rows = [tokens.row(tokens.style.ground(question.text)) for question in questions]
    images = [question.image for question in questions]
    asked = None
    if rooted is None:
        prompted = engine.prompt(prefixes, images, rows)
    else:
        count = len(rooted)
        asked = engine.prompt(rooted, images[:count], rows[:count])
        prompted = asked.over(prefixes)
        if count < len(rows):
            prompted = prompted.stack(engine.prompt(prefixes, images[count:], rows[count:]))
    fan = [len(question.seeds) for question in questions]
    seeds = list(chain.from_iterable(question.seeds for question in questions))
    answers = engine.generate(prompted, fan, sampling.limit, seeds, sampling.temperature)
    owner = owners(fan)
    sizes = _sizes(engine, prefixes, [images[question] for question in owner])
    written, boxes = _read(engine, answers, sizes)
    return _boxes(answers, written, boxes, Asked(rows, owner, asked))


def _sizes(engine: Engine, prefixes: Held, images: list[int]) -> Sequence[spaces.Size | None]:
    """(height, width) of the image of each answer as the model sees it, where boxes come in its
    pixels.
    """
    if engine.tokens.style.space != "pixels":
        return [None] * len(images)
    sizes = engine.sizes(prefixes)
    return [sizes[image] for image in images]


def _read(
    engine: Engine, answers: Rollout, sizes: Sequence[spaces.Size | None]
) -> tuple[list[str], list[Box | None]]:
    """What was written, and its boxes in 0..1000."""
    tokens = engine.tokens
    written = [tokens.text(ids) for ids in answers.rows()]
    pairs = zip(written, sizes, strict=True)
    return written, [spaces.read_1000(text, tokens.style.space, size) for text, size in pairs]


class Asked(NamedTuple):
    """The ids of each question, the question of each answer, and the questions with their graph."""

    rows: list[list[int]]
    owner: list[int]
    graph: Held | None


def _boxes(answers: Rollout, written: list[str], boxes: list[Box | None], asked: Asked) -> Boxes:
    """Answers as boxes."""
    readable = torch.tensor([box is not None for box in boxes])
    table = torch.tensor([box or (0.0,) * 4 for box in boxes], dtype=torch.float64)
    cleaned = geometry.clean_1000(table)
    return Boxes(cleaned, readable, written, answers, asked.rows, asked.owner, asked.graph)


def verify(
    engine: Engine, features: Held, queries: list[str], adapters: bool, *, stay: bool = False
) -> Tensor:
    """p(visible) (N,) of query n on image n, judged with adapters on (policy) or off (reference).

    stay: leave it on the engine's device.
    """
    found = []
    for rows in _verdict_rows(engine, queries):
        found.append(_probability(engine, engine.verdict_logits(features, rows, adapters)))
    p = _averaged(engine, found)
    return p if stay else engine.home(p)


def verify_forked(engine: Engine, prefixes: Held, owner: list[int], queries: list[str]) -> Tensor:
    """The same where the images' prefixes are at hand; on the CPU."""
    found = []
    for rows in _verdict_rows(engine, queries):
        logits = engine.forked_verdict_logits(prefixes, owner, rows)
        found.append(_probability(engine, logits))
    return engine.home(_averaged(engine, found))


def p_yes(engine: Engine, prefixes: Held, owner: list[int], rows: list[list[int]]) -> Tensor:
    """P(yes) of yes and no (N,) on the CPU: the next token after rows[n] about the image behind
    prefix owner[n].
    """
    return engine.home(_probability(engine, engine.forked_verdict_logits(prefixes, owner, rows)))


def _averaged(engine: Engine, found: list[Tensor]) -> Tensor:
    """The mean (N,) over the wordings; how far they lie apart is counted."""
    if len(found) == 1:
        return found[0]
    table = torch.stack(found)
    spread = engine.home(table.std(0, correction=0).sum())
    engine.counters.spread(float(spread), table.shape[1])
    return table.mean(0)


def finite(p: Tensor) -> Tensor:
    """Verdicts as they are. Raises NumericFault for one that is no number: read as no, it would
    look like an answer.
    """
    if not bool(p.isfinite().all()):
        raise NumericFault(
            "a verdict is not a number; the model's logits are not finite; use float32 "
            "(--model.dtype float32) or an adapter from before they were"
        )
    return p


def _verdict_rows(engine: Engine, queries: list[str]) -> list[list[list[int]]]:
    """The question about each query, once per wording."""
    tokens = engine.tokens
    style = tokens.style
    first = [tokens.verdict_row(style.verify(query)) for query in queries]
    again = [style.verify_again(query) for query in queries]
    others = [[tokens.verdict_row(text) for text in texts] for texts in zip(*again, strict=True)]
    return [first, *others]


def _probability(engine: Engine, logits: Tensor) -> Tensor:
    """P(yes) / (P(yes) + P(no)), float64 (N,), from next-token logits (N, V); all one-token
    spellings count.
    """
    yes = logits[:, put(engine.tokens.yes, logits.device)].logsumexp(-1)
    no = logits[:, put(engine.tokens.no, logits.device)].logsumexp(-1)
    return torch.sigmoid(yes - no).double()
