"""Ask a model about one image: name an object, box it, say whether it is visible, before and after
the box is hidden.

    python -m vise_fast.infer --image photo.jpg [--adapter runs/nano/adapter] [--model PATH]
    [--query TEXT] [--draw FILE.png]

Without --query the model names an object itself. Answers are the most likely ones. Left out:
batches, sampling.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("infer")  # before what takes seconds to import

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as Pillow
from PIL import ImageDraw
from torch import Tensor

from vise_fast.config import origin
from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.engine.rollout import Engine
from vise_fast.images import geometry, picture_file, views
from vise_fast.method import roles
from vise_fast.method.evidence import VISIBLE
from vise_fast.method.roles import Question, Sampling
from vise_fast.model.load import grid_multiple, load
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault
from vise_fast.system.machine import threads

ORANGE = (255, 126, 30)
SYNTAX = commands.syntax("infer")


@dataclass(frozen=True)
class Answer:
    """`box_1000` (4,) is None where the answer could not be read or has no area; then nothing was
    hidden and `gone` is None.
    """

    query: str
    query_written: str | None
    box_1000: Tensor | None
    box_written: str
    seen: float
    gone: float | None


def answer(
    engine: Engine, pixels: Tensor, config: Config, query: str | None, adapters: bool
) -> Answer:
    """Everything about one image, uint8 (H, W, 3) on the model's grid; one encode and one prefix
    serve all questions about it. Raises NumericFault where a verdict is no number.
    """
    prefix = engine.prefill(engine.encode([pixels]), adapters)
    written = None
    if not query:
        asked = roles.ask(engine, prefix, [0], [0], Sampling(config.rollout.query_tokens, 0.0))
        query = asked.texts[0]
        written = asked.written[0]
    sampling = Sampling(config.rollout.box_tokens, temperature=0.0)
    found = roles.ground(engine, prefix, [Question(0, query)], sampling)
    seen = float(roles.finite(roles.verify_forked(engine, prefix, [0], [query]))[0])
    box = found.box_1000[0] if bool(geometry.proper(found.box_1000)[0]) else None
    gone = None
    if box is not None:
        hidden = engine.encode(_ghost(pixels, box, config))
        gone = float(roles.finite(roles.verify(engine, hidden, [query], adapters))[0])
    return Answer(query, written, box, found.written[0], seen, gone)


def _ghost(pixels: Tensor, box_1000: Tensor, config: Config) -> list[Tensor]:
    """A copy of the image with the box (4,) hidden."""
    literal = config.view.literal_pixels
    return views.ghost([pixels], torch.tensor([0]), box_1000[None], config.ghost, literal=literal)


def read_image(path: Path, config: Config) -> tuple[Pillow.Image, Tensor]:
    """The upright picture as it is, and its pixels on the model's grid. Raises DataError."""
    multiple = grid_multiple(config.model.path)
    try:
        picture = picture_file.decode(path, config.data.max_header_pixels)
    except picture_file.BadImage as fault:
        raise DataError(
            f"--image {path} {fault}; it cannot be used; give a JPEG, PNG, WEBP, BMP, GIF, TIFF or "
            "PPM file"
        ) from None
    pixels = picture_file.on_grid(picture, multiple, config.data.min_pixels, config.data.max_pixels)
    return picture, torch.from_numpy(pixels)


def draw(picture: Pillow.Image, box_1000: Tensor, path: Path) -> None:
    """The picture with the box on it, at its own size. Raises EnvironmentFault."""
    width = max(2, round(min(picture.size) / 150))
    box = geometry.to_px(box_1000, picture.height, picture.width).tolist()
    ImageDraw.Draw(picture).rectangle(box, outline=ORANGE, width=width)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"cannot write {path}; {error}; give --draw a writable file name that ends in .png or "
            ".jpg"
        ) from error


def say(console: Console, given: Answer, picture: Pillow.Image) -> None:
    """The answers, with the box in the picture's own pixels."""
    written = f"   (written: {given.query_written})" if given.query_written else ""
    console.say(f"query    {given.query}{written}")
    console.say(f"box      {_box_words(given, picture)}")
    console.say(f"visible  {'yes' if given.seen >= VISIBLE else 'no'}, p {given.seen:.3f}")
    if given.gone is not None:
        verdict = "still visible" if given.gone >= VISIBLE else "gone"
        console.say(f"hidden   with the box hidden: {verdict}, p {given.gone:.3f}")


def _box_words(given: Answer, picture: Pillow.Image) -> str:
    if given.box_1000 is None:
        return f"none   (written: {given.box_written})"
    box = given.box_1000.round().int().tolist()
    box_px = geometry.to_px(given.box_1000, picture.height, picture.width).round().int().tolist()
    return f"{box} of 1000, pixels {box_px} of {picture.width} x {picture.height}"


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    console = Console()
    if given.help:
        console.say(commands.page("infer", words))
        return 0
    if given["image"] is None:
        raise ConfigError(
            "which image? infer answers about one picture; write "
            f"{commands.spoken('infer')} --image photo.jpg"
        )
    config = origin.configuration(given)
    threads.settle(console.say)
    picture, pixels = read_image(Path(given["image"]), config)
    adapter = given["adapter"]
    policy = load(config, adapter, say=console.warn)
    engine = open_engine(policy, config, console.warn)
    answered = answer(engine, pixels, config, given["query"], adapters=adapter is not None)
    say(console, answered, picture)
    if given["draw"] and answered.box_1000 is not None:
        draw(picture, answered.box_1000, Path(given["draw"]))
        console.say(f"drawn    {given['draw']}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
