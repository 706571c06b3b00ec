"""What the embedded model is taught: scenes, a part of them ghosted, with several questions behind
one image prefix.

A lesson is one image with fixed slots (one "name", three "find", five "see"), so that mask and
positions are the same for all; an unused slot weighs nothing. Not here: the model, the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vise_fast.images import scenes
from vise_fast.nano.blank import TOKEN

TURN = ("<|im_end|>", "<|im_start|>", "assistant")
# before every question
PREFIX = ("<|im_start|>", "user", "<|vision_start|>", *("<|image_pad|>",) * 64, "<|vision_end|>")
SLOTS = ("name",) + ("find",) * 3 + ("see",) * 5
QUESTION = {"name": 3 + len(TURN), "find": 3 + len(TURN), "see": 4 + len(TURN)}  # tokens
ANSWER = {"name": 5, "find": 18, "see": 4}  # tokens, <|im_end|> included
# The last token is predicted, never read.
LENGTH = {kind: QUESTION[kind] + ANSWER[kind] - 1 for kind in QUESTION}
DIGITS = (1.0, 0.4, 0.4)  # loss weight of hundreds, tens, ones
WORD = 2.0
VERDICT = 4.0
REST = 0.3  # loss weights of colour and shape words, yes/no, everything else
SIGMA_PX = 25 * 128 / 480
RADIUS_PX = 20  # the trainer's ghost at 128 px
GHOSTED = 0.4  # share of the images
# Shown share from which an object is visible, below which it is not; between them nobody asks.
VISIBLE = 0.5
HIDDEN = 0.25
WHOLE = 0.9  # shown share from which its box is still the true one
SIDE = 128
CELLS = 8

BoxPx = tuple[int, int, int, int]


class GhostKind(NamedTuple):
    """How often a ghost is of this kind, the range of its size over its object's, and how far it
    lies off, in sizes.
    """

    share: float
    scale: tuple[float, float] = (0.7, 1.4)
    drift: float = 0.0


GHOST_KINDS = {
    "exact": GhostKind(0.16),
    "cover": GhostKind(0.22, (0.85, 1.7), 0.08),
    "part": GhostKind(0.17, (0.4, 1.0), 0.4),
    "elsewhere": GhostKind(0.15),
    "all": GhostKind(0.05),
    "keep": GhostKind(0.25, (0.9, 1.8), 0.08),
}
"""On an object exactly, widely or in part, elsewhere, on everything, on all but an object."""


@dataclass(frozen=True)
class Batch:
    """Arrays of B lessons: pixels uint8 (B, 128, 128, 3); ids (B, T) of the slots in a row;
    targets, weights (B, K) of the answer tokens; color (B, 64) with 8 = ground, shape (B, 64), box
    (B, 64, 4) in 0..1 and sure (B, 64): the dense head's truth per cell.
    """

    pixels: np.ndarray
    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    color: np.ndarray
    shape: np.ndarray
    box: np.ndarray
    sure: np.ndarray


@dataclass(frozen=True)
class Row:
    """One question with its answer: token texts, loss weights of the answer's tokens."""

    kind: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    weights: tuple[float, ...]


def batch(
    rng: np.random.Generator,
    size: int,
    max_objects: int = 4,
    ghosted: float = GHOSTED,
    find: float = 1.0,
) -> Batch:
    """`size` lessons; `ghosted` is the share of ghosted images, `find` scales the loss weights of
    the boxes.
    """
    lessons = [_lesson(rng, max_objects, ghosted, find) for _ in range(size)]
    columns = []
    for field in fields(Batch):
        columns.append(np.stack([getattr(lesson, field.name) for lesson in lessons]))
    return Batch(*columns)


def name_row(name: str | None) -> Row:
    """Name an object; None: an unused slot."""
    words = tuple(name.split()) if name else ("red", "circle")
    weigh = (REST, WORD, WORD, REST, REST) if name else (0.0,) * 5
    return Row(
        "name", ("name", "an", "object"), ("<query>", *words, "</query>", "<|im_end|>"), weigh
    )


def find_row(name: str, box_1000: tuple[float, ...] | None) -> Row:
    """Find an object; without a box: an unused slot."""
    digits = ",".join(f"{min(round(edge), 999):03d}" for edge in box_1000 or (0, 0, 0, 0))
    answer = ("<box>", *digits, "</box>", "<|im_end|>")
    weigh = (REST, *((DIGITS + (REST,)) * 4)[:-1], REST, REST)
    return Row("find", ("find", *name.split()), answer, weigh if box_1000 else (0.0,) * 18)


