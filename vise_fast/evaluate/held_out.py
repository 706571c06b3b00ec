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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vise_fast.config import origin
from vise_fast.config.command_line import Syntax
from vise_fast.config.schema import Config
from vise_fast.engine.fast import Engine
from vise_fast.evaluate import exam
from vise_fast.evaluate.figures import Figures, Marks, difference, join
from vise_fast.evaluate.titles import ENTRIES, title
from vise_fast.images import geometry
from vise_fast.images.image import Image
from vise_fast.images.scenes import Scene
from vise_fast.images.sources import Source, open_source
from vise_fast.model.load import grid_multiple, load
from vise_fast.system import randomness
from vise_fast.system.console import Console
from vise_fast.system.errors import EnvironmentFault

SCALES = sorted(
    np.linspace(0.5, 1.5, 41).tolist(), key=lambda s: abs(s - 1)
)  # of equals the gentlest is taken
SYNTAX = Syntax(options=origin.OPTIONS | {"scenes": "64", "json": "FILE"}, settings=origin.SETTINGS)


def held_out(engine: Engine, source: Source, config: Config, adapters: bool) -> Figures:
    """The figures of one arm on `source.held_out(eval.scenes)`."""
    return examine(engine, source, config, (adapters,))[0]


def compare(engine: Engine, source: Source, config: Config) -> tuple[Figures, Figures]:
    """(base, adapter) on the same images."""
    base, adapter = examine(engine, source, config, (False, True))
    return base, adapter


def examine(engine: Engine, source: Source, config: Config, arms: Sequence[bool]) -> list[Figures]:
    """Figures of each arm (adapters on or off); empty ones when there is no held-out image."""
    images = source.held_out(config.eval.scenes)
    draw = getattr(source, "scene", None)
    if not images:
        return [Figures() for _ in arms]
    scales = best_scales(engine, draw, config, arms) if draw else [None] * len(arms)
    sheets = [_Sheet() for _ in arms]
    for first in range(0, len(images), config.eval.batch):
        look = exam.Look(engine, images[first : first + config.eval.batch], first, config)
        truths = exam.truths_of(look, draw) if draw else None
        for sheet, arm, scale in zip(sheets, arms, scales, strict=True):
            sheet.answer(look, truths, arm, scale)
    return [sheet.figures(len(images), scale) for sheet, scale in zip(sheets, scales, strict=True)]


class _Sheet:
    """What one arm has answered so far."""

    def __init__(self) -> None:
        self.marks: list[Marks] = []
        self.queries: list[str] = []
        self.shares: list[Tensor] = []

    def answer(
        self, look: exam.Look, truths: exam.Truths | None, arm: bool, scale: dict[str, float] | None
    ) -> None:
        own = look.own_queries(arm)
        marks, share = exam.without_labels(look, arm, own)
        self.marks.append(
            marks | (exam.with_truth(look, truths, arm, own, scale) if truths else {})
        )
        self.queries += [
            query for query, readable in zip(own.texts, own.readable, strict=True) if readable
        ]
        self.shares += [] if share is None else [share]

    def figures(self, n: int, scale: dict[str, float] | None) -> Figures:
        plain = {f"{name}_scale": value for name, value in (scale or {}).items()}
        if self.queries:
            plain["distinct_queries"] = len(set(self.queries)) / len(self.queries)
        layers = torch.cat(self.shares, 1).mean(1).tolist() if self.shares else []
        return Figures(n, join(self.marks), plain, layers)


