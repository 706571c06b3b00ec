"""What each piece of a reward knows: within a group of samples of one question, how does it go with
the box's true IoU, and with its size?

    python bench/signals.py               the default configuration, 128 validation scenes
    python bench/signals.py --scenes 32 -- --rollout.views 2 --rollout.view_temperature 1
                                          any setting, behind --
    python bench/signals.py --verdicts -- --reward.shared_controls true
                                          fewer verdicts: does the reward still say the same?
    python bench/signals.py --unique      groups whose words come back (reward.unique) beside others

Two figures per piece, on drawn scenes whose true boxes training never sees: the correlation of its
deviation from its group's mean with that of the true IoU (and of the log area: a piece that grows
with size rewards growing), and the true IoU of the box that it would pick out of each group, beside
the mean box and the best one. Left out: what a policy makes of it (learning.py).
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import torch
from learning import SPLIT_SEED, of_scenes, parted
from torch import Tensor

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images import geometry
from vise_fast.images.drawn import Scenes
from vise_fast.method import rewards
from vise_fast.method.evidence import Evidence, join
from vise_fast.method.experience import play_batch
from vise_fast.model import load as model


def pieces(evidence: Evidence, config: rewards.RewardConfig) -> dict[str, Tensor]:
    """(N,) each: what the default reward is made of, and the reward itself."""
    parts = rewards.dissect(evidence, config)
    boxes = geometry.clean_1000(evidence.box_1000)
    named = {
        "true IoU": geometry.iou(boxes, geometry.clean_1000(evidence.truth_1000)),
        "R_geo": parts.geometric,
        "hidden by the ghost": 1 - evidence.gone,
        "R_sem": parts.semantic,
        "- sqrt(area)": -parts.size,
        "reward": config.w_geo * parts.geometric
        + config.w_sem * parts.semantic
        - config.w_area * parts.size,
    }
    if evidence.control is not None:
        named["seen with a control ghost"] = evidence.control.mean(1)
    if evidence.keep is not None:
        named["seen with all else ghosted"] = evidence.keep
    return named


def usable(evidence: Evidence) -> Tensor:
    """(N,) bool: a box with area, judged, of a query that names one object of the scene."""
    return (
        evidence.readable
        & geometry.proper(evidence.box_1000)
        & evidence.judged
        & geometry.proper(evidence.truth_1000)
    )


def deviation(values: Tensor, group: Tensor) -> Tensor:
    """values (N,) minus the mean of their group (N,)."""
    groups = int(group.max()) + 1
    total = torch.zeros(groups, dtype=torch.float64).index_add(0, group, values)
    return values - (total / torch.bincount(group, minlength=groups).clamp_min(1))[group]


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two rows of deviations (N,)."""
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))


def picked(values: Tensor, truth: Tensor, group: Tensor) -> float:
    """Mean truth of the row with the highest value of each group."""
    best = []
    for g in group.unique():
        rows = (group == g).nonzero()[:, 0]
        best.append(truth[rows][values[rows].argmax()])
    return float(torch.stack(best).mean())


