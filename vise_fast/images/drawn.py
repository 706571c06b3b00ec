"""The embedded source: scenes that are drawn on the fly, with their truth. Nothing is read from
disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vise_fast.config.schema import Config
from vise_fast.images import scenes
from vise_fast.images.image import Image
from vise_fast.system import randomness
from vise_fast.system.errors import ConfigError


class Scenes:
    """The embedded source. The truth of an image is `scene(image.key)`; of training only the
    oracle's reward asks for it.

    Raises ConfigError where scenes.size does not fit a model grid of `multiple` pixels.
    """

    def __init__(self, config: Config, multiple: int = 1, seed: int | None = None) -> None:
        if config.scenes.size % multiple:
            raise ConfigError(
                f"scenes.size {config.scenes.size} does not fit the model's grid; give a multiple "
                f"of {multiple}"
            )
        self.settings = config.scenes
        self.seed = config.train.seed if seed is None else seed
        self.eval = config.eval

    def batch(self, step: int, n: int, part: range | None = None) -> list[Image]:
        """`n` fresh scenes of step `step`; of them those at the places `part`."""
        return [
            self._image(randomness.key(self.seed, step, "scene", i), f"scene {step}.{i}")
            for i in part or range(n)
        ]

    def held_out(self, limit: int = 128) -> list[Image]:
        """The scenes of the evaluation (eval.scenes of eval.seed), at most `limit`."""
        return [
            self._image(
                randomness.key(self.eval.seed, 0, "held-out scene", i), f"held-out scene {i}"
            )
            for i in range(min(limit, self.eval.scenes))
        ]

    def scene(self, key: int) -> scenes.Scene:
        """The scene of an image, with its objects."""
        rng = np.random.Generator(np.random.Philox(key))
        return scenes.draw(rng, size=self.settings.size, max_objects=self.settings.max_objects)

    def truth(self, image: Image, query: str) -> tuple[float, float, float, float] | None:
        """The true box in 0..1000 of a query that names exactly one object of the scene: for a
        reward that asks for it (the oracle).
        """
        named = [thing for thing in self.scene(image.key).objects if thing.name == query]
        return named[0].box_1000 if len(named) == 1 else None

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image to come: one entry stands for all."""
        return [(self.settings.size, self.settings.size)]

    def describe(self) -> str:
        """What it is, in one line."""
        size = self.settings.size
        return f"embedded scenes, {size} x {size} px, up to {self.settings.max_objects} objects"

    def identity(self) -> dict[str, Any]:
        """Nothing but the settings, which a run keeps anyway."""
        return {}

    def figures(self) -> dict[str, int]:
        """Drawing never fails."""
        return {}

    def close(self) -> None:
        """Nothing to release."""

    def _image(self, key: int, name: str) -> Image:
        return Image(torch.from_numpy(self.scene(key).pixels), name, key)
