"""Did training help? Base and adapter answer about the same held-out images.

    python examples/evaluate_an_adapter.py runs/nano [scenes]

The command `python -m vise_fast.evaluate --adapter runs/nano/adapter` prints every figure; this
script shows how to get at them. docs/EVALUATION.md says what they mean.
"""

import sys
from pathlib import Path

from vise_fast.config.schema import load as load_config
from vise_fast.engine.choose import open_engine
from vise_fast.evaluate.held_out import compare
from vise_fast.evaluate.results import difference
from vise_fast.images.sources import open_source
from vise_fast.model.load import grid_multiple, load


def main(run, scenes="64"):
    config = load_config(Path(run) / "config.yaml", [f"--eval.scenes={scenes}"])
    policy = load(config, adapter=f"{run}/adapter")
    source = open_source(config, grid_multiple(config.model.path))
    base, adapter = compare(open_engine(policy, config), source, config)
    for name in sorted(base.marks.keys() & adapter.marks.keys()):
        gain = difference(base, adapter, name)  # paired by image, with its 95 % interval
        print(f"{name:30} {gain.value:+.3f} [{gain.low:+.3f} {gain.high:+.3f}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
