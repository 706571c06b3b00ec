"""A batch of held-out images as the engine sees it, for both arms: base (adapters off) and adapter
(on).

An image is encoded once for both arms and read once per arm; everything asked about it forks that
prefix. Every draw is named by (eval.seed, scene), so neither the batch size nor the other arm
changes an answer. Left out: what is asked (label_free.py, grounding.py, visibility.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine, Held
from vise_fast.evaluate.results import Mark
from vise_fast.images import views
from vise_fast.images.image import Image
from vise_fast.images.views import View
from vise_fast.method import roles
from vise_fast.method.evidence import VISIBLE
from vise_fast.method.roles import Question, Sampling
from vise_fast.system import randomness

Values = Tensor | np.ndarray | Sequence
"""One entry per row."""


class Look:
    """A batch of images; `first` is the place of its first image among all held-out ones.

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
        self._prefixes: dict[bool, Held] = {}

    def __len__(self) -> int:
        return len(self.images)

    def prefix(self, arm: bool) -> Held:
        """The images as one arm has read them."""
        if arm not in self._prefixes:
            self._prefixes[arm] = self.engine.prefill(self.features, adapters=arm)
        return self._prefixes[arm]

    @cached_property
    def queries(self) -> list[str]:
        """The base's most likely query about each image."""
        sampling = Sampling(self.config.rollout.query_tokens, temperature=0.0)
        seeds = [0] * len(self)
        return roles.ask(self.engine, self.prefix(False), self.everyone, seeds, sampling).texts

    @cached_property
    def views(self) -> tuple[list[list[View]], Held]:
        """rollout.views views of each image, and their features in that order."""
        drawn = [self._draw_views(i) for i in self.everyone]
        images: list[Tensor] = []
        flat: list[View] = []
        for pixels, row in zip(self.pixels, drawn, strict=True):
            images += [pixels] * len(row)
            flat += row
        return drawn, self.engine.encode(views.apply(images, flat))

    def _draw_views(self, image: int) -> list[View]:
        height, width = self.pixels[image].shape[:2]
        draws = [self.rng(image, "view", k) for k in range(self.config.rollout.views)]
        return [views.draw_view(rng, height, width, self.config.view) for rng in draws]

    def own_queries(self, arm: bool) -> roles.Queries:
        """A sampled query of the arm's own about each image."""
        seeds = [self.key(i, "ask") for i in self.everyone]
        sampling = Sampling(self.config.rollout.query_tokens)
        return roles.ask(self.engine, self.prefix(arm), self.everyone, seeds, sampling)

    def boxes(self, prefixes: Held, owner: list[int], names: list[str]) -> roles.Boxes:
        """One greedy box per name, about the image behind prefix owner[n]."""
        sampling = Sampling(self.config.rollout.box_tokens, temperature=0.0)
        questions = [Question(i, name) for i, name in zip(owner, names, strict=True)]
        return roles.ground(self.engine, prefixes, questions, sampling)

    def sees(self, prefixes: Held, owner: list[int], names: list[str]) -> Tensor:
        """Bool (N,): whether name n is visible on the image behind prefix owner[n]."""
        p = roles.verify_forked(self.engine, prefixes, owner, names)
        return roles.finite(p) >= VISIBLE

    def sees_in(self, features: Held, names: list[str], arm: bool) -> Tensor:
        """Bool (N,): whether name n is visible on image n of `features`."""
        return roles.finite(roles.verify(self.engine, features, names, arm)) >= VISIBLE

    def hidden(self, owner: list[int], box_1000: Tensor) -> Held:
        """Features of copies of the images, copy n with box n (N, 4) of image owner[n] ghosted."""
        ghosts = views.ghost(
            self.pixels,
            torch.tensor(owner),
            box_1000,
            self.config.ghost,
            literal=self.config.view.literal_pixels,
        )
        return self.engine.encode(ghosts)

    def rng(self, image: int, purpose: str, index: int = 0) -> np.random.Generator:
        """A generator of the image's own for one purpose."""
        return randomness.generator(self.config.eval.seed, self.first + image, purpose, index)

    def key(self, image: int, purpose: str, index: int = 0) -> int:
        """A seed of the image's own for one purpose."""
        return randomness.key(self.config.eval.seed, self.first + image, purpose, index)


@dataclass(frozen=True)
class Tally:
    """Adds up rows per image: row n belongs to image owner[n] of `count`."""

    owner: Sequence[int]
    count: int

    def __call__(self, values: Values, of: Values | None = None) -> Mark:
        """Sums of values (N,) over the rows `of` (N,) bool (None: all), and how many those are."""
        weights = np.ones(len(self.owner)) if of is None else np.asarray(of, float)
        counted = np.where(weights > 0, np.asarray(values, float), 0.0)
        tops = np.bincount(self.owner, counted * weights, self.count)
        return tops, np.bincount(self.owner, weights, self.count)
