"""Train from Python: two sizes of adapter, one run each, and what each came to.

    python examples/train_from_python.py [updates]

`load` makes a configuration of a preset and of settings, written as on the command line; `train`
runs it to its end and returns the exit code.
"""

import sys
from pathlib import Path

from vise_fast import train
from vise_fast.config.schema import load
from vise_fast.report.stored_run import read


def main(updates="20"):
    for rank in (4, 16):
        run = Path(f"runs/rank-{rank}")
        settings = {
            "train.steps": updates,
            "train.batch": 2,
            "rollout.samples": 2,
            "lora.r": rank,
            "eval.scenes": 4,
            "run.dir": run,
        }
        train.train(load("nano", [f"--{key}={value}" for key, value in settings.items()]))
        after = read(run).after
        print(f"rank {rank}: mean IoU {after.values['greedy_iou']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
