"""One rank of `bench/ranks.py`: a training as it is, which also writes down what the policy wrote.

    torchrun --nproc-per-node 2 bench/_rank_run.py TEXTS --run.dir ...

TEXTS: a folder that gets one file per rank, a line per step. "-": none, and every rank has one
thread on the core with its number, for times.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import _checkout  # noqa: F401
import torch

from vise_fast import train
from vise_fast.method.experience import Played
from vise_fast.method.learner import Learner
from vise_fast.system import console


def written_down(folder: Path) -> None:
    """From now on every update leaves its slices' texts in a file of this rank's."""
    rank = int(os.environ.get("RANK", "0"))
    file = open(folder / f"rank_{rank}.jsonl", "a")  # noqa: SIM115  (as long as the process)
    learn = Learner.learn

    def learn_and_tell(self: Learner, slices: list[Played], step: int) -> dict[str, float]:
        line = {"step": step, "queries": [], "boxes": [], "views": []}
        for played in slices:
            own = len(played.images) * self.config.rollout.samples
            line["queries"] += played.queries.written
            line["boxes"] += played.boxes.written[:own]
            line["views"] += played.boxes.written[own:]
        file.write(json.dumps(line) + "\n")
        file.flush()
        return learn(self, slices, step)

    Learner.learn = learn_and_tell


def own_core() -> None:
    """One thread on one core, so that ranks do not wander."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})


if __name__ == "__main__":
    place = sys.argv.pop(1)
    if place == "-":
        own_core()
    else:
        written_down(Path(place))
    sys.exit(console.run(train.main))
