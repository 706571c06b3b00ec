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
from dataclasses import dataclass
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
LENGTH = lessons.ANSWER["find"]


@dataclass(frozen=True)
class Task:
    """Images (S, S, 3) and what the pupil is asked about each."""

    images: list[Tensor]
    questions: list[str]


def back_projected(pupil: exam.Pupil, task: Task, greedy: Tensor, round_: int) -> Tensor:
    """One view per image: the greedy boxes found there, projected back (ellipse hull), (N, 4); NaN
    where the view lost the object.
    """
    settings = ViewConfig()
    rngs = [generator(SEED, round_, "view", index) for index in range(len(task.images))]
    drawn = [views.draw_view(rng, SIDE, SIDE, settings) for rng in rngs]
    matrices = torch.stack([view.matrix_px for view in drawn])
    past = pupil.look(torch.stack(views.apply(task.images, drawn)))
    boxes = _readable(pupil.answer(past, task.questions, LENGTH))
    inverse = torch.linalg.inv(matrices)
    back = geometry.project_1000(boxes, inverse, SIDE, SIDE, "ellipse", clamp=False)
    kept = geometry.kept_share(greedy, matrices, SIDE, SIDE) >= settings.min_kept
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
    things = exam.chosen(drawn, SEED)
    truth = torch.tensor([thing.box_1000 for thing in things])
    task = Task(
        [torch.from_numpy(scene.pixels) for scene in drawn],
        [prompts.SHORT.ground(thing.name) for thing in things],
    )
    ways = _ways(pupil, task, rounds)
    base = geometry.iou(ways["greedy"], truth)
    return {name: _summary(geometry.iou(box, truth), base) for name, box in ways.items()}


def _ways(pupil: exam.Pupil, task: Task, rounds: int) -> dict[str, Tensor]:
    """One box (N, 4) per image, made in each way."""
    past = pupil.look(torch.stack(task.images))
    greedy, _ = exam.boxes_of(pupil.answer(past, task.questions, LENGTH))
    draw = torch.Generator().manual_seed(SEED)
    samples = [pupil.answer(past, task.questions, LENGTH, draw) for _ in range(rounds)]
    sampled = torch.stack([_readable(answers) for answers in samples])
    seen = torch.stack([back_projected(pupil, task, greedy, index) for index in range(rounds)])
    with_greedy = torch.cat([greedy[None], seen])
    return {
        "greedy": greedy,
        "one sample": sampled[0].nan_to_num(0),
        "mean of samples": sampled.nanmean(0),
        "median of samples": sampled.nanmedian(0).values,
        "one view": torch.where(seen[0].isnan(), greedy, seen[0]),
        "mean over views": with_greedy.nanmean(0),
        "median over views": with_greedy.nanmedian(0).values,
    }


def _summary(iou: Tensor, base: Tensor) -> list[float]:
    gain = iou - base
    error = gain.std() / len(gain) ** 0.5
    return [round(float(value), 4) for value in (iou.mean(), gain.mean(), error)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=nano.DIRECTORY)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--views", type=int, default=16)
    args = parser.parse_args()
    pupil = exam.Pupil(load_file(args.model / "model.safetensors"))
    iou = study(pupil, args.scenes, args.views)
    found = {"scenes": args.scenes, "views": args.views, "iou": iou}
    Console().say(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
