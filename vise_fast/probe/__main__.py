"""Before training: what does the base answer on these pictures, in which prompt style?

    python -m vise_fast.probe --data.dir photos [--model PATH] [--pictures 32] [--styles json,ref]

Per style: how many answers can be read, whether boxes follow a picture into a view, whether the
judge misses what is hidden, how large boxes are, what they cost. It names the style it would train
in and the line to write into a configuration, warns where the base cannot play, and writes a page
with sample cards (--html FILE, probe.html unless said). Exit code 0, warnings or not.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("probe")  # before what takes seconds to import

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vise_fast.config import origin
from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.images.sources import open_source
from vise_fast.model.families import row_of
from vise_fast.model.load import Policy, grid_multiple, load, read_config, style_of
from vise_fast.probe import page
from vise_fast.probe.measure import Measured, measure
from vise_fast.probe.verdict import best, warnings, yaml_line
from vise_fast.system import console, files
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine import threads
from vise_fast.text import styles
from vise_fast.text.prompts import Style

SYNTAX = commands.syntax("probe")
PICTURES = 32


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(commands.page("probe", words))
        return 0
    config = origin.configuration(given)
    threads.settle(screen.say)
    path = Path(given["html"] or "probe.html")
    files.writable(path, page.REMEDY)
    source = open_source(config, grid_multiple(config.model.path), say=screen.warn)
    images = source.batch(0, given.count("pictures") or PICTURES)
    policy = load(config, given["adapter"], say=screen.warn)
    engine = open_engine(policy, config, screen.warn)
    screen.say(f"probing {config.model.path} on {source.describe()}")
    measured = []
    for style in asked_for(config, policy, given["styles"]):
        try:
            measured.append(measure(engine, images, config, style))
        except ConfigError as fault:
            screen.warn(f"style {style.name}: {fault}")
    if not measured:
        raise ConfigError("no style could be asked; see the warnings; name others in --styles")
    show(screen, measured)
    page.write(path, measured, images, config.model.path)
    screen.say(f"page     {path}")
    return 0


def asked_for(config: Config, policy: Policy, named: str | None) -> list[Style]:
    """The styles to try: those named, or the run's own, natural, the family's native and json, and
    those of prompts.file. Raises ConfigError.
    """
    own = style_of(config, read_config(config.model.path))
    if named is None:
        in_file = [] if config.prompts.file is None else [*styles.read_file(config.prompts.file)]
        names = ["natural", "native", "json", *in_file]
    else:
        names = [name.strip() for name in named.split(",") if name.strip()]
    row = row_of(policy.model)
    manner = styles.Manner(own.name, row.native, row.boxes)
    found = [] if named else [own]
    for name in names:
        setting = config.prompts.model_copy(update={"ask": name, "ground": name, "verify": name})
        style = styles.chosen(setting, manner)
        if not any(replace(known, name=style.name) == style for known in found):
            found.append(style)
    return found


def show(screen: console.Console, measured: Sequence[Measured]) -> None:
    """The table, the choice and its warnings."""
    heads = ["", *(m.style for m in measured)]
    screen.table(f"{measured[0].pictures} pictures, adapters off", heads, page.table(measured))
    chosen = best(measured)
    for line in warnings(chosen or measured[0]):
        screen.warn(line)
    if chosen is not None:
        screen.say(f"style    {chosen.style}; in a configuration: {yaml_line(chosen)}")


if __name__ == "__main__":
    sys.exit(console.run(main))
