"""Stop a run and go on with it: on a CPU it ends where one long run would have ended, bit for bit.

    python examples/resume_a_run.py [runs/in-two-parts]

A run saves itself every `run.checkpoint_every` updates and when a signal (Ctrl-C) stops it. On the
command line: python -m vise_fast.train --run.dir runs/in-two-parts --resume auto
"""

import sys

from vise_fast import train
from vise_fast.config.schema import load
from vise_fast.system.console import read_lines

SMALL = ["--train.batch=2", "--rollout.samples=2", "--rollout.views=1", "--eval.scenes=4"]
# The run grows from two updates to four: no part of its schedule may depend on how long it is.
SMALL += ["--train.schedule=constant", "--train.warmup=0"]


def main(directory="runs/in-two-parts"):
    settings = [*SMALL, f"--run.dir={directory}"]
    train.train(load("nano", [*settings, "--train.steps=2"]))
    train.train(load("nano", [*settings, "--train.steps=4", "--train.resume=auto"]))
    steps = [record["step"] for record in read_lines(f"{directory}/metrics.jsonl")]
    print("updates in one metrics.jsonl:", steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
