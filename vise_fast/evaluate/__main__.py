"""Held-out figures of a model with and without its adapter: grounding, visibility, attention,
controls.

    python -m vise_fast.evaluate --adapter runs/nano/adapter [--model PATH] [--data.dir photos]
    [--scenes N] [--json FILE]

Drawn scenes come with their truth: every object of a scene is asked for. Photographs have none:
only what needs no labels is measured. Base and adapter are two states of one loaded model; an image
is encoded once for both, and read once per state. Every draw is named by (eval.seed, scene), so
neither the batch size nor the other arm changes a figure. What the figures mean:
docs/EVALUATION.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vise_fast.config import origin
from vise_fast.config.command_line import Syntax
from vise_fast.engine.choose import open_engine
from vise_fast.evaluate.held_out import examine
from vise_fast.evaluate.table import side_by_side
from vise_fast.images.sources import open_source
from vise_fast.model.load import grid_multiple, load
from vise_fast.system import console, threads
from vise_fast.system.errors import EnvironmentFault

SYNTAX = Syntax(options=origin.OPTIONS | {"scenes": "64", "json": "FILE"}, settings=origin.SETTINGS)


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(__doc__)
        return 0
    limit = given.count("scenes")
    config = origin.configuration(given, [] if limit is None else [f"--eval.scenes={limit}"])
    threads.settle(screen.say)
    source = open_source(config, grid_multiple(config.model.path), say=screen.warn)
    adapter = given["adapter"]
    policy = load(config, adapter, say=screen.warn)
    arms = f" with and without {adapter}" if adapter else ""
    dtype = str(policy.backbone.dtype).removeprefix("torch.")
    state = f"{dtype}, adapter unmerged" if adapter else dtype
    screen.say(f"evaluating {config.model.path}{arms} ({state}) on {source.describe()}")
    engine = open_engine(policy, config, screen.warn)
    results = examine(engine, source, config, (False, True) if adapter else (False,))
    names = ("before", "after")
    evaluation = {name: arm.json() for name, arm in zip(names, results, strict=False)}
    rows = [[name, *pair] for name, pair in side_by_side(evaluation).items()]
    screen.table(f"{results[0].n} held-out images", ["", "base", "adapter"], rows)
    if given["json"]:
        _write(Path(given["json"]), evaluation)
    return 0


def _write(path: Path, evaluation: dict[str, dict]) -> None:
    try:
        path.write_text(json.dumps(evaluation) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path}; {error.strerror or error}; give --json a writable place"
        ) from error


if __name__ == "__main__":
    sys.exit(console.run(main))
