"""The three questions a model asks itself: ask (name an object), ground (box it), verify (is it
visible). Texts in, answers out.

ask and ground sample from the policy; verify reads one pair of next-token probabilities and decodes
nothing (METHOD sections 1 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vise_fast.engine.fast import Engine, Features, Prefixes, Prompts, Rollout
from vise_fast.images import geometry
from vise_fast.text import prompts

UNREADABLE_QUERY = "object"


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

    asked: the first questions with the graph of their forward pass, where the update will go on
    from it.
    """

    box_1000: Tensor
    readable: Tensor
    written: list[str]
    answers: Rollout
    rows: list[list[int]]
    owner: list[int]
    asked: Prompts | None = None


def ask(
    engine: Engine,
    prefixes: Prefixes,
    owner: list[int],
    seeds: list[int],
    limit: int,
    temperature: float = 1.0,
) -> Queries:
    """One query for each image in `owner`."""
    tokens = engine.tokens
    prompted = engine.prompt(prefixes, owner, [tokens.row(tokens.style.ask())] * len(owner))
    answers = engine.generate(prompted, [1] * len(owner), limit, seeds, temperature)
    written = [tokens.text(ids) for ids in answers.rows()]
    queries = [prompts.read_query(text) for text in written]
    return Queries(
        [q or UNREADABLE_QUERY for q in queries],
        [q is not None for q in queries],
        written,
        answers.lengths,
    )


def ground(
    engine: Engine,
    prefixes: Prefixes,
    owner: list[int],
    queries: list[str],
    fan: list[int],
    seeds: list[int],
    limit: int,
    temperature: float = 1.0,
    trained: int = 0,
) -> Boxes:
    """fan[r] boxes for query r about image owner[r]; seeds per box. `Boxes.owner` is the query each
    box belongs to.

    trained: so many questions, the first, keep their graph (`Boxes.asked`).
    """
    tokens = engine.tokens
    rows = [tokens.row(tokens.style.ground(query)) for query in queries]
    prompted = (
        engine.prompt(prefixes, owner, rows, trained)
        if trained
        else engine.prompt(prefixes, owner, rows)
    )
    answers = engine.generate(prompted, fan, limit, seeds, temperature)
    written = [tokens.text(ids) for ids in answers.rows()]
    boxes = [prompts.read_box(text) for text in written]
    readable = torch.tensor([box is not None for box in boxes])
    box_1000 = geometry.clean_1000(
        torch.tensor([box or (0.0,) * 4 for box in boxes], dtype=torch.float64)
    )
    asked = prompted.trained if trained else None
    return Boxes(
        box_1000,
        readable,
        written,
        answers,
        rows,
        [r for r, count in enumerate(fan) for _ in range(count)],
        asked,
    )


def verify(
    engine: Engine, features: Features, queries: list[str], adapters: bool, stay: bool = False
) -> Tensor:
    """p(visible) (N,) of query n on image n, judged with adapters on (policy) or off (reference).

    stay: leave it on the device.
    """
    p = _probability(
        engine, engine.verdict_logits(features, _verdict_rows(engine, queries), adapters)
    )
    return p if stay else home(engine, p)


def verify_forked(
    engine: Engine, prefixes: Prefixes, owner: list[int], queries: list[str]
) -> Tensor:
    """The same where the images' prefixes are at hand."""
    return home(
        engine,
        _probability(
            engine, engine.forked_verdict_logits(prefixes, owner, _verdict_rows(engine, queries))
        ),
    )


def home(engine: Engine, p: Tensor) -> Tensor:
    """Verdicts on the CPU: a host sync."""
    engine.counters.host_reads += 1
    return p.cpu()


def _verdict_rows(engine: Engine, queries: list[str]) -> list[list[int]]:
    tokens = engine.tokens
    return [tokens.verdict_row(tokens.style.verify(query)) for query in queries]


def _probability(engine: Engine, logits: Tensor) -> Tensor:
    """P(yes) / (P(yes) + P(no)) from next-token logits (N, V), all one-token spellings counted
    (METHOD section 4).
    """
    yes, no = (logits[:, ids].logsumexp(-1) for ids in (engine.tokens.yes, engine.tokens.no))
    return torch.sigmoid(yes - no).double()
