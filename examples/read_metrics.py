"""What a run did, read from its directory while it goes on or after it has ended.

    python examples/read_metrics.py runs/nano

One line of metrics.jsonl is one update. `python -m vise_fast.report` makes a page of it.
"""

import sys
from pathlib import Path

from vise_fast.report.stored_run import read

NAMES = ("reward", "geometric", "semantic", "area", "kl", "grad_norm")


def main(run):
    stored = read(Path(run))
    print(f"{stored.steps} updates of {stored.config.train.batch} images")
    for name in NAMES:
        _, values = stored.series(name)  # (steps, values) where the metric is a number
        if len(values):
            print(f"{name:10} first {values[:10].mean():.4f}   last {values[-10:].mean():.4f}")
    for phase, seconds in stored.phases().items():
        print(f"{phase:10} {seconds:.3f} s an update")
    for alarm, steps in stored.alarms().items():
        print(f"alarm {alarm}: updates {steps}")


if __name__ == "__main__":
    main(*sys.argv[1:])
