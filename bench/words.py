"""Do words of one's own beat the model's own queries on what they name? On drawn scenes written to
disk, checked with COCO labels, as somebody with a folder and a list would.

    python bench/words.py --arm own --seed 0   one cell: a run of UPDATES updates; typed again, its
                                               figures on the labelled pictures. Kept, never made
                                               again
    python bench/words.py --table              the table of the cells there are, as a result file
    python bench/words.py --smoke              every arm, one update, nothing kept

The folder holds scenes in which the noise words never occur. The list names NAMED classes and as
many noise words. Arms: `own` asks what the model names; `words` the first phrase of the list that
the base sees, in a drawn order, else what the model names; `half` so for half of the images;
`blind` a phrase of the list, seen or not. Named classes are what it is for; the others show what it
costs. Left out: any tuning; the arms differ in data.queries* alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import _checkout
import numpy as np
import torch
from PIL import Image as Pillow

from vise_fast import train
from vise_fast.config import schema
from vise_fast.engine.choose import open_engine
from vise_fast.evaluate.held_out import examine
from vise_fast.evaluate.results import Mark, Results, difference
from vise_fast.images import scenes
from vise_fast.images.sources import open_source
from vise_fast.model.load import grid_multiple, load
from vise_fast.system import console
from vise_fast.system.randomness import generator

ROOT = _checkout.ROOT
HOME = ROOT / "build" / "words"
RESULT = ROOT / "bench" / "results" / "words.json"
UPDATES = 100
PHOTOS = 600
CHECKED = 256
SEED = 412_001
NAMED = (
    "red circle",
    "blue square",
    "green triangle",
    "yellow cross",
    "cyan circle",
    "purple square",
)
NOISE = (
    "white cross",
    "orange triangle",
    "red square",
    "blue cross",
    "green circle",
    "cyan triangle",
)
ARMS = {
    "own": [],
    "words": ["--data.queries_tries=12"],
    "half": ["--data.queries_tries=12", "--data.queries_share=0.5"],
    "blind": ["--data.queries_tries=0"],
}
FIGURES = ("iou", "iou_50", "centre_inside", "area_ratio")
SIZE = 128


# ---- the folder ----------------------------------------------------------------------------------


def drawn(purpose: str, index: int, named: bool = False) -> scenes.Scene:
    """A scene without noise words; named: with one of the named classes at least."""
    rng = generator(SEED, index, purpose)
    while True:
        scene = scenes.draw(rng, size=SIZE)
        names = set(scene.names)
        if not names & set(NOISE) and (not named or names & set(NAMED)):
            return scene


def make(home: Path, photos: int, checked: int) -> None:
    """photos/, checked/ with labels.json (COCO), words.txt; what is there already stays."""
    if (home / "words.txt").is_file():
        return
    for folder in ("photos", "checked"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for i in range(photos):
        pixels = drawn("words photo", i).pixels
        Pillow.fromarray(pixels).save(home / "photos" / f"{i:04d}.png")
    kept = [drawn("words checked", i, named=True) for i in range(checked)]
    for i, scene in enumerate(kept):
        Pillow.fromarray(scene.pixels).save(home / "checked" / f"{i:04d}.png")
    (home / "checked" / "labels.json").write_text(json.dumps(coco(kept)))
    (home / "words.txt").write_text("\n".join([*NAMED, *NOISE, ""]))


def coco(kept: list[scenes.Scene]) -> dict:
    """Every object of the scenes, as COCO writes it."""
    numbers = {name: i for i, name in enumerate(scenes.NAMES)}
    rows = []
    for i, scene in enumerate(kept):
        for thing in scene.objects:
            x1, y1, x2, y2 = (value * SIZE / 1000 for value in thing.box_1000)
            box = [x1, y1, x2 - x1, y2 - y1]
            rows.append({"image_id": i, "category_id": numbers[thing.name], "bbox": box})
    images = [
        {"id": i, "file_name": f"{i:04d}.png", "height": SIZE, "width": SIZE}
        for i in range(len(kept))
    ]
    named = [{"id": i, "name": name} for name, i in numbers.items()]
    return {"images": images, "annotations": rows, "categories": named}


# ---- a cell --------------------------------------------------------------------------------------


def run_words(home: Path, arm: str, seed: int, updates: int) -> list[str]:
    """What the arm's run is started with."""
    common = {
        "data.dir": home / "photos",
        "eval.labels": home / "checked" / "labels.json",
        "eval.scenes": 0,
        "run.dir": home / f"{arm}-s{seed}",
        "run.report": "false",
        "train.seed": seed,
        "train.steps": updates,
        "train.warmup": min(20, updates),
    }
    words = [f"--{key}={value}" for key, value in common.items()]
    if arm != "own":
        words += [f"--data.queries={home / 'words.txt'}", *ARMS[arm]]
    return words


def needs_training(home: Path, arm: str, seed: int) -> bool:
    """Whether the arm has no adapter yet; the base needs none."""
    return arm != "base" and not (home / f"{arm}-s{seed}" / "adapter").is_dir()


def learn(home: Path, arm: str, seed: int, updates: int) -> None:
    """The arm's run, gone on with where it was cut off."""
    words = [*run_words(home, arm, seed, updates), "--train.resume=auto"]
    if console.run(train.main, words) != 0:
        raise SystemExit(f"the run {home / f'{arm}-s{seed}'} did not end well")


