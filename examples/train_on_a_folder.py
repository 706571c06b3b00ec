"""Train on a folder of your own pictures; nobody has labelled them.

    python examples/train_on_a_folder.py photos --config qwen3-vl-2b --run.dir runs/photos

All words after the folder go to the trainer; without --config it trains the embedded model.
"""

import sys

from vise_fast import train
from vise_fast.system import console


def main(words):
    if not words or words[0].startswith("-"):
        sys.exit(__doc__)
    folder, *settings = words
    return train.main(["--data.dir", folder, *settings])


if __name__ == "__main__":
    sys.exit(console.run(main))  # a fault is one line and an exit code
