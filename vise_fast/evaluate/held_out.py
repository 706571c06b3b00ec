"""The held-out images, through every question, for each arm: `examine`.

Drawn scenes come with their truth: every object of a scene is asked for. Photographs have none:
only what needs no labels is measured. Labelled pictures are photographs with truth; where there are
some, no scenes are drawn. Base and adapter are two states of one loaded model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate import forgetting, grounding, label_free, visibility
from vise_fast.evaluate.look import Look, Tally
from vise_fast.evaluate.objects import Objects, Truths, truths_of, truths_of_labels
from vise_fast.evaluate.results import Marks, Results, join
from vise_fast.images.image import Image
from vise_fast.images.labels.pictures import Labelled, Pictures
from vise_fast.images.listing.through import Through, unseen
from vise_fast.images.scenes import Scene
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
    known = _Known.of(source, config)
    if not known.images and not known.labelled:
        return [Results() for _ in arms]
    scales: list[dict[str, float]] = [{} for _ in arms]
    if known.draw is not None:
        scales = grounding.best_scales(engine, known.draw, config, through, arms)
    sheets = [_Sheet(arm, best) for arm, best in zip(arms, scales, strict=True)]
    for batch in through(known.batches(config.eval.batch), "evaluate"):
        look, truths = known.look(engine, config, batch)
        for sheet in sheets:
            sheet.answer(look, truths)
    return [sheet.results(known.count) for sheet in sheets]


class _Part(NamedTuple):
    """Where a batch begins among the labelled images, or the others."""

    labelled: bool
    first: int


@dataclass(frozen=True)
class _Batch:
    """What is known of a batch of images: `truths` of those with boxes, `points`, and phrases for
    what is in none of them.
    """

    truths: Truths | None = None
    points: Objects | None = None
    absent: Sequence[str] = ()


@dataclass(frozen=True)
class _Known:
    """The held-out images, and what tells their truth: `draw` that of drawn scenes; `labelled` are
    further images with theirs.
    """

    images: list[Image]
    draw: Callable[[int], Scene] | None
    labels: Pictures | None
    labelled: list[Labelled]
    absent: Sequence[str]

    @classmethod
    def of(cls, source: Source, config: Config) -> _Known:
        """At most eval.scenes of either kind."""
        limit = config.eval.scenes
        labels = getattr(source, "labels", None)
        draw = getattr(source, "scene", None)
        labelled = [] if labels is None else labels.pictures[:limit]
        images = [] if labels is not None and draw is not None else source.held_out(limit)
        draw = draw if labels is None else None
        return cls(images, draw, labels, labelled, getattr(source, "absent", ()))

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self.images) + len(self.labelled)

    def batches(self, size: int) -> list[_Part]:
        """All of them, the labelled ones last."""
        plain = [_Part(False, first) for first in range(0, len(self.images), size)]
        return plain + [_Part(True, first) for first in range(0, len(self.labelled), size)]

    def look(self, engine: Engine, config: Config, part: _Part) -> tuple[Look, _Batch]:
        """One batch, and what is known of it."""
        which = slice(part.first, part.first + config.eval.batch)
        if not part.labelled:
            look = Look(engine, self.images[which], part.first, config)
            drawn = None if self.draw is None else truths_of(look, self.draw)
            return look, _Batch(drawn, None, self.absent)
        assert self.labels is not None
        chosen = self.labelled[which]
        place = len(self.images) + part.first
        look = Look(engine, self.labels.images(chosen), place, config)
        return look, self._of_labels(look, chosen)

    def _of_labels(self, look: Look, chosen: list[Labelled]) -> _Batch:
        boxes = any(picture.objects for picture in chosen)
        truths = truths_of_labels(look, chosen, self.absent) if boxes else None
        points = Objects.marked(chosen, points=True)
        return _Batch(truths, points if len(points) else None)


class _Sheet:
    """What one arm has answered so far; `scales`: its best rescale per kind of answer."""

    def __init__(self, arm: bool, scales: dict[str, float]) -> None:
        self.arm = arm
        self.scales = scales
        self.marks: list[Marks] = []
        self.queries: list[str] = []
        self.shares: list[Tensor] = []

    def answer(self, look: Look, known: _Batch) -> None:
        """Every question about one batch."""
        own = look.own_queries(self.arm)
        marks, share = label_free.measure(look, self.arm, own)
        marks |= forgetting.measure(look, self.arm)
        if known.truths is not None:
            marks |= self._with_truth(look, known.truths, own)
        elif known.absent:
            marks |= visibility.of_absent(look, self.arm, known.absent)
        if known.points is not None:
            marks |= grounding.measure_points(look, known.points, self.arm)
        self.marks.append(marks)
        readable = zip(own.texts, own.readable, strict=True)
        self.queries += [text for text, could_be_read in readable if could_be_read]
        self.shares += [] if share is None else [share]

    def _with_truth(self, look: Look, truths: Truths, own: roles.Queries) -> Marks:
        marks: Marks = {}
        if self.scales:  # of a drawn scene everything is known, of a labelled picture some things
            asked = zip(own.texts, truths.names, strict=True)
            present = [query in names for query, names in asked]
            marks["query_present"] = Tally(look.everyone, len(look))(present, own.readable)
        return {
            **marks,
            **grounding.measure(look, truths.objects, self.arm, self.scales),
            **visibility.measure(look, truths, self.arm),
            **visibility.blind(look, truths.objects, self.arm),
        }

    def results(self, n: int) -> Results:
        """Of all `n` images together."""
        marks, plain = grounding.cross_fitted(join(self.marks))
        plain |= {f"{kind}_scale": scale for kind, scale in self.scales.items()}
        if self.queries:
            plain["distinct_queries"] = len(set(self.queries)) / len(self.queries)
        layers = torch.cat(self.shares, 1).mean(1).tolist() if self.shares else []
        return Results(n, marks, plain, layers)
