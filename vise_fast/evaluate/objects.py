"""What the truth about an image adds: its objects, and what is shown and asked instead of them.

The truth is a drawn scene's, or what somebody marked on a photograph. An image may hold two objects
of one name; only an object whose name is no other's can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vise_fast.engine.rollout import Held
from vise_fast.evaluate.look import Look
from vise_fast.images import views
from vise_fast.images.geometry import Box
from vise_fast.images.labels.pictures import Labelled
from vise_fast.images.scenes import NAMES, Scene, Thing

CLEARLY_VISIBLE = 0.5  # objects of which less shows are not asked about with yes or no


class Named(Protocol):
    """Something that can be asked for."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def box_1000(self) -> Box:
        """Where it is."""

    @property
    def visible_share(self) -> float:
        """What others leave of it, 0..1."""


@dataclass(frozen=True)
class Objects:
    """The objects of a batch of images, one row each; `owner`: the image of each."""

    things: Sequence[Named]
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

    @classmethod
    def marked(cls, pictures: Sequence[Labelled], points: bool = False) -> Objects:
        """Every box, or every point, that may be asked for."""
        rows = [picture.points if points else picture.objects for picture in pictures]
        owner = [i for i, row in enumerate(rows) for _ in row]
        return cls([label for row in rows for label in row], owner)

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
    """A batch of images, what is in each, their objects, something absent for each (none: it is not
    known what is), and features of the images with the object hidden (`gone`), or another place
    (`aside`, for the objects `far`).
    """

    names: list[list[str]]
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
    for thing, scene, rank in zip(objects.things, objects.owner, objects.ranks, strict=True):
        assert isinstance(thing, Thing)
        lookalikes.append(lookalike(look.rng(scene, "lookalike", rank), thing, scenes[scene]))
    return _with_ghosts(look, [scene.names for scene in scenes], objects, lookalikes)


def truths_of_labels(look: Look, pictures: Sequence[Labelled], absent: Sequence[str]) -> Truths:
    """absent: phrases for what is in no picture; one is drawn for each object."""
    objects = Objects.marked(pictures)
    lookalikes = []
    for image, rank in zip(objects.owner, objects.ranks, strict=True) if absent else ():
        lookalikes.append(somewhere_else(look, image, rank, absent))
    return _with_ghosts(look, [picture.names for picture in pictures], objects, lookalikes)


def somewhere_else(look: Look, image: int, rank: int, absent: Sequence[str]) -> str:
    """One of the things that are in no picture."""
    return absent[int(look.rng(image, "absent", rank).integers(len(absent)))]


def _with_ghosts(
    look: Look, names: list[list[str]], objects: Objects, lookalikes: list[str]
) -> Truths:
    """Objects, each hidden, and another place of its size hidden where one is free."""
    far = []
    elsewhere = []
    rows = zip(objects.things, objects.owner, objects.ranks, strict=True)
    for n, (thing, image, rank) in enumerate(rows):
        box, kind = views.control_box(look.rng(image, "aside", rank), thing.box_1000)
        if kind == "far":
            far.append(n)
            elsewhere.append(box)
    gone = look.hidden(objects.owner, objects.box_1000)
    aside = None
    if far:
        boxes = torch.tensor(elsewhere, dtype=torch.float64)
        aside = look.hidden([objects.owner[n] for n in far], boxes)
    return Truths(names, objects, lookalikes, gone, aside, far)


def lookalike(rng: np.random.Generator, thing: Thing, scene: Scene) -> str:
    """An absent name that shares colour or shape with the object (POPE's adversarial negatives,
    arXiv 2305.10355).
    """
    alike = {thing.color, thing.shape}
    pool = [name for name in NAMES if name not in scene.names and alike & set(name.split())]
    return pool[int(rng.integers(len(pool)))]