def best_scales(
    engine: Engine, draw: Callable[[int], Scene], config: Config, arms: Sequence[bool]
) -> list[dict[str, float]]:
    """Per arm and kind of answer, the factor of SCALES under which its boxes fit best, on half as
    many scenes that are not reported.

    A gain that survives it is no gain by mere tightening or loosening.
    """
    keys = [
        randomness.key(config.eval.seed, 0, "validation scene", i)
        for i in range((config.eval.scenes + 1) // 2)
    ]
    found: list[dict[str, list[Tensor]]] = [{"greedy": [], "sampled": []} for _ in arms]
    for first in range(0, len(keys), config.eval.batch):
        chosen = keys[first : first + config.eval.batch]
        scenes = [draw(key) for key in chosen]
        images = [
            Image(torch.from_numpy(scene.pixels), "validation scene", key)
            for scene, key in zip(scenes, chosen, strict=True)
        ]
        things, owner = exam.objects_of(scenes)
        truth = torch.tensor([thing.box_1000 for thing in things], dtype=torch.float64)
        # places after the reported scenes', so that no draw is used twice
        look = exam.Look(engine, images, config.eval.scenes + first, config)
        for arm, table in zip(arms, found, strict=True):
            for label, boxes, rows in exam.answers_of(
                look, owner, [thing.name for thing in things], arm
            ):
                table[label].append(
                    torch.stack(
                        [
                            geometry.iou(exam.rescaled(boxes.box_1000, s), truth[rows])
                            for s in SCALES
                        ]
                    )
                )
    return [
        {label: SCALES[int(torch.cat(iou, 1).mean(1).argmax())] for label, iou in table.items()}
        for table in found
    ]


# ---- side by side --------------------------------------------------------------------------------


def side_by_side(
    evaluation: Mapping[str, dict], names: Iterable[str] = ENTRIES
) -> dict[str, tuple[str, str]]:
    """{"before": Figures.json(), "after": …} as title -> (base, adapter), the latter with its
    paired difference and 95 % interval.

    `names`: the figures to show, those that were measured (glossary.BRIEF for a short table).
    """
    arms = [
        Figures.read(evaluation[name]) if name in evaluation else None
        for name in ("before", "after")
    ]
    known = {name for arm in arms if arm is not None for name in arm.values}
    return {
        title(name): (_shown(arms[0], name), _shown(arms[1], name) + _gain(*arms, name))
        for name in names
        if name in known
    }


def _shown(arm: Figures | None, name: str) -> str:
    return "-" if arm is None or name not in arm.values else f"{arm.values[name]:.3f}"


def _gain(before: Figures | None, after: Figures | None, name: str) -> str:
    """' (+0.031, 95 % +0.012 to +0.050)' where both arms answered the same scenes."""
    if (
        before is None
        or after is None
        or before.n != after.n
        or name not in before.marks
        or name not in after.marks
    ):
        return ""
    gain = difference(before, after, name)
    return (
        f" ({gain.value:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f})"
        if np.isfinite(gain.value)
        else ""
    )


def main(words: Sequence[str]) -> int:
    """The command."""
    options = SYNTAX.parse(words)
    console = Console()
    if options.help:
        console.say(__doc__)
        return 0
    limit = options.count("scenes")
    config = origin.configuration(options, [] if limit is None else [f"--eval.scenes={limit}"])
    source = open_source(config, grid_multiple(config.model.path))
    policy = load(config, options["adapter"])
    console.say(
        f"evaluating {config.model.path}{' with and without ' + options['adapter'] if options['adapter'] else ''} on {source.describe()}"
    )
    figures = examine(
        Engine(policy.backbone, policy.tokens),
        source,
        config,
        (False, True) if options["adapter"] else (False,),
    )
    evaluation = {name: arm.json() for name, arm in zip(("before", "after"), figures, strict=False)}
    console.table(
        f"{figures[0].n} held-out images",
        ["", "base", "adapter"],
        [[name, *pair] for name, pair in side_by_side(evaluation).items()],
    )
    if options["json"]:
        _write(Path(options["json"]), evaluation)
    return 0


def _write(path: Path, evaluation: dict) -> None:
    try:
        path.write_text(json.dumps(evaluation) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path}; {error.strerror or error}; give --json a writable place"
        ) from error
