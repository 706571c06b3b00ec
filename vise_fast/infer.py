"""Ask a model about one image: name an object, box it, say whether it is visible, before and after
the box is hidden.

    python -m vise_fast.infer --image photo.jpg [--adapter runs/nano/adapter] [--model PATH]
    [--query TEXT] [--draw FILE.png]

Without --query the model names an object itself. Answers are the most likely ones. Left out:
batches, sampling.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as Pillow
from PIL import ImageDraw
from torch import Tensor

from vise_fast.config import origin
from vise_fast.config.command_line import Syntax
from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.engine.rollout import Engine
from vise_fast.images import geometry, views
from vise_fast.images import picture_file as decode
from vise_fast.method import roles
from vise_fast.method.roles import Question, Sampling
from vise_fast.model.load import grid_multiple, load
from vise_fast.system import threads
from vise_fast.system.console import Console, run
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault

ORANGE = (255, 126, 30)
SYNTAX = Syntax(
    options=origin.OPTIONS | {"image": "photo.jpg", "query": "TEXT", "draw": "FILE.png"},
    settings=origin.SETTINGS,
)


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
    asked = (
        None
        if query
        else roles.ask(engine, prefix, [0], [0], Sampling(config.rollout.query_tokens, 0.0))
    )
    query = query or asked.texts[0]
    sampling = Sampling(config.rollout.box_tokens, temperature=0.0)
    found = roles.ground(engine, prefix, [Question(0, query)], sampling)
    seen = float(roles.finite(roles.verify_forked(engine, prefix, [0], [query]))[0])
    box = found.box_1000[0] if bool(geometry.proper(found.box_1000)[0]) else None
    gone = None
    if box is not None:
        ghost = views.ghost(
            [pixels], torch.tensor([0]), box[None], config.ghost, literal=config.view.literal_pixels
        )
        hidden = engine.encode(ghost)
        gone = float(roles.finite(roles.verify(engine, hidden, [query], adapters))[0])
    return Answer(query, asked.written[0] if asked else None, box, found.written[0], seen, gone)


def read_image(path: Path, config: Config) -> tuple[Pillow.Image, Tensor]:
    """The upright picture as it is, and its pixels on the model's grid. Raises DataError."""
    multiple = grid_multiple(config.model.path)
    try:
        picture = decode.decode(path, config.data.max_header_pixels)
    except decode.BadImage as fault:
        raise DataError(
            f"--image {path} {fault}; it cannot be used; give a JPEG, PNG, WEBP, BMP, GIF, TIFF or "
            "PPM file"
        ) from None
    pixels = decode.on_grid(picture, multiple, config.data.min_pixels, config.data.max_pixels)
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
    console.say(
        f"query    {given.query}"
        + (f"   (written: {given.query_written})" if given.query_written else "")
    )
    if given.box_1000 is None:
        console.say(f"box      none   (written: {given.box_written})")
    else:
        pixels = (
            geometry.to_px(given.box_1000, picture.height, picture.width).round().int().tolist()
        )
        console.say(
            f"box      {given.box_1000.round().int().tolist()} of 1000, pixels {pixels} of "
            f"{picture.width} x {picture.height}"
        )
    console.say(f"visible  {'yes' if given.seen >= 0.5 else 'no'}, p {given.seen:.3f}")
    if given.gone is not None:
        console.say(
            f"hidden   with the box hidden: {'still visible' if given.gone >= 0.5 else 'gone'}, p "
            f"{given.gone:.3f}"
        )


def main(words: Sequence[str]) -> int:
    """The command."""
    options = SYNTAX.parse(words)
    console = Console()
    if options.help:
        console.say(__doc__)
        return 0
    if options["image"] is None:
        raise ConfigError(
            "which image? infer answers about one picture; write python -m vise_fast.infer --image "
            "photo.jpg"
        )
    config = origin.configuration(options)
    threads.settle(console.say)
    picture, pixels = read_image(Path(options["image"]), config)
    policy = load(config, options["adapter"], say=console.warn)
    given = answer(
        open_engine(policy, config),
        pixels,
        config,
        options["query"],
        adapters=options["adapter"] is not None,
    )
    say(console, given, picture)
    if options["draw"] and given.box_1000 is not None:
        draw(picture, given.box_1000, Path(options["draw"]))
        console.say(f"drawn    {options['draw']}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
