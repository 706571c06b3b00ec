"""Boxes before and after training, as a picture: each column one held-out scene, the base above and
the adapter below, eight sampled boxes each (orange) and the true one (white).

    python docs/images/boxes.py runs/nano boxes.png [scenes]

The scenes are the first that are held out, and the object the first of each: nothing is picked.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vise_fast.config.schema import load as load_config
from vise_fast.engine.choose import open_engine
from vise_fast.images import geometry
from vise_fast.images.sources import open_source
from vise_fast.method.roles import Question, Sampling, ground
from vise_fast.model.load import grid_multiple, load

SIDE = 220
SAMPLES = 8


def boxed(pixels, boxes, true):
    """A scene with boxes of 1000 on it, and their mean IoU with the true one."""
    image = Image.fromarray(pixels.numpy()).resize((SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for box in boxes[geometry.proper(boxes)]:
        pen.rectangle(geometry.to_px(box, SIDE, SIDE).tolist(), outline=(255, 126, 30), width=2)
    pen.rectangle(geometry.to_px(true, SIDE, SIDE).tolist(), outline=(255, 255, 255), width=2)
    return image, float(geometry.iou(boxes, true.expand_as(boxes)).mean())


def main(run, out, scenes="6"):
    config = load_config(Path(run) / "config.yaml")
    policy = load(config, adapter=f"{run}/adapter")
    engine = open_engine(policy, config)
    source = open_source(config, grid_multiple(config.model.path))
    images = source.held_out(int(scenes))
    things = [source.scene(image.key).objects[0] for image in images]
    seeds = [list(range(n * SAMPLES, (n + 1) * SAMPLES)) for n in range(len(images))]
    asked = [Question(n, thing.name, seeds[n]) for n, thing in enumerate(things)]
    sampling = Sampling(config.rollout.box_tokens, config.rollout.temperature)
    sheet = Image.new("RGB", (len(images) * (SIDE + 6) - 6, 2 * SIDE + 6), "white")
    for row, adapters in enumerate((False, True)):
        prefixes = engine.prefill(engine.encode([image.pixels for image in images]), adapters)
        boxes = ground(engine, prefixes, asked, sampling).box_1000.reshape(-1, SAMPLES, 4)
        overlaps = []
        for column, thing in enumerate(things):
            true = torch.tensor(thing.box_1000, dtype=torch.float64)
            picture, overlap = boxed(images[column].pixels, boxes[column], true)
            sheet.paste(picture, (column * (SIDE + 6), row * (SIDE + 6)))
            overlaps.append(overlap)
        print(f"{'adapter' if adapters else 'base':8} mean IoU {sum(overlaps) / len(overlaps):.3f}")
    sheet.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
