"""Held-out figures of a model with and without its adapter: grounding, visibility, attention,
controls.

    python -m vise_fast.evaluate --adapter runs/nano/adapter [--model PATH] [--data.dir photos]
    [--scenes N] [--json FILE] [--alphas 0,0.5,1,1.5]

Drawn scenes come with their truth: every object of a scene is asked for. Photographs have none:
only what needs no labels is measured, unless --eval.labels names a few labelled ones. Base and
adapter are two states of one loaded model; an image is encoded once for both, and read once per
state. Every draw is named by (eval.seed, scene), so neither the batch size nor the other arm
changes a figure. --alphas measures shares of the adapter's update instead, each a fresh look at the
images; the report draws RUN/strengths.json. What the figures mean: docs/EVALUATION.md.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("evaluate")  # before what takes seconds to import

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vise_fast.config import origin
from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate import strengths
from vise_fast.evaluate.held_out import examine
from vise_fast.evaluate.results import FEW, TOO_FEW
from vise_fast.evaluate.table import BY_CLASS, by_class, side_by_side
from vise_fast.evaluate.titles import BRIEF, title
from vise_fast.images.sources import Source, open_source
from vise_fast.model.load import Policy, grid_multiple, load
from vise_fast.system import console, files
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine import threads

SYNTAX = commands.syntax("evaluate")
REMEDY = "give --json a writable place"


def main(words: Sequence[str]) -> int:
    """The command."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(commands.page("evaluate", words))
        return 0
    adapter = given["adapter"]
    alphas = None if given["alphas"] is None else strengths.parsed(given["alphas"])
    if alphas is not None and adapter is None:
        raise ConfigError(
            "--alphas are shares of an adapter's update; there is no adapter; name one with "
            "--adapter RUN/adapter"
        )
    if given["json"]:
        files.writable(Path(given["json"]), REMEDY)
    limit = given.count("scenes")
    config = origin.configuration(given, [] if limit is None else [f"--eval.scenes={limit}"])
    threads.settle(screen.say)
    source = open_source(config, grid_multiple(config.model.path), say=screen.warn)
    policy = load(config, adapter, say=screen.warn)
    arms = f" with and without {adapter}" if adapter else ""
    dtype = str(policy.backbone.dtype).removeprefix("torch.")
    state = f"{dtype}, adapter unmerged" if adapter else dtype
    screen.say(f"evaluating {config.model.path}{arms} ({state}) on {source.describe()}")
    engine = open_engine(policy, config, screen.warn)
    if alphas is None:
        content = _both(engine, source, config, (False, True) if adapter else (False,))
    else:
        content = _over_alpha(policy, engine, source, config, alphas)
    if given["json"]:
        with files.refused(given["json"], REMEDY):
            Path(given["json"]).write_text(json.dumps(content) + "\n", encoding="utf-8")
    return 0


def _both(engine: Engine, source: Source, config: Config, arms: Sequence[bool]) -> dict[str, Any]:
    """Base and adapter side by side; what evaluation.json holds."""
    results = examine(engine, source, config, arms, console.Console().through)
    names = ("before", "after")
    evaluation = {name: arm.json() for name, arm in zip(names, results, strict=False)}
    rows = [[name, *pair] for name, pair in side_by_side(evaluation).items()]
    title = _held_out(results[0].n)
    screen = console.Console()
    screen.table(title, ["", "base", "adapter"], rows)
    if of_classes := by_class(evaluation):
        screen.table("labelled pictures by class, greedy", list(BY_CLASS), of_classes)
    return evaluation


def _over_alpha(
    policy: Policy, engine: Engine, source: Source, config: Config, alphas: Sequence[float]
) -> dict[str, Any]:
    """A column for each share of the update; what strengths.json holds."""
    screen = console.Console()
    found = {}
    with screen.progress(len(alphas), "alpha") as advance:
        for alpha, results in strengths.measure(policy, engine, source, config, alphas):
            found[alpha] = results
            advance({"alpha": alpha})
    columns = ["", *(f"alpha {alpha:g}" for alpha in found)]
    first = next(iter(found.values()))
    rows = [[title(name), *strengths.cells(found, name)] for name in BRIEF if name in first.values]
    screen.table(_held_out(first.n), columns, rows)
    return strengths.write_down(found)


def _held_out(count: int) -> str:
    """Over a table."""
    return f"{count} held-out images" + (f": {TOO_FEW}" if count < FEW else "")


if __name__ == "__main__":
    sys.exit(console.run(main))
