"""Procedurally drawn scenes with known boxes: 1-4 coloured shapes on plain, noisy or striped
grounds.

Training sees the pixels only; the truth beside them serves evaluation and the pretraining of the
embedded model. Not here: ghosts, views, question texts. One scene is a function of its numpy
generator and its settings: `draw(generator(seed, step, "scene"))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

COLORS = {
    "red": (210, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 45),
    "green": (45, 170, 60),
    "cyan": (50, 210, 220),
    "blue": (45, 75, 215),
    "purple": (150, 55, 185),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = tuple(f"{color} {shape}" for color, shape in product(COLORS, SHAPES))

RADIUS = (12 / 128, 36 / 128)  # of a shape, as a share of the scene's side
MAX_HIDDEN = 0.55  # no later object may hide more of an earlier one
DISTRACTOR = 0.3  # how often a further object shares colour or shape with an earlier one
LOOKALIKE = 0.7  # how often an absent name shares colour or shape with a present one
# width of the dark outline as a share of the side: without it, blurring a square within its exact
# box changes nothing
RIM = 2.5 / 128
RIM_SHADE = 0.55  # how much darker the outline is
TRIES = 24  # places tried for one object before it is left out


@dataclass(frozen=True)
class Thing:
    """One object. `box_1000` bounds its visible pixels (x1, y1, x2, y2 in 0..1000); `visible_share`
    in 0..1 is what others leave of it.
    """

    name: str
    color: str
    shape: str
    box_1000: tuple[float, float, float, float]
    visible_share: float


@dataclass(frozen=True)
class Scene:
    """`pixels` uint8 (H, W, 3); `objects` back to front; `owner` int8 (H, W): index of the visible
    object at a pixel, -1 is ground.
    """

    pixels: np.ndarray
    objects: list[Thing]
    owner: np.ndarray

    @property
    def names(self) -> list[str]:
        """The objects' names, back to front."""
        return [thing.name for thing in self.objects]


class _Place(NamedTuple):
    """Where an object goes: the part of the canvas around it, and the signed distance in pixels of
    each pixel there to its edge, negative inside.
    """

    window: tuple[slice, slice]
    distance: np.ndarray


def draw(
    rng: np.random.Generator, size: int = 128, max_objects: int = 4, min_objects: int = 1
) -> Scene:
    """A square scene of `size` pixels a side; names are unique within it.

    Fewer objects than drawn for when no place is found.
    """
    canvas = _ground(rng, size)
    owner = np.full((size, size), -1, np.int8)
    names: list[str] = []
    full: list[int] = []
    for _ in range(int(rng.integers(min_objects, max_objects + 1))):
        name = _new_name(rng, names)
        color, shape = name.split()
        place = _place(rng, shape, owner, full)
        if place is None:
            continue
        _paint(rng, canvas[place.window], place.distance, color, RIM * size)
        mask = place.distance < 0
        owner[place.window][mask] = len(names)
        names.append(name)
        full.append(int(mask.sum()))
    canvas += rng.integers(-5, 6, canvas.shape, dtype=np.int8)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    things = [_thing(names[i], owner == i, full[i]) for i in range(len(names))]
    return Scene(pixels, things, owner)


def absent_name(rng: np.random.Generator, present: Sequence[str]) -> str:
    """A name that is not in `present`; in 70 % of the draws it shares its colour or its shape with
    one that is.
    """
    absent = [name for name in NAMES if name not in present]
    words = set(" ".join(present).split())
    similar = [name for name in absent if words & set(name.split())]
    pool = similar if similar and rng.random() < LOOKALIKE else absent
    return pool[int(rng.integers(len(pool)))]


