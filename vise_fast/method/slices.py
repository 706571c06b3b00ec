"""The images of a batch that are played together, how, and the named randomness of their step. What
every part of a step is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.images.image import Image
from vise_fast.method.roles import Sampling
from vise_fast.method.step_plan import StepPlan
from vise_fast.system import randomness


@dataclass(frozen=True)
class Draws:
    """The named randomness of one step; `first` is the slice's first image in the batch."""

    seed: int
    step: int
    first: int = 0

    def keys(self, purpose: str, count: int, per_image: int = 1) -> list[int]:
        """Seeds of `count` draws, `per_image` of each image."""
        start = self.first * per_image
        return [randomness.key(self.seed, self.step, purpose, start + i) for i in range(count)]

    def generator(self, purpose: str, index: int, per_image: int = 1) -> np.random.Generator:
        """The generator of draw `index` of the slice."""
        place = self.first * per_image + index
        return randomness.generator(self.seed, self.step, purpose, place)


@dataclass(frozen=True)
class Slice:
    """The images of the batch that are played together, uint8 (H, W, 3) on the engine's device, and
    how; `images`: the same as they came, with the words they are asked for (empty: there are none).
    """

    engine: Engine
    config: Config
    plan: StepPlan
    draws: Draws
    pixels: list[Tensor]
    images: Sequence[Image] = ()

    @property
    def originals(self) -> list[int]:
        """The places of the images themselves among images and views."""
        return list(range(len(self.pixels)))

    @property
    def sampling(self) -> Sampling:
        """How the policy's boxes are drawn."""
        rollout = self.config.rollout
        return Sampling(rollout.box_tokens, rollout.temperature)
