"""What the embedded model is taught: scenes, a part of them ghosted, with several questions behind
one image prefix.

A lesson is one image with fixed slots (one "name", three "find", five "see"), so that mask and
positions are the same for all; an unused slot weighs nothing. Not here: the model, the optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vise_fast.images import scenes
from vise_fast.nano.blank import VOCABULARY

TOKEN = {token: index for index, token in enumerate(VOCABULARY)}
TURN = ("<|im_end|>", "<|im_start|>", "assistant")
PREFIX = (
    "<|im_start|>",
    "user",
    "<|vision_start|>",
    *("<|image_pad|>",) * 64,
    "<|vision_end|>",
)  # before every question
SLOTS = ("name",) + ("find",) * 3 + ("see",) * 5
QUESTION = {"name": 3 + len(TURN), "find": 3 + len(TURN), "see": 4 + len(TURN)}  # tokens
ANSWER = {"name": 5, "find": 18, "see": 4}  # tokens, <|im_end|> included
LENGTH = {
    kind: QUESTION[kind] + ANSWER[kind] - 1 for kind in QUESTION
}  # the last token is predicted, never read
DIGITS = (1.0, 0.4, 0.4)  # loss weight of hundreds, tens, ones
WORD = 2.0
VERDICT = 4.0
REST = 0.3  # loss weights of colour and shape words, yes/no, everything else
SIGMA_PX = 25 * 128 / 480
RADIUS_PX = 20  # the trainer's ghost at 128 px
GHOSTED = 0.4  # share of the images
VISIBLE = 0.5
HIDDEN = 0.25  # shown share from which an object is visible, below which it is not; between them nobody asks
SIDE = 128
CELLS = 8


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
    return Batch(*(np.stack(column) for column in zip(*lessons)))


def name_row(name: str | None) -> Row:
    words = tuple(name.split()) if name else ("red", "circle")
    weigh = (REST, WORD, WORD, REST, REST) if name else (0.0,) * 5
    return Row(
        "name", ("name", "an", "object"), ("<query>", *words, "</query>", "<|im_end|>"), weigh
    )


def find_row(name: str, box_1000: tuple[float, ...] | None) -> Row:
    digits = ",".join(f"{min(round(edge), 999):03d}" for edge in box_1000 or (0, 0, 0, 0))
    weigh = (REST, *((DIGITS + (REST,)) * 4)[:-1], REST, REST)
    return Row(
        "find",
        ("find", *name.split()),
        ("<box>", *digits, "</box>", "<|im_end|>"),
        weigh if box_1000 else (0.0,) * 18,
    )


def see_row(name: str, seen: bool | None) -> Row:
    word = "yes" if seen else "no"
    weigh = (REST, VERDICT, REST, REST) if seen is not None else (0.0,) * 4
    return Row(
        "see", ("see", *name.split(), "?"), ("<visible>", word, "</visible>", "<|im_end|>"), weigh
    )


def ghost(
    pixels: np.ndarray, box_px: tuple[int, int, int, int], method: str, region: str
) -> np.ndarray:
    """A copy of uint8 (H, W, 3) with the inside of the half-open box, or everything but it, blurred
    or filled with its mean.
    """
    x1, y1, x2, y2 = box_px
    window = (slice(y1, y2), slice(x1, x2))
    if region == "inside":
        out = pixels.copy()
        out[window] = (
            _blur(pixels[window]) if method == "blur" else np.rint(pixels[window].mean((0, 1)))
        )
        return out
    if method == "blur":
        out = _blur(pixels)
    else:
        area = (y2 - y1) * (x2 - x1)
        total = pixels.sum((0, 1), dtype=np.float64) - pixels[window].sum((0, 1), dtype=np.float64)
        out = np.empty_like(pixels)
        out[:] = np.rint(total / max(SIDE * SIDE - area, 1))
    out[window] = pixels[window]
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
    rows = (_blur_matrix(height) @ patch.reshape(height, -1).astype(np.float32)).reshape(
        height, width, 3
    )
    return np.rint(np.matmul(_blur_matrix(width), rows)).clip(0, 255).astype(np.uint8)


def _ghost_plan(
    rng: np.random.Generator, scene: scenes.Scene
) -> tuple[tuple[int, int, int, int], str]:
    """(box_px, region) of a ghost: on an object exactly, widely or in part, elsewhere, on
    everything, on everything but an object.
    """
    kind = rng.choice(
        ["exact", "cover", "part", "elsewhere", "all", "keep"],
        p=[0.16, 0.22, 0.17, 0.15, 0.05, 0.25],
    )
    x1, y1, x2, y2 = (
        np.array(scene.objects[int(rng.integers(len(scene.objects)))].box_1000) * SIDE / 1000
    )
    x = (x1 + x2) / 2
    y = (y1 + y2) / 2
    width = x2 - x1
    height = y2 - y1
    scale, drift = {
        "cover": ((0.85, 1.7), 0.08),
        "part": ((0.4, 1.0), 0.4),
        "keep": ((0.9, 1.8), 0.08),
    }.get(str(kind), ((0.7, 1.4), 0))
    width, height = np.array([width, height]) * rng.uniform(*scale) * rng.uniform(0.9, 1.1, 2)
    if kind == "elsewhere":
        x, y = rng.uniform(0, SIDE, 2)
    x, y = np.array([x, y]) + rng.uniform(-drift, drift, 2) * (width, height)
    if kind == "all":
        return (0, 0, SIDE, SIDE), "inside"
    if kind == "exact":
        return (round(x1), round(y1), round(x2), round(y2)), "inside"
    lo = np.clip(np.rint([x - width / 2, y - height / 2]), 0, SIDE - 2).astype(int)
    hi = np.maximum(np.clip(np.rint([x + width / 2, y + height / 2]), 0, SIDE).astype(int), lo + 1)
    return (
        int(lo[0]),
        int(lo[1]),
        int(hi[0]),
        int(hi[1]),
    ), "outside" if kind == "keep" else "inside"


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


def _lesson(rng: np.random.Generator, max_objects: int, ghosted: float, find: float):
    scene = scenes.draw(rng, SIDE, max_objects)
    pixels, owner = (
        ghosted_scene(rng, scene) if rng.random() < ghosted else (scene.pixels, scene.owner)
    )
    shown = shown_shares(scene, owner)
    rows = _rows(rng, scene, shown)
    ids = [TOKEN[token] for row in rows for token in (row.question + TURN + row.answer)[:-1]]
    targets = [TOKEN[token] for row in rows for token in row.answer]
    weights = [
        weight * (find if row.kind == "find" else 1) for row in rows for weight in row.weights
    ]
    return (
        pixels,
        np.array(ids),
        np.array(targets),
        np.array(weights, np.float32),
        *_cells(scene, owner, shown),
    )


def _rows(rng: np.random.Generator, scene: scenes.Scene, shown: np.ndarray) -> list[Row]:
    order = rng.permutation(len(scene.objects))
    things = [(scene.objects[i], shown[i]) for i in order]
    visible = [thing.name for thing, share in things if share >= VISIBLE]
    rows = [name_row(visible[0] if visible else None)]
    whole = [thing for thing, share in things if share >= 0.9][:3]
    rows += [find_row(thing.name, thing.box_1000) for thing in whole]
    rows += [find_row("red circle", None)] * (3 - len(whole))
    asked = [
        (thing.name, share >= VISIBLE)
        for thing, share in things
        if share >= VISIBLE or share < HIDDEN
    ]
    absent = max(1, 2 * len(visible) - len(asked))  # as many no as yes, where the slots allow
    asked += [
        (scenes.absent_name(rng, scene.names), False) for _ in range(min(absent, 5 - len(asked)))
    ]
    rows += [see_row(name, seen) for name, seen in asked]
    return rows + [see_row("red circle", None)] * (5 - len(asked))


def _cells(scene: scenes.Scene, owner: np.ndarray, shown: np.ndarray):
    """Truth per visual token: colour (8 = ground), shape, box in 0..1, and whether that box is
    still whole.
    """
    step = SIDE // CELLS
    count = len(scene.objects)
    blocks = (
        owner.reshape(CELLS, step, CELLS, step).transpose(0, 2, 1, 3).reshape(CELLS * CELLS, -1)
    )
    votes = np.stack([(blocks == index).sum(1) for index in range(-1, count)], 1).astype(np.float32)
    votes[:, 0] *= 0.6  # a third of a cell is enough to be seen in it
    winner = votes.argmax(1)
    color = np.array(
        [len(scenes.COLORS)] + [list(scenes.COLORS).index(thing.color) for thing in scene.objects]
    )
    shape = np.array([0] + [scenes.SHAPES.index(thing.shape) for thing in scene.objects])
    box = np.array([(0.0,) * 4] + [thing.box_1000 for thing in scene.objects], np.float32) / 1000
    sure = np.concatenate([[False], shown >= 0.9])
    return color[winner], shape[winner], box[winner], sure[winner]