def see_row(name: str, seen: bool | None) -> Row:
    """Is it visible; without a verdict: an unused slot."""
    answer = ("<visible>", "yes" if seen else "no", "</visible>", "<|im_end|>")
    weigh = (REST, VERDICT, REST, REST) if seen is not None else (0.0,) * 4
    return Row("see", ("see", *name.split(), "?"), answer, weigh)


def ghost(pixels: np.ndarray, box_px: BoxPx, method: str, region: str) -> np.ndarray:
    """A copy of uint8 (H, W, 3) with the inside of the half-open box, or everything but it, blurred
    or filled with its mean.
    """
    x1, y1, x2, y2 = box_px
    window = (slice(y1, y2), slice(x1, x2))
    if region == "inside":
        out = pixels.copy()
        out[window] = _blur(pixels[window]) if method == "blur" else _mean(pixels[window])
        return out
    out = _blur(pixels) if method == "blur" else _mean_around(pixels, window)
    out[window] = pixels[window]
    return out


def _mean(patch: np.ndarray) -> np.ndarray:
    return np.rint(patch.mean((0, 1)))


def _mean_around(pixels: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """An image of one colour: the mean of all pixels outside the window."""
    inside = pixels[window]
    total = pixels.sum((0, 1), dtype=np.float64) - inside.sum((0, 1), dtype=np.float64)
    count = SIDE * SIDE - inside.shape[0] * inside.shape[1]
    out = np.empty_like(pixels)
    out[:] = np.rint(total / max(count, 1))
    return out


@lru_cache(maxsize=256)
def _blur_matrix(length: int) -> np.ndarray:
    """(length, length): Gaussian taps along one axis with reflect-101 at both ends, repeated where
    the reach exceeds the length.
    """
    taps = np.exp(-0.5 * (np.arange(-RADIUS_PX, RADIUS_PX + 1) / SIGMA_PX) ** 2)
    period = max(2 * (length - 1), 1)
    place = np.abs(np.arange(length)[:, None] + np.arange(-RADIUS_PX, RADIUS_PX + 1)) % period
    place = np.minimum(place, period - place) if length > 1 else np.zeros_like(place)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (np.arange(length)[:, None], place), taps / taps.sum())
    return matrix.astype(np.float32)


def _blur(patch: np.ndarray) -> np.ndarray:
    height, width, _ = patch.shape
    down = _blur_matrix(height) @ patch.reshape(height, -1).astype(np.float32)
    across = np.matmul(_blur_matrix(width), down.reshape(height, width, 3))
    return np.rint(across).clip(0, 255).astype(np.uint8)


def _ghost_plan(rng: np.random.Generator, scene: scenes.Scene) -> tuple[BoxPx, str]:
    """(box_px, region) of a ghost of a random kind on a random object."""
    shares = [ghost_kind.share for ghost_kind in GHOST_KINDS.values()]
    kind = str(rng.choice(list(GHOST_KINDS), p=shares))
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    box = np.array(thing.box_1000) * SIDE / 1000
    low, high = _drawn_box(rng, box, kind)
    if kind == "all":
        return (0, 0, SIDE, SIDE), "inside"
    if kind == "exact":
        return _box_px(np.rint(box)), "inside"
    low = np.clip(np.rint(low), 0, SIDE - 2)
    high = np.maximum(np.clip(np.rint(high), 0, SIDE), low + 1)
    return _box_px(np.concatenate([low, high])), "outside" if kind == "keep" else "inside"


