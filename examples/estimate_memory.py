"""What fits a card that is not here: a preset and GiB in, settings out. Nothing is downloaded.

    python examples/estimate_memory.py qwen3-vl-4b 16

About a minute for the published sizes: a whole step is rehearsed on shapes alone, for each way to
save memory until one fits.
"""

import sys

import torch

from vise_fast.config.schema import load
from vise_fast.estimate.planner import plan
from vise_fast.system import console


def main(words):
    preset, card = words
    config = load(preset, [f"--memory.budget_gb={card}"])
    found = plan(config, dtype=torch.bfloat16)  # a GPU's; MemoryFloor where nothing fits
    print(found)
    for key, value in found.changes.items():
        print(f"--{key} {value}")


if __name__ == "__main__":
    sys.exit(console.run(main))
