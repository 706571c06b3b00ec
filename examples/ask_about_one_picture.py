"""Ask a model about one picture: what is there, where, and is it gone once its box is blurred?

    python examples/ask_about_one_picture.py photo.jpg [runs/nano/adapter]

The command `python -m vise_fast.infer` does the same and draws the box.
"""

import sys
from pathlib import Path

from vise_fast.config.schema import load as load_config
from vise_fast.engine.choose import open_engine
from vise_fast.infer import answer, read_image
from vise_fast.model.load import load


def main(picture, adapter=None):
    config = load_config("nano")  # or "qwen3-vl-2b": a shipped preset, or a YAML file of yours
    _, pixels = read_image(Path(picture), config)  # uint8 (H, W, 3) on the model's grid
    policy = load(config, adapter)
    engine = open_engine(policy, config)
    given = answer(engine, pixels, config, query=None, adapters=adapter is not None)
    print("it names     ", given.query)
    print("p(visible)   ", round(given.seen, 3))
    if given.box_1000 is not None:
        print("box of 1000  ", given.box_1000.round().int().tolist())
        print("p once hidden", round(given.gone, 3))


if __name__ == "__main__":
    main(*sys.argv[1:])
