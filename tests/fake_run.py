"""Run directories without a run: the files that a run writes, with invented numbers, for tests of
what reads them.

Look at one: `python tests/fake_run.py DIRECTORY [healthy|collapsed|photographs]`, then `python -m
vise_fast.report DIRECTORY`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vise_fast.config import schema as config
from vise_fast.evaluate.results import Results
from vise_fast.images import geometry, scenes, views
from vise_fast.system.randomness import generator

SCENES = 96


def write(directory, kind="healthy", steps=60, config_words=(), query=None, seed=0):
    directory = Path(directory)
    (directory / "samples").mkdir(parents=True)
    settings = config.load(
        None,
        [f"--train.steps={steps}", "--update.tau=0.02", "--run.dir", str(directory), *config_words],
    )
    (directory / "config.yaml").write_text(config.to_yaml(settings))
    environment = {
        "vise_fast": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0",
        "device": "x86_64",
        "cpus": 2,
        "argv": ["--seed", "1"],
    }
    (directory / "env.json").write_text(json.dumps(environment))
    rng = generator(seed, 0, "fake run")
    with (directory / "metrics.jsonl").open("w") as file:
        file.writelines(
            json.dumps(step_metrics(rng, step, steps, kind)) + "\n" for step in range(1, steps + 1)
        )
    with (directory / "samples.jsonl").open("w") as file:
        for step in sorted({1, (steps + 1) // 2, steps}):
            file.writelines(
                json.dumps(card(directory, rng, step, steps, index, kind, settings, query)) + "\n"
                for index in range(2)
            )
    (directory / "evaluation.json").write_text(
        json.dumps({name: arm.json() for name, arm in evaluation(rng, kind).items()})
    )
    return directory


def step_metrics(rng, step, steps, kind):
    progress, noise = step / steps, lambda scale: float(rng.normal(0, scale))
    growth = 0.5 * progress**2 if kind == "collapsed" else 0.0
    table = rng.dirichlet([60 + 30 * progress, 22 - 14 * progress, 3, 12])
    return {
        "step": step,
        "reward": 0.42 + 0.16 * progress + growth * 0.4 + noise(0.03),
        "geometric": 0.71 + 0.1 * progress + noise(0.02),
        "semantic": 0.4 + 0.15 * progress + noise(0.05),
        "area": 0.13 - 0.015 * progress + growth + abs(noise(0.008)),
        "area_large": max(0.0, growth - 0.05 + noise(0.01)),
        "parse_rate": min(1.0, 0.985 + noise(0.01)),
        "view_parse_rate": min(1.0, 0.98 + noise(0.01)),
        "query_parse_rate": 1.0,
        "carries": min(1.0, 0.83 + noise(0.04)),
        "kl": 0.018 * progress + abs(noise(0.002)),
        "beta": 1e-3 * 1.1 ** max(0, step - 40),
        "lr": 7e-4,
        "grad_norm": 0.6 + abs(noise(0.2)),
        **dict(zip(("TU", "SB", "IG", "ID"), table.tolist(), strict=True)),
        "seconds": 2.1,
        "images_per_s": 3.8 + noise(0.2),
        "images_encoded": 40,
        "phases": {"encode": 0.4, "ask": 0.2, "ground": 0.7, "verify": 0.35, "update": 0.45},
        "alarms": ["area"] if growth > 0.15 else [],
    }


def card(directory, rng, step, steps, index, kind, settings, query):
    """One image with boxes that come nearer to the truth (or swallow the image)."""
    size = (240, 320) if kind == "photographs" else (128, 128)
    scene = scenes.draw(generator(7, step, "fake scene", index), size=max(size))
    pixels, thing = scene.pixels[: size[0], : size[1]], scene.objects[0]
    name = f"samples/step_{step}_{index}.png"
    Image.fromarray(pixels).save(directory / name)
    loose = 90 * (1 - step / steps) + 15
    truth = np.array(thing.box_1000) * np.tile([max(size) / size[1], max(size) / size[0]], 2)
    grown = np.array([20, 20, 980, 980]) if kind == "collapsed" and step > steps / 2 else truth
    boxes = geometry.clean_1000(
        grown + rng.normal(0, loose, (settings.rollout.samples, 4))
    ).tolist()
    drawn = [
        views.draw_view(generator(3, step, "fake view", 2 * index + k), *size, settings.view)
        for k in range(settings.rollout.views)
    ]
    answers = [
        geometry.project_1000(grown, view.matrix_px, *size, "ellipse").numpy()
        + rng.normal(0, loose / 2, 4)
        for view in drawn
    ]
    count = len(boxes)
    return {
        "step": step,
        "image": name,
        "name": f"scene {step}.{index}",
        "query": query or thing.name,
        "query_written": f"<query> {thing.name} </query>",
        "boxes_1000": boxes,
        "readable": [True] * (count - 1) + [step > 1],
        "written": ["<box>012,345,678,999</box>"] * count,
        "rewards": rng.uniform(0.3, 0.8, count).tolist(),
        "seen": 0.97,
        "gone": rng.uniform(0, 0.6, count).tolist(),
        "control": rng.uniform(0.4, 1, (count, 1)).tolist(),
        "keep": rng.uniform(0.6, 1, count).tolist(),
        "views": [{"kind": view.kind, "matrix_px": view.matrix_px.tolist()} for view in drawn],
        "view_boxes_1000": [answer.tolist() for answer in answers],
    }


BASE = {
    "iou": 0.46,
    "iou_50": 0.53,
    "iou_rescaled": 0.465,
    "centre_inside": 0.83,
    "centre_error": 0.06,
    "parse_rate": 0.99,
}
SEEING = {
    "visible_present": 0.95,
    "visible_absent": 0.93,
    "visible_hidden": 0.94,
    "visible_elsewhere": 0.95,
    "changed_elsewhere": 0.03,
    "visible_accuracy": 0.945,
    "pope_accuracy": 0.94,
    "pope_precision": 0.93,
    "pope_recall": 0.95,
    "pope_f1": 0.94,
    "pope_yes_rate": 0.51,
    "TU": 0.9,
    "SB": 0.05,
    "IG": 0.01,
    "ID": 0.04,
    "query_present": 0.86,
    "blind_iou": 0.08,
    "blind_yes_rate": 0.0,
}
LABEL_FREE = {
    "invariance": 0.78,
    "own_TU": 0.81,
    "own_SB": 0.12,
    "own_IG": 0.01,
    "own_ID": 0.06,
    "own_area": 0.12,
    "own_area_large": 0.0,
    "own_parse_rate": 0.99,
    "attention_share": 0.31,
    "query_parse_rate": 1.0,
}
GAINS = {
    "iou": 0.05,
    "iou_50": 0.07,
    "iou_rescaled": 0.04,
    "centre_inside": 0.04,
    "centre_error": -0.008,
    "invariance": 0.03,
    "own_TU": 0.04,
    "attention_share": 0.03,
}


def evaluation(rng, kind):
    """Two paired arms: before, and after with GAINS (negative ones where the run collapsed)."""
    sign = -2 if kind == "collapsed" else 1
    before, after = Results(SCENES), Results(SCENES)
    figures = dict(LABEL_FREE)
    if kind != "photographs":
        figures |= {
            f"{label}_{name}": value
            for label in ("greedy", "sampled")
            for name, value in BASE.items()
        } | SEEING
    for name, value in figures.items():
        gain = sign * GAINS.get(name.removeprefix("greedy_").removeprefix("sampled_"), 0.0)
        mark(rng, before, after, name, value, gain)
    if kind != "photographs":
        for label in ("greedy", "sampled"):
            mark(rng, before, after, f"{label}_area", 0.12, 0.4 if kind == "collapsed" else -0.005)
            true = before.marks[f"{label}_area"][0].mean()  # the base's boxes are the right size
            for arm in (before, after):
                top = arm.marks[f"{label}_area"][0]
                arm.marks[f"{label}_area_ratio"] = (top, np.full(SCENES, true))
                arm.plain[f"{label}_scale"] = 0.95
    for arm, lift in ((before, 0.0), (after, 0.03)):
        arm.plain["distinct_queries"] = 0.22
        arm.layers = (np.array([0.2, 0.41, 0.37, 0.26]) + lift).tolist()
    return {"before": before, "after": after}


def mark(rng, before, after, name, value, gain):
    """Paired per-scene values: most of the noise is the scene's, shared by both arms."""
    shared, noise = (
        np.clip(value + rng.normal(0, 0.12, SCENES), 0, 1),
        rng.normal(0, 0.04 if gain else 0.01, SCENES),
    )
    before.marks[name] = (shared, np.ones(SCENES))
    after.marks[name] = (shared + gain + noise - noise.mean(), np.ones(SCENES))


if __name__ == "__main__":
    print(write(sys.argv[1], *sys.argv[2:3]))
