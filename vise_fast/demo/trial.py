"""One picture asked about twice, of the base and of a share of the adapter: box, ghost, views,
verdicts, and where it looked.

    base, adapter = try_out(bench, picture, query="", alpha=1.0)

Answers are the most likely ones; the views are the training's own, drawn by a fixed seed. Left out:
the page (page.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageDraw
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.attention_meter import image_map
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate.strengths import strength
from vise_fast.images import geometry, picture_file, views
from vise_fast.images.views import View
from vise_fast.infer import Answer, answer
from vise_fast.method import roles
from vise_fast.method.evidence import VISIBLE
from vise_fast.method.roles import Question, Sampling
from vise_fast.model.load import Policy, grid_multiple
from vise_fast.system.randomness import generator

FOUND = (255, 126, 30)
EXPECTED = (255, 255, 255)
HEAT = (255, 60, 30)
VIEWS = 2


@dataclass(frozen=True)
class Bench:
    """A loaded model that pictures are tried on. adapter: whether it has one besides the base."""

    policy: Policy
    engine: Engine
    config: Config
    adapter: bool


@dataclass(frozen=True)
class Trial:
    """What one arm said; pictures are None where there was no box, or no attention to measure.

    views: the box that was found in each view (orange) and the one expected there (white).
    """

    said: str
    query: str
    picture: Pillow.Image
    ghost: Pillow.Image | None
    views: list[Pillow.Image]
    heat: Pillow.Image | None


def try_out(
    bench: Bench, picture: Pillow.Image, query: str = "", alpha: float = 1.0
) -> tuple[Trial, Trial]:
    """The base and the adapter at strength `alpha` (0: the base, 1: as trained); without an adapter
    both are the base. Where nothing is asked for, the base names something and both look for it.
    """
    pixels = on_grid(picture, bench.config)
    base = _trial(bench, pixels, query, adapters=False)
    if not bench.adapter or alpha == 0:
        return base, base
    with strength(bench.policy, alpha):
        return base, _trial(bench, pixels, base.query, adapters=True)


def on_grid(picture: Pillow.Image, config: Config) -> Tensor:
    """uint8 (H, W, 3) as the model sees it."""
    data = config.data
    multiple = grid_multiple(config.model.path)
    upright = picture.convert("RGB")
    return torch.from_numpy(
        np.array(picture_file.on_grid(upright, multiple, data.min_pixels, data.max_pixels))
    )


def _trial(bench: Bench, pixels: Tensor, query: str, adapters: bool) -> Trial:
    given = answer(bench.engine, pixels, bench.config, query or None, adapters)
    heat = _heat(bench, pixels, given.query, adapters)
    if given.box_1000 is None:
        return Trial(words(given), given.query, _image(pixels), None, [], heat)
    config = bench.config
    ghost = views.ghost(
        [pixels],
        torch.tensor([0]),
        given.box_1000[None],
        config.ghost,
        literal=config.view.literal_pixels,
    )[0]
    return Trial(
        words(given),
        given.query,
        _boxed(pixels, (given.box_1000, FOUND)),
        _image(ghost),
        _views(bench, pixels, given, adapters),
        heat,
    )


def words(given: Answer) -> str:
    """The answers as lines."""
    lines = [f"looks for: {given.query}", f"visible: {_verdict(given.seen)}"]
    if given.box_1000 is None:
        return "\n".join([*lines, f"no box (it wrote: {given.box_written[:80]})"])
    lines.append(f"box: {given.box_1000.round().int().tolist()} of 1000")
    if given.gone is not None:
        lines.append(f"still visible with the box hidden: {_verdict(given.gone)}")
    return "\n".join(lines)


def _verdict(p: float) -> str:
    return f"{'yes' if p >= VISIBLE else 'no'} (p {p:.2f})"


def _views(bench: Bench, pixels: Tensor, given: Answer, adapters: bool) -> list[Pillow.Image]:
    """The box in views of the picture, as the reward would look at it."""
    config = bench.config
    height, width = pixels.shape[:2]
    drawn = [
        views.draw_view(generator(0, n, "demo"), height, width, config.view) for n in range(VIEWS)
    ]
    moved = views.apply([pixels] * VIEWS, drawn)
    engine = bench.engine
    prefixes = engine.prefill(engine.encode(moved), adapters)
    asked = [Question(n, given.query) for n in range(VIEWS)]
    found = roles.ground(engine, prefixes, asked, Sampling(config.rollout.box_tokens, 0.0))
    return [
        _boxed(moved[n], (_expected(given, drawn[n], pixels, config), EXPECTED), (box, FOUND))
        for n, box in enumerate(found.box_1000)
    ]


def _expected(given: Answer, view: View, pixels: Tensor, config: Config) -> Tensor:
    assert given.box_1000 is not None
    height, width = pixels.shape[:2]
    mode = config.reward.projection
    return geometry.project_1000(given.box_1000, view.matrix_px, height, width, mode)


def _heat(bench: Bench, pixels: Tensor, query: str, adapters: bool) -> Pillow.Image | None:
    """The picture, redder where the box's tokens attended to it more than elsewhere on it."""
    engine = bench.engine
    if not isinstance(engine, FastEngine):
        return None
    prefix = engine.prefill(engine.encode([pixels]), adapters)
    sampling = Sampling(bench.config.rollout.box_tokens, 0.0)
    found = roles.ground(engine, prefix, [Question(0, query)], sampling)
    weights = image_map(engine, prefix, found.rows[0], found.answers)
    multiple = grid_multiple(bench.config.model.path)
    height, width = pixels.shape[:2]
    grid = weights.reshape(height // multiple, width // multiple)
    share = ((grid - grid.min()) / (grid.max() - grid.min()).clamp_min(1e-9)).numpy()
    mask = Pillow.fromarray((200 * share).astype(np.uint8)).resize((width, height))
    image = _image(pixels)
    image.paste(Pillow.new("RGB", image.size, HEAT), mask=mask)
    return image


def _image(pixels: Tensor) -> Pillow.Image:
    return Pillow.fromarray(pixels.numpy())


def _boxed(pixels: Tensor, *boxes: tuple[Tensor, tuple[int, int, int]]) -> Pillow.Image:
    """A picture with boxes (4,) of 1000, each in its colour; those without area are left out."""
    image = _image(pixels)
    pen = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 90))
    for box, colour in boxes:
        if bool(geometry.proper(box[None])[0]):
            pen.rectangle(
                geometry.to_px(box, image.height, image.width).tolist(), None, colour, line
            )
    return image
