"""What training may have changed that it never asked for: free descriptions of held-out images, and
plain questions that are answered with yes or no.

The figure that tells is the KL to the base along the arm's own descriptions, exact at every token

    KL = sum_t KL(p(. | x, y<t) || p_base(. | x, y<t)) / T,    y sampled from p at temperature 1

with two passes over what was written (one per arm) and one over the head. Both arms are asked the
same, each in its own words. Left out: what is too much (report/alarms.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vise_kernels import linear_logprob_kl

from vise_fast.engine.rollout import Answered, Rollout
from vise_fast.evaluate.look import Look, Tally
from vise_fast.evaluate.results import Mark, Marks
from vise_fast.method import roles
from vise_fast.text.tokens import Tokens

LIMIT = 64
"""New tokens of a description at most."""


@dataclass(frozen=True)
class Plain:
    """What is asked; opened: questions end in the style's own opening of a verdict."""

    describe: str
    questions: tuple[str, ...]
    opened: bool = False


ABOUT = (
    "a person",
    "an animal",
    "a vehicle",
    "a building",
    "a plant",
    "something to eat",
    "any writing",
    "water",
)
NATURAL = Plain(
    "Describe this image.",
    tuple(f"Is there {thing} in this image? Answer with yes or no." for thing in ABOUT),
)
NAMES = ("red circle", "blue square", "green triangle", "white cross")
EMBEDDED = Plain("name an object", tuple(f"see {name} ?" for name in NAMES), opened=True)
"""The few hundred words of the embedded model hold neither."""


def plain(tokens: Tokens) -> Plain:
    """What a model can be asked."""
    return EMBEDDED if tokens.style.name == "short" else NATURAL


def measure(look: Look, arm: bool) -> Marks:
    """Of the first `eval.describe` held-out images, those that are in this batch: length of a
    description in tokens, share of yes, and for the adapter the KL to the base in nat per token.
    """
    count = min(max(look.config.eval.describe - look.first, 0), len(look))
    chosen = look.everyone[:count]
    if not chosen:
        return {}
    mark = Tally(chosen, len(look))
    rows, answers = _described(look, chosen, arm)
    marks = {"free_length": mark(answers.lengths), "free_yes": _yes(look, chosen, arm)}
    if arm:
        marks["free_kl"] = _kl(look, chosen, rows, answers)
    return marks


def _described(look: Look, chosen: list[int], arm: bool) -> tuple[list[list[int]], Rollout]:
    """The ids of the question about each image, and one sampled answer each."""
    engine = look.engine
    rows = [engine.tokens.row(plain(engine.tokens).describe)] * len(chosen)
    prompts = engine.prompt(look.prefix(arm), chosen, rows)
    seeds = [look.key(i, "describe") for i in chosen]
    return rows, engine.generate(prompts, [1] * len(chosen), LIMIT, seeds)


def _yes(look: Look, chosen: list[int], arm: bool) -> Mark:
    """Every question about every image."""
    tokens = look.engine.tokens
    asked = plain(tokens)
    question = tokens.verdict_row if asked.opened else tokens.row
    owner: list[int] = []
    rows: list[list[int]] = []
    for i in chosen:
        owner += [i] * len(asked.questions)
        rows += [question(text) for text in asked.questions]
    p = roles.p_yes(look.engine, look.prefix(arm), owner, rows)
    return Tally(owner, len(look))(roles.finite(p) >= 0.5)


@torch.no_grad()
def _kl(look: Look, chosen: list[int], rows: list[list[int]], answers: Rollout) -> Mark:
    """(sum over tokens, tokens) of each image."""
    engine = look.engine
    answered = Answered(rows, answers, list(range(len(chosen))))
    features = look.features.select(chosen)

    def read(adapters: bool) -> Tensor:
        prefixes = look.prefix(adapters).select(chosen)
        return engine.score(features, answered, adapters, prefixes=prefixes)

    head = engine.backbone.head.weight
    ids = answers.packed()
    scores = linear_logprob_kl(read(True), read(False), head, ids, banned=engine.banned)
    owner: list[int] = []
    for i, length in zip(chosen, answers.lengths, strict=True):
        owner += [i] * length
    return Tally(owner, len(look))(engine.home(scores[2]))
