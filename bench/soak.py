"""Whole short runs, killed at random and resumed until they are done, against runs that nothing
happened to: how many differ by a byte.

    python bench/soak.py --write        200 kills (about ten minutes on one core)
    python bench/soak.py --smoke        a few

Kinds of runs take turns: drawn scenes, the paper's preset, a folder of photographs with a decode
thread. A run is a forked child that gets a real SIGKILL after a random time, again and again, until
it ends by itself. After each kill nothing may be half (adapter, checkpoints, every file that has
its final name), and it must go on with the words that a run prints. Left out: power cuts, file
systems that lose what was synced.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _checkout
import _measure as measure
import numpy as np
import PIL.Image
import torch

sys.path.insert(0, str(_checkout.ROOT / "tests"))

from faults.forked import go, restart, words  # noqa: E402  (found by the line above)
from faults.left import Left, left, sound, steps_saved  # noqa: E402

from vise_fast.system.errors import UserError  # noqa: E402

KILLED = -9
STEPS = 3
RESULT = _checkout.ROOT / "bench" / "results" / "soak.json"


@dataclass
class Kind:
    """A way to run: its settings, how long one takes undisturbed, and what that leaves."""

    name: str
    settings: dict[str, Any]
    seconds: float
    wanted: Left


@dataclass
class Tally:
    """What happened so far. `faults`: every run that was not the same, in words."""

    kills: int = 0
    runs: int = 0
    killed_in: Counter[str] = field(default_factory=Counter)
    most_kills_of_a_run: int = 0
    faults: list[str] = field(default_factory=list)


def photographs(folder: Path) -> Path:
    """Twelve pictures of random squares."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def kinds(home: Path) -> list[Kind]:
    """Each run once undisturbed."""
    common = {"train__steps": STEPS}
    images = {"data__dir": photographs(home / "photographs"), "data__holdout": 0.2}
    ways = {
        "drawn scenes": common,
        "paper preset": common | {"reward__preset": "paper"},
        "photographs": common | images,
    }
    return [_undisturbed(home / f"undisturbed {name}", name, ways[name]) for name in ways]


def _undisturbed(directory: Path, name: str, settings: dict[str, Any]) -> Kind:
    start = time.monotonic()
    outcome = go(words(directory, **settings), directory)
    if outcome.code:
        raise SystemExit(f"the undisturbed run of {name} ended with {outcome.code}: {outcome.err}")
    return Kind(name, settings, time.monotonic() - start, left(directory))


def until_done(kind: Kind, directory: Path, rng: random.Random, tally: Tally) -> None:
    """One run, killed and resumed until it ends by itself."""
    kills = 0
    said = words(directory, **kind.settings)
    while True:
        after = rng.uniform(0, 1.1 * kind.seconds)
        outcome = go(said, directory, kill_after_s=after)
        if outcome.code != KILLED:
            break
        kills += 1
        tally.kills += 1
        tally.most_kills_of_a_run = max(tally.most_kills_of_a_run, kills)
        tally.killed_in[_place(directory)] += 1
        sound(directory)
        said = restart(directory, **kind.settings)
    tally.runs += 1
    if outcome.code:
        raise AssertionError(f"ended with {outcome.code}: {outcome.err}")
    if left(directory) != kind.wanted:
        raise AssertionError("left something else behind")


def _place(directory: Path) -> str:
    """How far a run had come, by what is on the disk."""
    if not (directory / "env.json").exists():
        return "loading"
    if not (directory / "evaluation.json").exists():
        return "first evaluation"
    if steps_saved(directory) < STEPS:
        return "updates"
    return "end" if not (directory / "adapter").exists() else "report"


def soak(kills: int, seed: int, home: Path) -> Tally:
    """Kills until there were so many."""
    rng = random.Random(seed)
    tally = Tally()
    ways = kinds(home)
    while tally.kills < kills:
        kind = ways[tally.runs % len(ways)]
        number = tally.runs
        directory = home / f"run {number}"
        try:
            until_done(kind, directory, rng, tally)
        except (AssertionError, ValueError, OSError, UserError) as fault:
            tally.faults.append(f"{kind.name}, run {number}: {fault}")
            tally.runs = number + 1
        shutil.rmtree(directory, ignore_errors=True)
        print(f"{tally.kills} kills, {tally.runs} runs, {len(tally.faults)} faults", flush=True)
    return tally


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--write", action="store_true", help="bench/results/soak.json")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(given)
    if args.smoke:
        args.kills = 2
    return args


def main(given: list[str]) -> int:
    args = parse(given)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        tally = soak(args.kills, args.seed, Path(home))
    document = {"bench": "soak", **measure.machine(torch.device("cpu"))}
    document |= {"clock": "wall", "seconds": round(time.monotonic() - start), "seed": args.seed}
    document |= {"updates_per_run": STEPS, "kills": tally.kills, "runs": tally.runs}
    document |= {"most_kills_of_a_run": tally.most_kills_of_a_run}
    document |= {"killed_in": dict(tally.killed_in), "faults": tally.faults}
    measure.finish(document, RESULT if args.write else None)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
