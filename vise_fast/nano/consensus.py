"""Is there anything for R_geo to teach? The consensus of a grounder over random views of an image
against its single greedy box.

If boxes found on views and projected back average to a better box than the one found on the image
itself, agreement across views points towards the truth. Beside it, the same with sampled boxes on
the image alone, which needs no views.

Run: python -m vise_fast.nano.consensus --scenes 400 --views 16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vise_fast import nano
from vise_fast.config.schema import ViewConfig
from vise_fast.images import geometry, scenes, views
from vise_fast.nano import exam, lessons
from vise_fast.system.console import Console
from vise_fast.system.randomness import generator
from vise_fast.text import prompts

SEED = 78_001
SIDE = lessons.SIDE


def back_projected(
    pupil: exam.Pupil, images: list[Tensor], ask: list[str], greedy: Tensor, round_: int
) -> Tensor:
    """One view per image: the greedy boxes found there, projected back (ellipse hull), (N, 4); NaN
    where the view lost the object.
    """
    drawn = [
        views.draw_view(generator(SEED, round_, "view", index), SIDE, SIDE, ViewConfig())
        for index in range(len(images))
    ]
    matrices = torch.stack([view.matrix_px for view in drawn])
    boxes = _readable(pupil.answer(pupil.look(torch.stack(views.apply(images, drawn))), ask, 18))
    back = geometry.project_1000(
        boxes, torch.linalg.inv(matrices), SIDE, SIDE, "ellipse", clamp=False
    )
    kept = geometry.kept_share(greedy, matrices, SIDE, SIDE) >= ViewConfig().min_kept
    return torch.where(kept[:, None], back, torch.nan)


def _readable(answers: list[str]) -> Tensor:
    """(N, 4) boxes in 0..1000; NaN where the answer could not be read."""
    boxes, read = exam.boxes_of(answers)
    return torch.where(torch.from_numpy(read)[:, None], boxes, torch.nan)


def study(pupil: exam.Pupil, count: int, rounds: int) -> dict[str, list[float]]:
    """Mean IoU with the truth of each way to make one box, as [mean, paired gain over the single
    greedy box, its standard error].
    """
    drawn = [scenes.draw(generator(SEED, 0, "scene", index)) for index in range(count)]
    chosen = [
        scene.objects[generator(SEED, 0, "choice", i).integers(len(scene.objects))]
        for i, scene in enumerate(drawn)
    ]
    truth = torch.tensor([thing.box_1000 for thing in chosen])
    images = [torch.from_numpy(scene.pixels) for scene in drawn]
    ask = [prompts.SHORT.ground(thing.name) for thing in chosen]
    past = pupil.look(torch.stack(images))
    greedy, _ = exam.boxes_of(pupil.answer(past, ask, 18))
    draw = torch.Generator().manual_seed(SEED)
    sampled = torch.stack([_readable(pupil.answer(past, ask, 18, draw)) for _ in range(rounds)])
    seen = torch.stack(
        [back_projected(pupil, images, ask, greedy, index) for index in range(rounds)]
    )
    ways = {
        "greedy": greedy,
        "one sample": sampled[0].nan_to_num(0),
        "mean of samples": sampled.nanmean(0),
        "median of samples": sampled.nanmedian(0).values,
        "one view": torch.where(seen[0].isnan(), greedy, seen[0]),
        "mean over views": torch.cat([greedy[None], seen]).nanmean(0),
        "median over views": torch.cat([greedy[None], seen]).nanmedian(0).values,
    }
    base = geometry.iou(greedy, truth)
    return {name: _summary(geometry.iou(box, truth), base) for name, box in ways.items()}


def _summary(iou: Tensor, base: Tensor) -> list[float]:
    gain = iou - base
    return [
        round(float(value), 4) for value in (iou.mean(), gain.mean(), gain.std() / len(gain) ** 0.5)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=nano.DIRECTORY)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--views", type=int, default=16)
    args = parser.parse_args()
    pupil = exam.Pupil(load_file(args.model / "model.safetensors"))
    Console().say(
        json.dumps(
            {
                "scenes": args.scenes,
                "views": args.views,
                "iou": study(pupil, args.scenes, args.views),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
