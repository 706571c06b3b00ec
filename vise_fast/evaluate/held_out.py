"""The held-out images, through every question, for each arm: `examine`.

Drawn scenes come with their truth: every object of a scene is asked for. Photographs have none:
only what needs no labels is measured. Base and adapter are two states of one loaded model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate import forgetting, grounding, label_free, visibility
from vise_fast.evaluate.look import Look, Tally
from vise_fast.evaluate.objects import Truths, truths_of
from vise_fast.evaluate.results import Marks, Results, join
from vise_fast.images.listing.scan import Through, unseen
from vise_fast.images.sources import Source
from vise_fast.method import roles


def held_out(
    engine: Engine, source: Source, config: Config, adapters: bool, through: Through = unseen
) -> Results:
    """The results of one arm on `source.held_out(eval.scenes)`."""
    return examine(engine, source, config, (adapters,), through)[0]


def compare(engine: Engine, source: Source, config: Config) -> tuple[Results, Results]:
    """(base, adapter) on the same images."""
    base, adapter = examine(engine, source, config, (False, True))
    return base, adapter


def examine(
    engine: Engine,
    source: Source,
    config: Config,
    arms: Sequence[bool],
    through: Through = unseen,
) -> list[Results]:
    """Results of each arm (adapters on or off); empty ones when there is no held-out image.
    through: shows how far it is.
    """
    images = source.held_out(config.eval.scenes)
    draw = getattr(source, "scene", None)
    if not images:
        return [Results() for _ in arms]
    scales: list[dict[str, float]] = [{} for _ in arms]
    if draw is not None:
        scales = grounding.best_scales(engine, draw, config, through, arms)
    sheets = [_Sheet(arm, best) for arm, best in zip(arms, scales, strict=True)]
    for first in through(range(0, len(images), config.eval.batch), "evaluate"):
        look = Look(engine, images[first : first + config.eval.batch], first, config)
        truths = None if draw is None else truths_of(look, draw)
        for sheet in sheets:
            sheet.answer(look, truths)
    return [sheet.results(len(images)) for sheet in sheets]


class _Sheet:
    """What one arm has answered so far; `scales`: its best rescale per kind of answer."""

    def __init__(self, arm: bool, scales: dict[str, float]) -> None:
        self.arm = arm
        self.scales = scales
        self.marks: list[Marks] = []
        self.queries: list[str] = []
        self.shares: list[Tensor] = []

    def answer(self, look: Look, truths: Truths | None) -> None:
        """Every question about one batch."""
        own = look.own_queries(self.arm)
        marks, share = label_free.measure(look, self.arm, own)
        marks |= forgetting.measure(look, self.arm)
        if truths is not None:
            marks |= self._with_truth(look, truths, own)
        self.marks.append(marks)
        readable = zip(own.texts, own.readable, strict=True)
        self.queries += [text for text, could_be_read in readable if could_be_read]
        self.shares += [] if share is None else [share]

    def _with_truth(self, look: Look, truths: Truths, own: roles.Queries) -> Marks:
        mark = Tally(look.everyone, len(look))
        asked = zip(own.texts, truths.scenes, strict=True)
        present = [query in scene.names for query, scene in asked]
        return {
            "query_present": mark(present, own.readable),
            **grounding.measure(look, truths.objects, self.arm, self.scales),
            **visibility.measure(look, truths, self.arm),
            **visibility.blind(look, truths.objects, self.arm),
        }

    def results(self, n: int) -> Results:
        """Of all `n` images together."""
        plain = {f"{kind}_scale": scale for kind, scale in self.scales.items()}
        if self.queries:
            plain["distinct_queries"] = len(set(self.queries)) / len(self.queries)
        layers = torch.cat(self.shares, 1).mean(1).tolist() if self.shares else []
        return Results(n, join(self.marks), plain, layers)
