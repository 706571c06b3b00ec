"""Several ranks as forked children of one process: what torchrun starts, without its start-up."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from faults.forked import Outcome, begin
from safetensors.torch import load_file
from torch.distributed import TCPStore

from vise_fast.method.learner import Learner
from vise_fast.system.console import read_lines

HELD = ("reward", "kl", "area", "parse_rate")
Prepare = Callable[[int], None]


def go_together(
    said: Sequence[str], root: Path, count: int, prepare: Prepare | None = None
) -> list[Outcome]:
    """A run on so many ranks; `prepare` runs first in each, with its number."""
    return go_apart([said] * count, root, prepare)


def go_apart(
    said: Sequence[Sequence[str]], root: Path, prepare: Prepare | None = None
) -> list[Outcome]:
    """The same with words for each rank. The store is this process's, as the agent of torchrun has
    it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank, words in enumerate(said):
        logs = root.parent / f"{root.name}.{rank}.logs"
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": len(said),
            "MASTER_PORT": store.port,
        }
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True}

        def ready(rank: int = rank, place: dict[str, Any] = place) -> None:
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            if prepare is not None:
                prepare(rank)

        children.append(begin(words, root, logs, prepare=ready))
    return [child.ended() for child in children]


def telling(folder: Path) -> Prepare:
    """Every update leaves what was written in it in a file per rank."""

    def prepare(rank: int) -> None:
        learn = Learner.learn

        def learn_and_tell(self: Learner, slices: list, step: int) -> dict[str, float]:
            with open(folder / f"{rank}.txt", "a") as file:
                for played in slices:
                    own = len(played.images) * self.config.rollout.samples
                    for n, query in enumerate(played.queries.written):
                        group = self.config.rollout.samples
                        boxes = played.boxes.written[:own][n * group : (n + 1) * group]
                        file.write(f"{step} {query!r} {boxes!r}\n")
            return learn(self, slices, step)

        Learner.learn = learn_and_tell

    folder.mkdir()
    return prepare


def told(folder: Path) -> list[str]:
    """What was written, step by step, in the order of the batch."""
    lines: list[str] = []
    for file in sorted(folder.iterdir()):
        lines += file.read_text().splitlines()
    return sorted(lines, key=lambda line: int(line.split()[0]))


def adapter(run: Path) -> torch.Tensor:
    """All its numbers, float64."""
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    return torch.cat([stored[name].flatten().double() for name in sorted(stored)])


def apart(run: Path, truth: Path) -> dict[str, float]:
    """Of two runs: adapters by their norm, and the largest difference of each held figure."""
    wanted = adapter(truth)
    found = {"adapter": float((adapter(run) - wanted).norm() / wanted.norm())}
    lines = (read_lines(place / "metrics.jsonl") for place in (run, truth))
    for mine, theirs in zip(*lines, strict=True):
        for name in HELD:
            found[name] = max(found.get(name, 0.0), abs(mine[name] - theirs[name]))
    return found
