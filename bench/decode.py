"""How fast pictures are read, beside Pillow's own speed, and whether reading starves a step.

    python bench/decode.py [--repeats 7] [--write]

One core decodes photographs in turn by our guarded path (limits counted before anything is decoded,
orientation, RGB, resize to the grid) and by Pillow alone (open, RGB, the same resize). Then the
embedded model takes steps on pictures that lie ready in memory, on those that a thread decodes
ahead, and on those that are decoded where they are asked for. Photographs are crops of
scikit-image's, saved as cameras and data sets save them. Left out: a cold disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _measure as measure
import torch
from _checkout import ROOT
from PIL import Image as Pillow
from skimage import data as photographs

from vise_fast.config import schema
from vise_fast.engine.choose import open_engine
from vise_fast.images.albums.door import open_album
from vise_fast.images.image import Image
from vise_fast.images.photographs import Photographs
from vise_fast.images.picture_file import decode, grid_size, on_grid
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.model import load as model

CAP = 50_000_000
MULTIPLE = 32
LIMITS = (1024, 307_200)
KINDS = {
    "JPEG 640x480": ((640, 480), "JPEG"),
    "JPEG 4000x3000": ((4000, 3000), "JPEG"),
    "PNG 640x480": ((640, 480), "PNG"),
    "WEBP 640x480": ((640, 480), "WEBP"),
    "JPEG 128x128": ((128, 128), "JPEG"),
}
NAMES = ("astronaut", "coffee", "chelsea", "rocket")
CPU = torch.device("cpu")


def fill(folder: Path, size: tuple[int, int], format: str, count: int) -> list[Path]:
    """Crops at a size."""
    folder.mkdir()
    for i in range(count):
        whole = Pillow.fromarray(getattr(photographs, NAMES[i % len(NAMES)])())
        left = i * whole.width // (3 * count)
        part = whole.crop((left, 0, left + 2 * whole.width // 3, whole.height))
        picture = part.resize(size, Pillow.Resampling.BICUBIC)
        picture.save(folder / f"{i:03d}.{format.lower()}", format, quality=90)
    return sorted(folder.iterdir())


def ours(paths: list[Path]) -> None:
    """The guarded path."""
    for path in paths:
        on_grid(decode(path, CAP), MULTIPLE, *LIMITS)


def pillows(paths: list[Path]) -> None:
    """Pillow by itself, to the same size."""
    for path in paths:
        with Pillow.open(path) as image:
            picture = image.convert("RGB")
        height, width = grid_size(picture.height, picture.width, MULTIPLE, *LIMITS)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Pillow.Resampling.BICUBIC)
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)


def decoding(home: Path, repeats: int) -> list[dict]:
    """A row per kind of file."""
    rows = []
    for name, (size, format) in KINDS.items():
        count = 4 if size[0] > 1000 else 12
        paths = fill(home / name.replace(" ", "_"), size, format, count)
        runs: dict[str, Callable] = {"ours": lambda p=paths: ours(p)}
        runs["pillow"] = lambda p=paths: pillows(p)
        times = measure.interleaved(runs, CPU, repeats, 0.3)
        row = {"pictures": name, "images_per_s_of_a_core": count / times["ours"].median}
        row["over_pillow"] = measure.ratio(times["ours"], times["pillow"])
        rows.append(row)
        print(row)
    return rows


class Steps:
    """Updates of the embedded model on the pictures of a source."""

    def __init__(self, config: schema.Config) -> None:
        self.config = config
        policy = model.load(config)
        self.engine = open_engine(policy, config)
        self.learner = Learner(policy, self.engine, config)
        self.done = 0

    def step(self, images: list[Image]) -> None:
        """One."""
        played = play_batch(self.engine, images, self.config, self.done, None, 0)
        self.learner.learn(played, self.done)
        self.done += 1


def stepping(home: Path, repeats: int) -> dict:
    """Wall seconds of a step by how its pictures come, in turn, and how long it waits for them."""
    paths = fill(home / "stepping", (4000, 3000), "JPEG", 8)
    words = ["--train.batch=4", "--rollout.samples=2", "--rollout.views=1", f"--run.dir={home}/r"]
    words += [f"--data.dir={paths[0].parent}", "--data.max_pixels=16384", "--data.holdout=0"]
    sources = {}
    for name, workers in (("ahead", 1), ("when asked for", 0)):
        config = schema.load(None, [*words, f"--data.workers={workers}"])
        sources[name] = Photographs(open_album(str(paths[0].parent)), config, MULTIPLE)
    steps = Steps(config)
    ready = sources["when asked for"].batch(0, 4)
    found: dict[str, measure.Times] = {name: measure.Times() for name in ("ready", *sources)}
    waited: dict[str, measure.Times] = {name: measure.Times() for name in sources}
    steps.step(ready)
    for number in range(repeats + 1):
        for name, times in found.items():
            start = time.perf_counter()
            images = ready if name == "ready" else sources[name].batch(number, 4)
            got = time.perf_counter()
            steps.step(images)
            if number:  # the first batch was not asked for ahead
                times.seconds.append(time.perf_counter() - start)
                if name != "ready":
                    waited[name].seconds.append(got - start)
    for source in sources.values():
        source.close()
    return {
        "pictures": "four JPEGs of 4000x3000 a step",
        "step": found["ready"].summary(),
        "waited_ahead": waited["ahead"].summary(),
        "waited_when_asked_for": waited["when asked for"].summary(),
        "ahead_over_ready": measure.ratio(found["ahead"], found["ready"]),
        "when_asked_for_over_ready": measure.ratio(found["when asked for"], found["ready"]),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="bench/results/decode-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        results = {
            "bench": "decode",
            "machine": measure.machine(CPU),
            "setting": {"multiple": MULTIPLE, "max_pixels": LIMITS[1], "model": "nano"},
            "cases": decoding(Path(home), given.repeats),
            "step": stepping(Path(home), given.repeats),
        }
    measure.finish(results, ROOT / "bench/results/decode-cpu.json" if given.write else None)


if __name__ == "__main__":
    main()
