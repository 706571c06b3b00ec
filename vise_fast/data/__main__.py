"""Before training: what is in a folder, an archive, a list or a table of pictures?

    python -m vise_fast.data photos [--config FILE] [--section.key value]

Every picture is decoded once. It tells counts and sizes, the grids after the resize, the memory and
the time that follow, what cannot be used and why, and what each of the settings that leave pictures
out (data.min_side, min_sharpness, min_contrast, near_duplicates) would drop by itself. It writes a
page with all of it (--html FILE, data.html unless said) and a contact sheet (--png FILE, data.png).
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("data")  # before what takes seconds to import

import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image as Pillow

from vise_fast.config import origin
from vise_fast.config.command_line import CommandLine
from vise_fast.config.schema import Config
from vise_fast.data import figures, page
from vise_fast.data.sheet import sheet
from vise_fast.data.survey import Survey, Surveyed
from vise_fast.estimate import planner as estimate
from vise_fast.images.albums.door import open_album
from vise_fast.images.photographs import Photographs
from vise_fast.images.picture_file import BadImage, decode
from vise_fast.model.load import grid_multiple
from vise_fast.system import console, files
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine import threads

SYNTAX = commands.syntax("data")
REMEDY = "free space, or give --html and --png a writable place"


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(commands.page("data", words))
        return 0
    threads.settle(screen.say)
    config = configuration(given)
    assert config.data.dir is not None
    album = open_album(config.data.dir, config.data.column)
    multiple = grid_multiple(config.model.path)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "bad_images.jsonl"
        with closing(Surveyed(album, config, multiple, log, screen.through)) as opened:
            found = opened.survey()
            plan = estimate.plan(config, opened.keep)
            lines = [*figures.time_lines(found, config.train.batch), *str(plan).splitlines()]
            html = page.text(found, lines, lambda name: picture(opened.all, name))
    show(screen, found, lines)
    for name, content in (("html", html.encode()), ("png", sheet(found.shown))):
        path = Path(given[name] or f"data.{name}")
        files.write(path, content, REMEDY)
        screen.say(f"{'page' if name == 'html' else 'sheet':9}{path}")
    return 0


def configuration(given: CommandLine) -> Config:
    """The settings, with the place that was named. Raises ConfigError where none is."""
    named = given.positional[:1]
    extra = [f"--data.dir={named[0]}"] if named else []
    config = origin.configuration(given, extra)
    if config.data.dir is None:
        raise ConfigError(
            "no pictures are named; this command looks at one place at a time; say vise-fast data "
            "photos"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"stream": False})})


def picture(source: Photographs, name: str) -> Pillow.Image | None:
    """A picture of the album by its name, None where it cannot be decoded any more."""
    try:
        return decode(source.place(name), source.data.max_header_pixels)
    except BadImage:
        return None


def show(screen: console.Console, found: Survey, lines: Sequence[str]) -> None:
    """On the terminal."""
    screen.say(f"data     {figures.counts(found)}")
    screen.table("of every picture", figures.SPREAD, figures.spread(found))
    screen.table("after the resize", figures.GRIDS, figures.grids(found))
    screen.table("what each setting leaves out by itself", figures.RULES, figures.rules(found))
    for line in lines:
        screen.say(line if line.startswith("memory") else f"time     {line}")
    for name, reason in list(found.bad.items())[:5]:
        screen.warn(page.described(name, reason))
    if len(found.bad) > 5:
        screen.warn(f"and {len(found.bad) - 5} more that cannot be used; all are on the page")


if __name__ == "__main__":
    sys.exit(console.run(main))
