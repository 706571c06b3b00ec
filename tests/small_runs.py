"""Whole runs of the embedded model, as small as they get, and what they left behind."""

import json
from pathlib import Path

from safetensors.torch import load_file

from vise_fast import train
from vise_fast.system import console

SMALL = [
    "--train.batch",
    "2",
    "--rollout.samples",
    "2",
    "--rollout.views",
    "1",
    "--eval.scenes",
    "4",
    "--eval.attention",
    "false",
]
SMALL += [
    "--train.schedule",
    "constant",
    "--train.warmup",
    "0",
]  # these know how long the run is, and some runs go on for longer than they said
CHANGING = ("seconds", "images_per_s", "phases", "peak_memory")


def go(*words):
    return console.run(train.main, [str(w) for w in words])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def adapter(directory):
    return load_file(Path(directory) / "adapter" / "adapter_model.safetensors")