def _drawn_box(
    rng: np.random.Generator, box: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """The corners (x, y) of a box of the kind's size and place, in pixels, not rounded."""
    _, scale, drift = GHOST_KINDS[kind]
    size = (box[2:] - box[:2]) * rng.uniform(*scale) * rng.uniform(0.9, 1.1, 2)
    centre = (box[:2] + box[2:]) / 2
    if kind == "elsewhere":
        centre = rng.uniform(0, SIDE, 2)
    centre = centre + rng.uniform(-drift, drift, 2) * size
    return centre - size / 2, centre + size / 2


def _box_px(edges: np.ndarray) -> BoxPx:
    x1, y1, x2, y2 = (int(edge) for edge in edges)
    return x1, y1, x2, y2


def ghosted_scene(rng: np.random.Generator, scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, owner) after one random ghost; owner is -1 under it."""
    (x1, y1, x2, y2), region = _ghost_plan(rng, scene)
    pixels = ghost(scene.pixels, (x1, y1, x2, y2), "blur" if rng.random() < 0.6 else "mean", region)
    gone = np.full(scene.owner.shape, region == "outside")
    gone[y1:y2, x1:x2] = region == "inside"
    return pixels, np.where(gone, np.int8(-1), scene.owner)


def shown_shares(scene: scenes.Scene, owner: np.ndarray) -> np.ndarray:
    """Per object: the share of its visible pixels in `scene` that `owner` still shows."""
    count = len(scene.objects)
    before = np.bincount(scene.owner.ravel() + 1, minlength=count + 1)[1:]
    return np.bincount(owner.ravel() + 1, minlength=count + 1)[1:] / before


def _lesson(rng: np.random.Generator, max_objects: int, ghosted: float, find: float) -> Batch:
    """One lesson: a Batch without its first axis."""
    scene = scenes.draw(rng, SIDE, max_objects)
    pixels = scene.pixels
    owner = scene.owner
    if rng.random() < ghosted:
        pixels, owner = ghosted_scene(rng, scene)
    shown = shown_shares(scene, owner)
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for row in _rows(rng, scene, shown):
        told = row.question + TURN + row.answer
        ids += [TOKEN[token] for token in told[:-1]]
        targets += [TOKEN[token] for token in row.answer]
        weights += [weight * (find if row.kind == "find" else 1) for weight in row.weights]
    cells = _seen_in_cells(owner, len(scene.objects))
    return Batch(
        pixels,
        np.array(ids),
        np.array(targets),
        np.array(weights, np.float32),
        *(column[cells] for column in _dense_truth(scene, shown)),
    )


def _rows(rng: np.random.Generator, scene: scenes.Scene, shown: np.ndarray) -> list[Row]:
    """The nine questions of a lesson, in the order of SLOTS."""
    order = rng.permutation(len(scene.objects))
    things = [(scene.objects[i], float(shown[i])) for i in order]
    visible = [thing.name for thing, share in things if share >= VISIBLE]
    whole = [thing for thing, share in things if share >= WHOLE][:3]
    finds = [find_row(thing.name, thing.box_1000) for thing in whole]
    finds += [find_row("red circle", None)] * (3 - len(whole))
    sees = _see_rows(rng, scene, things)
    return [name_row(visible[0] if visible else None), *finds, *sees]


def _see_rows(
    rng: np.random.Generator, scene: scenes.Scene, things: list[tuple[scenes.Thing, float]]
) -> list[Row]:
    """Five: objects that clearly show or clearly do not, then absent ones, so that there are as
    many no as yes where the slots allow.
    """
    clear = [(thing, share) for thing, share in things if not HIDDEN <= share < VISIBLE]
    rows = [see_row(thing.name, share >= VISIBLE) for thing, share in clear]
    visible = sum(share >= VISIBLE for _, share in clear)
    absent = max(1, 2 * visible - len(clear))
    for _ in range(min(absent, 5 - len(clear))):
        rows.append(see_row(scenes.absent_name(rng, scene.names), False))
    return rows + [see_row("red circle", None)] * (5 - len(rows))


def _seen_in_cells(owner: np.ndarray, count: int) -> np.ndarray:
    """(64,): what each visual token shows most of: 0 the ground, else 1 + object."""
    step = SIDE // CELLS
    grid = owner.reshape(CELLS, step, CELLS, step).transpose(0, 2, 1, 3)
    blocks = grid.reshape(CELLS * CELLS, -1)
    votes = np.stack([(blocks == index).sum(1) for index in range(-1, count)], 1)
    weights = np.array([0.6] + [1.0] * count)  # a third of a cell is enough to be seen in it
    return (votes.astype(np.float32) * weights.astype(np.float32)).argmax(1)


def _dense_truth(scene: scenes.Scene, shown: np.ndarray) -> Iterator[np.ndarray]:
    """Yields colour (8 = ground), shape, box in 0..1, and whether that box is still whole; first of
    the ground, then of each object.
    """
    colors = list(scenes.COLORS)
    yield np.array([len(colors)] + [colors.index(thing.color) for thing in scene.objects])
    yield np.array([0] + [scenes.SHAPES.index(thing.shape) for thing in scene.objects])
    boxes = [(0.0,) * 4] + [thing.box_1000 for thing in scene.objects]
    yield np.array(boxes, np.float32) / 1000
    yield np.concatenate([[False], shown >= WHOLE])
