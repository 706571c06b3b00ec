"""Writes configs/lowmem-*.yaml: for each card size the largest model that fits, with the settings
the planner chose and what else would fit.

    python -m vise_fast.lowmem [DIRECTORY]

Without a directory they go into configs/.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("lowmem")  # before what takes seconds to import

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from vise_fast.config.schema import Config
from vise_fast.estimate.planner import GIB, Plan, plan
from vise_fast.system import console
from vise_fast.system.console import Console
from vise_fast.system.errors import MemoryFloor

CARDS = {8: "4b", 12: "8b", 16: "8b", 24: "32b"}
WEIGHTS_GB = {"2b": 4.3, "4b": 8.9, "8b": 17.5, "32b": 66.7}


class Paper(NamedTuple):
    """What the paper trains a size with."""

    rank: int
    alpha: int
    lr: float
    eta: float


SMALL = Paper(rank=16, alpha=32, lr=1.0e-6, eta=0.1)
"""2B and 4B."""
LARGE = Paper(rank=32, alpha=64, lr=1.5e-7, eta=0.15)
"""8B and 32B."""


def write(directory: Path, out: Console) -> int:
    """One file per card; says what it wrote. Returns the exit code."""
    directory.mkdir(parents=True, exist_ok=True)
    for card, size in CARDS.items():
        plans = fitting(card)
        path = directory / f"lowmem-{card}gb.yaml"
        path.write_text(text(card, size, plans), encoding="utf-8")
        peak = plans[size].rehearsed.peak / GIB
        out.say(f"{path}: Qwen3-VL-{size.upper()}, peak {peak:.1f} GiB predicted")
    return 0


def asked(size: str, card: float) -> Config:
    """The robust preset on photographs, before the planner changes anything."""
    paper = SMALL if size in ("2b", "4b") else LARGE
    config = Config()
    config.model.path = f"Qwen/Qwen3-VL-{size.upper()}-Instruct"
    config.data.dir = "images"
    config.lora.r = paper.rank
    config.lora.alpha = paper.alpha
    config.train.lr = paper.lr
    config.update.eta = paper.eta
    config.model.int8_embedding = size == "32b"  # leaves a card of 24 GB room for what torch hides
    config.memory.budget_gb = float(card)
    return config


def fitting(card: float) -> dict[str, Plan]:
    """The plan of every model that fits on a card, by size."""
    plans = {}
    for size in WEIGHTS_GB:
        with contextlib.suppress(MemoryFloor):
            plans[size] = plan(asked(size, card), dtype=torch.bfloat16)
    return plans


def text(card: int, size: str, plans: dict[str, Plan]) -> str:
    """The file: what this run is and needs, what the card holds otherwise, and the settings."""
    chosen = plans[size]
    others = {other: held for other, held in plans.items() if other != size}
    lines = [
        f"# A card of {card} GB: Qwen3-VL-{size.upper()}, robust preset, 500 updates of "
        f"{chosen.config.train.batch} images.",
        f"# Needs: a folder of images (--data.dir) and {WEIGHTS_GB[size]} GB of weights, from "
        "the hub or from a directory (--model.path).",
        f"# Peak of a step, predicted: {chosen.rehearsed.peak / GIB:.1f} GiB of the "
        f"{chosen.budget / GIB:.1f} GiB left after CUDA's own. Written by",
        "# `python -m vise_fast.lowmem`; for the sizes of your images ask `train --dry-run`.",
        "# The same card also holds:" if others else "#",
    ]
    for other, held in others.items():
        peak = held.rehearsed.peak / GIB
        lines.append(f"#   {other.upper():4s}{_words(held)}  (peak {peak:.1f} GiB)")
    sections = _sections(chosen.config, f"runs/qwen3-vl-{size}-{card}gb")
    bodies = [yaml.safe_dump({name: values}, sort_keys=False) for name, values in sections.items()]
    return "\n".join(lines) + "\n\n" + "\n".join(bodies)


def _sections(config: Config, run_dir: str) -> dict[str, dict[str, Any]]:
    """The settings of the file: what the planner chose, and what differs from the defaults."""
    model: dict[str, Any] = {"path": config.model.path}
    if config.model.quant != "none":
        model["quant"] = config.model.quant
    if config.model.int8_embedding:
        model["int8_embedding"] = True
    if not config.model.graphs:
        model["graphs"] = False
    train = {
        "steps": 500,
        "batch": config.train.batch,
        "lr": config.train.lr,
        "micro_batch": config.train.micro_batch,
        "checkpointing": config.train.checkpointing,
    }
    if not config.train.share_forward:
        train["share_forward"] = False
    return {
        "model": model,
        "lora": {"r": config.lora.r, "alpha": config.lora.alpha},
        "data": {"dir": "images", "max_pixels": config.data.max_pixels},
        "train": train,
        "optim": {"name": config.optim.name},
        "update": {"eta": config.update.eta},
        "run": {"dir": run_dir, "checkpoint_every": 50},
    }


def _words(held: Plan) -> str:
    """What the planner chose over the defaults, as command-line words."""
    words = []
    for key, value in held.changes.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        words.append(f"--{key} {shown}")
    return " ".join(words) or "as it is"


def main(words: Sequence[str]) -> int:
    """The command: into `configs`, or the directory given."""
    given = commands.syntax("lowmem").parse(words)
    out = Console()
    if given.help:
        out.say(commands.page("lowmem", words))
        return 0
    return write(Path(given.positional[0] if given.positional else "configs"), out)


if __name__ == "__main__":
    sys.exit(console.run(main))
