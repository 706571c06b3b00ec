"""What a scene's truth adds: its objects, and what is shown and asked instead of them.

A scene may hold two objects of one name; only an object whose name is no other's can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vise_fast.engine.rollout import Held
from vise_fast.evaluate.look import Look
from vise_fast.images import views
from vise_fast.images.scenes import NAMES, Scene, Thing

CLEARLY_VISIBLE = 0.5  # objects of which less shows are not asked about with yes or no


@dataclass(frozen=True)
class Objects:
    """The objects of a batch of scenes, one row each; `owner`: the scene of each."""

    things: list[Thing]
    owner: list[int]

    @classmethod
    def of(cls, scenes: list[Scene]) -> Objects:
        """Every object whose name is no other object's."""
        things: list[Thing] = []
        owner: list[int] = []
        for i, scene in enumerate(scenes):
            unique = [thing for thing in scene.objects if scene.names.count(thing.name) == 1]
            things += unique
            owner += [i] * len(unique)
        return cls(things, owner)

    def __len__(self) -> int:
        return len(self.things)

    @property
    def names(self) -> list[str]:
        """What each is called."""
        return [thing.name for thing in self.things]

    @property
    def box_1000(self) -> Tensor:
        """float64 (N, 4)."""
        return torch.tensor([thing.box_1000 for thing in self.things], dtype=torch.float64)

    @property
    def ranks(self) -> list[int]:
        """The place of each among its scene's objects."""
        return [self.owner[:n].count(scene) for n, scene in enumerate(self.owner)]

    @property
    def clear(self) -> np.ndarray:
        """Bool (N,): enough of the object shows for a yes."""
        return np.array([thing.visible_share >= CLEARLY_VISIBLE for thing in self.things])


@dataclass
class Truths:
    """A batch of scenes, their objects, an absent lookalike of each, and features of the scenes
    with the object hidden (`gone`), or another place (`aside`, for the objects `far`).
    """

    scenes: list[Scene]
    objects: Objects
    lookalikes: list[str]
    gone: Held
    aside: Held | None
    far: list[int]


def truths_of(look: Look, draw: Callable[[int], Scene]) -> Truths:
    """`draw`: image key -> scene."""
    scenes = [draw(image.key) for image in look.images]
    objects = Objects.of(scenes)
    lookalikes = []
    elsewhere = []
    far = []
    rows = zip(objects.things, objects.owner, objects.ranks, strict=True)
    for n, (thing, scene, rank) in enumerate(rows):
        lookalikes.append(lookalike(look.rng(scene, "lookalike", rank), thing, scenes[scene]))
        box, kind = views.control_box(look.rng(scene, "aside", rank), thing.box_1000)
        if kind == "far":
            far.append(n)
            elsewhere.append(box)
    gone = look.hidden(objects.owner, objects.box_1000)
    aside = None
    if far:
        boxes = torch.tensor(elsewhere, dtype=torch.float64)
        aside = look.hidden([objects.owner[n] for n in far], boxes)
    return Truths(scenes, objects, lookalikes, gone, aside, far)


def lookalike(rng: np.random.Generator, thing: Thing, scene: Scene) -> str:
    """An absent name that shares colour or shape with the object (POPE's adversarial negatives,
    arXiv 2305.10355).
    """
    alike = {thing.color, thing.shape}
    pool = [name for name in NAMES if name not in scene.names and alike & set(name.split())]
    return pool[int(rng.integers(len(pool)))]