def mask_box_1000(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Bounds of the true pixels of a bool (H, W) mask as x1, y1, x2, y2 in 0..1000 (outer pixel
    edges); zeros for an empty mask.
    """
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    if not rows.size:
        return (0.0, 0.0, 0.0, 0.0)
    height, width = mask.shape
    x1 = columns[0] * 1000 / width
    x2 = (columns[-1] + 1) * 1000 / width
    y1 = rows[0] * 1000 / height
    y2 = (rows[-1] + 1) * 1000 / height
    return (float(x1), float(y1), float(x2), float(y2))


def _thing(name: str, mask: np.ndarray, full: int) -> Thing:
    color, shape = name.split()
    return Thing(name, color, shape, mask_box_1000(mask), float(mask.sum() / full))


def _new_name(rng: np.random.Generator, names: list[str]) -> str:
    free = [name for name in NAMES if name not in names]
    if names and rng.random() < DISTRACTOR:
        words = set(names[int(rng.integers(len(names)))].split())
        free = [name for name in free if words & set(name.split())]
    return free[int(rng.integers(len(free)))]


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Muted float32 (size, size, 3): a gradient, a noisy plane or stripes, none as saturated or as
    bright as an object.
    """
    base = rng.uniform(50, 165) + rng.uniform(-18, 18, 3)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    ramp = rng.uniform(-20, 20) * axis[:, None] + rng.uniform(-20, 20) * axis[None, :]
    kind = int(rng.integers(3))
    if kind == 1:
        reach = int(rng.integers(8, 30))
        ramp = ramp + rng.integers(-reach, reach + 1, (size, size), dtype=np.int8)
    if kind == 2:
        turn = rng.uniform(0, np.pi)
        phase = np.cos(turn) * axis[:, None] + np.sin(turn) * axis[None, :]
        ramp = ramp + rng.uniform(8, 22) * np.sign(
            np.sin(rng.uniform(8, 30) * phase + rng.uniform(0, 6))
        )
    return (ramp[:, :, None] + base).astype(np.float32)


def _place(
    rng: np.random.Generator, shape: str, owner: np.ndarray, full: list[int]
) -> _Place | None:
    """A place that leaves every earlier object at least 1 - MAX_HIDDEN of itself; None: none was
    found.
    """
    size = owner.shape[0]
    seen = np.bincount(owner.ravel() + 1, minlength=len(full) + 1)[1:]
    for _ in range(TRIES):
        radius = size * (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rng.random() ** 1.3)
        x, y = rng.uniform(radius, size - radius, 2)
        window = (_reach(y, radius, size), _reach(x, radius, size))
        distance = _distance_in(window, shape, radius, x, y)
        covered = owner[window][distance < 0]
        lost = np.bincount(covered + 1, minlength=len(full) + 1)[1:]
        if np.all(seen - lost >= (1 - MAX_HIDDEN) * np.array(full)):
            return _Place(window, distance)
    return None


def _reach(centre: float, radius: float, size: int) -> slice:
    """Pixels along one side that a shape may touch, with one to spare at either end."""
    return slice(max(int(centre - radius) - 1, 0), min(int(centre + radius) + 2, size))


def _distance_in(
    window: tuple[slice, slice], shape: str, radius: float, x: float, y: float
) -> np.ndarray:
    """Signed distance (pixels, negative inside) from the window's pixel centres to the edge of a
    shape centred at (x, y).
    """
    v = (np.arange(window[0].start, window[0].stop, dtype=np.float32) + 0.5 - y)[:, None]
    u = (np.arange(window[1].start, window[1].stop, dtype=np.float32) + 0.5 - x)[None, :]
    return _distance(shape, radius, u, v)


def _distance(shape: str, radius: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (pixels, negative inside) to a shape about the origin; u to the right, v
    down.
    """
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius
    if shape == "triangle":  # apex up; sides of slope 2 meet the base at +-0.95 radius
        return np.maximum((2 * np.abs(u) - v - radius) / np.sqrt(5), v - 0.9 * radius)
    arm = radius
    half = 0.34 * radius
    a = np.abs(u)
    b = np.abs(v)
    return np.minimum(np.maximum(a - arm, b - half), np.maximum(a - half, b - arm))


def _paint(
    rng: np.random.Generator, patch: np.ndarray, distance: np.ndarray, color: str, rim: float
) -> None:
    """Blends one shaded, outlined shape into a float32 view of the canvas, in place; its edge is
    smoothed over one pixel.
    """
    height, width = distance.shape
    tilt = rng.uniform(-0.15, 0.15, 2)
    light = (
        rng.uniform(0.88, 1.05)
        + tilt[0] * np.linspace(-1, 1, height)[:, None]
        + tilt[1] * np.linspace(-1, 1, width)[None, :]
    )
    tone = np.array(COLORS[color]) + rng.uniform(-10, 10, 3)
    light = light * (1 - RIM_SHADE * np.clip(distance + rim + 0.5, 0, 1))
    paint = (light[:, :, None] * tone).astype(np.float32)
    patch += np.clip(0.5 - distance, 0, 1)[:, :, None] * (paint - patch)