def cell(home: Path, arm: str, seed: int, updates: int, checked: int) -> dict:
    """The figures of a trained arm, or of the base."""
    words = run_words(home, "own" if arm == "base" else arm, seed, updates)
    directory = home / f"{arm}-s{seed}"
    measured = [*words, f"--eval.scenes={checked}", "--eval.attention=false", "--data.holdout=0"]
    config = schema.load(None, measured)
    policy = load(config, None if arm == "base" else directory / "adapter")
    source = open_source(config, grid_multiple("nano"), home)
    engine = open_engine(policy, config, print)
    (results,) = examine(engine, source, config, (arm != "base",))
    asked = share_of(directory) if arm != "base" else {}
    return {"arm": arm, "seed": seed, "updates": updates, **asked, **two(results).json()}


def share_of(directory: Path) -> dict[str, float]:
    """How often the run asked in the list's words, and how many of its boxes were scored."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in ("own_words", "scored") if name in lines[0]]
    return {name: float(np.mean([line[name] for line in lines])) for name in names}


def two(results: Results) -> Results:
    """Figures over the named classes together, and over the others."""
    marks: dict[str, Mark] = {}
    for kind in ("greedy", "sampled"):
        for figure in FIGURES:
            start = f"{kind}_{figure}:"
            classes = [name.removeprefix(start) for name in results.marks if name.startswith(start)]
            for label, wanted in (("named", True), ("others", False)):
                parts = [results.marks[start + c] for c in classes if (c in NAMED) == wanted]
                tops = np.sum([top for top, _ in parts], 0)
                marks[f"{label}_{kind}_{figure}"] = (tops, np.sum([b for _, b in parts], 0))
    for name in ("own_area", "own_TU", "invariance", "visible_present"):
        marks[name] = results.marks[name]
    return Results(results.n, marks)


# ---- the table -----------------------------------------------------------------------------------


def cell_path(home: Path, arm: str, seed: int) -> Path:
    """Where a finished cell lies."""
    return home / f"{arm}-s{seed}.json"


def table(home: Path) -> dict:
    """Every arm beside the base and beside `own` of the same seed, paired by picture."""
    found = {}
    for path in sorted(home.glob("*-s*.json")):
        content = json.loads(path.read_text())
        found[content["arm"], content["seed"]] = content
    results = {key: _read(content) for key, content in found.items()}
    base = results["base", 0]
    rows = []
    for (arm, seed), own in results.items():
        for figure in [name for name in own.marks if "_iou" in name or "_area_ratio" in name]:
            row = {"arm": arm, "seed": seed, "figure": figure, "value": own.values[figure]}
            row["over base"] = _gain(base, own, figure)
            if arm not in ("base", "own") and ("own", seed) in results:
                row["over own"] = _gain(results["own", seed], own, figure)
            rows.append(row)
    kept = ("arm", "seed", "updates", "own_words", "scored")
    cells = [{name: c[name] for name in kept if name in c} for c in found.values()]
    things = {
        label: int(base.marks[f"{label}_greedy_iou"][1].sum()) for label in ("named", "others")
    }
    return {"pictures": base.n, "things": things, "cells": cells, "rows": rows}


def _read(content: dict) -> Results:
    names = ("n", "values", "plain", "layers", "marks")
    return Results.read({name: content[name] for name in names})


def _gain(before: Results, after: Results, figure: str) -> list[float]:
    gain = difference(before, after, figure)
    return [round(value, 4) for value in (gain.value, gain.low, gain.high)]


def show(made: dict) -> None:
    """On screen."""
    for row in made["rows"]:
        gains = [
            f"{name} {row[name][0]:+.3f} [{row[name][1]:+.3f}, {row[name][2]:+.3f}]"
            for name in ("over base", "over own")
            if name in row
        ]
        start = f"{row['arm']:6} s{row['seed']} {row['figure']:26}"
        print(f"{start} {row['value']:.3f}  {'; '.join(gains)}")
    print(json.dumps({name: made[name] for name in ("pictures", "things", "cells")}))


def smoke() -> None:
    """Every arm once, as small as it gets."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home, 24, 4)
        for arm in ("base", *ARMS):
            if needs_training(home, arm, 0):
                learn(home, arm, 0, 1)
            made = cell(home, arm, 0, 1, 4)
            cell_path(home, arm, 0).write_text(json.dumps(made))
        show(table(home))


def parse(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", choices=["base", *ARMS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    """The command."""
    words = parse(given)
    torch.set_num_threads(1)
    if words.smoke:
        smoke()
    elif words.table:
        made = table(HOME)
        show(made)
        RESULT.write_text(json.dumps(made, indent=1) + "\n")
    elif words.arm is not None:
        make(HOME, PHOTOS, CHECKED)
        place = cell_path(HOME, words.arm, words.seed)
        if needs_training(HOME, words.arm, words.seed):
            learn(HOME, words.arm, words.seed, UPDATES)
        elif not place.is_file():
            place.write_text(json.dumps(cell(HOME, words.arm, words.seed, UPDATES, CHECKED)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