def collect(scenes: int, extra: list[str]) -> dict[str, Tensor]:
    """(N,) each, of the usable boxes of so many scenes: the pieces, "group" and "log area"."""
    config = configuration.load(None, ["--train.seed", str(SPLIT_SEED["validation"]), *extra])
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    source = Scenes(config)
    truth = source.truth
    size = config.train.batch
    parts: dict[str, list[Tensor]] = {}
    for step in range(-(-scenes // size)):
        slices = play_batch(engine, source.batch(step, size), config, step, truth)
        evidence = join([played.evidence for played in slices])
        rows = usable(evidence).nonzero()[:, 0]
        named = {n: v[rows].double() for n, v in pieces(evidence, config.reward).items()}
        named["group"] = rows // config.rollout.samples + step * size
        named["log area"] = geometry.area_share(evidence.box_1000)[rows].log()
        for name, values in named.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


FULL = {
    "reward.sufficiency": True,
    "reward.controls": 1,
    "reward.shared_controls": False,
    "reward.settled": 0.0,
    "reward.implied": 0.0,
}
"""What the verdicts of `--verdicts` are compared with."""


class Judging(NamedTuple):
    """One way to judge: evidence of the same boxes, verdicts asked for per image."""

    evidence: Evidence
    config: configuration.RewardConfig
    verdicts: float


def judged_in(config: configuration.Config, scenes: int) -> Judging:
    """So many scenes under one configuration."""
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    source = Scenes(config)
    size = config.train.batch
    steps = -(-scenes // size)
    found: list[Evidence] = []
    for step in range(steps):
        slices = play_batch(engine, source.batch(step, size), config, step, source.truth)
        found += [played.evidence for played in slices]
    count = engine.counters.take()["verdicts"] / (steps * size)
    return Judging(join(found), config.reward, count)


def compare_verdicts(scenes: int, extra: list[str]) -> dict:
    """The reward of fewer verdicts beside that of all of them: correlation of their deviations from
    the group's mean, and of each with the true IoU.
    """
    torch.set_num_threads(1)
    config = configuration.load(None, ["--train.seed", str(SPLIT_SEED["validation"]), *extra])
    few = judged_in(config, scenes)
    full = judged_in(configuration.with_changes(config, FULL), scenes)
    rows = usable(full.evidence).nonzero()[:, 0]
    group = rows // config.rollout.samples
    told = [pieces(way.evidence, way.config) for way in (few, full)]
    mine, whole = ({n: deviation(v[rows].double(), group) for n, v in p.items()} for p in told)
    return {
        "bench": "signals --verdicts",
        "scenes": scenes,
        "boxes": len(rows),
        "extra": extra,
        "verdicts_per_image": [few.verdicts, full.verdicts],
        "reward_with_full": correlation(mine["reward"], whole["reward"]),
        "semantic_with_full": correlation(mine["R_sem"], whole["R_sem"]),
        "reward_with_iou": [correlation(p["reward"], p["true IoU"]) for p in (mine, whole)],
    }


def compare_groups(scenes: int, extra: list[str]) -> dict:
    """The share of groups whose words come back, and the mean true IoU of their boxes beside that
    of the others, of groups whose query names one object of the scene.
    """
    torch.set_num_threads(1)
    words = ["--train.seed", str(SPLIT_SEED["validation"]), "--reward.unique", "true", *extra]
    config = configuration.load(None, words)
    evidence = judged_in(config, scenes).evidence
    boxes = geometry.clean_1000(evidence.box_1000)
    truth = geometry.clean_1000(evidence.truth_1000)
    group = evidence.group_size
    iou = geometry.iou(boxes, truth).view(-1, group).mean(1)
    back = evidence.named_again.view(-1, group)[:, 0]
    named = geometry.proper(truth).view(-1, group)[:, 0]
    one = iou[named & back]
    other = iou[named & ~back]
    spread = (one.var() / len(one) + other.var() / len(other)).sqrt()
    return {
        "bench": "signals --unique",
        "groups": len(back),
        "back": float(back.double().mean()),
        "named": int(named.sum()),
        "named_back": len(one),
        "iou_back": float(one.mean()),
        "iou_others": float(other.mean()),
        "difference": float(one.mean() - other.mean()),
        "difference_standard_error": float(spread),
        "extra": extra,
    }


def measure(scenes: int, extra: list[str]) -> dict:
    """Both figures of each piece."""
    torch.set_num_threads(1)
    table = collect(scenes, extra)
    group = table.pop("group")
    larger = deviation(table.pop("log area"), group)
    truth = table["true IoU"]
    known = deviation(truth, group)
    rows = {}
    for name, values in table.items():
        found = deviation(values, group)
        rows[name] = {
            "with_iou": correlation(found, known),
            "with_log_area": correlation(found, larger),
            "picked_iou": picked(values, truth, group),
        }
    return {
        "bench": "signals",
        "scenes": scenes,
        "boxes": len(group),
        "groups": len(group.unique()),
        "mean_iou": float(truth.mean()),
        "extra": extra,
        "pieces": rows,
    }


def main() -> None:
    """Measure and tell; the last line is the JSON."""
    own, extra = parted(sys.argv[1:])
    parser = of_scenes(__doc__)
    parser.add_argument("--verdicts", action="store_true", help="fewer verdicts against all")
    parser.add_argument("--unique", action="store_true", help="groups whose words come back")
    args = parser.parse_args(own)
    if args.smoke:
        args.scenes = 2
        extra = ["--train.batch", "2", "--rollout.samples", "4"]
    if args.verdicts:
        print(json.dumps(compare_verdicts(args.scenes, extra)))
        return
    if args.unique:
        print(json.dumps(compare_groups(args.scenes, extra)))
        return
    document = measure(args.scenes, extra)
    print(
        f"{document['boxes']} boxes of {document['groups']} questions; mean true IoU "
        f"{document['mean_iou']:.3f}\n"
    )
    print("| piece | with true IoU | with log area | IoU of its pick |\n|---|---|---|---|")
    for name, row in document["pieces"].items():
        print(
            f"| {name} | {row['with_iou']:.2f} | {row['with_log_area']:.2f} | "
            f"{row['picked_iou']:.3f} |"
        )
    print(json.dumps(document))


if __name__ == "__main__":
    main()
