"""What each piece of a reward knows: within a group of samples of one question, how does it go with
the box's true IoU, and with its size?

    python bench/signals.py                                        the default configuration, 128
    validation scenes
    python bench/signals.py --scenes 32 -- --rollout.views 2 --rollout.view_temperature 1      any
    setting, behind --

Two figures per piece, on drawn scenes whose true boxes training never sees: the correlation of its
deviation from its group's mean with that of the true IoU (and of the log area: a piece that grows
with size rewards growing), and the true IoU of the box that it would pick out of each group, beside
the mean box and the best one. Left out: what a policy makes of it (learning.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from learning import SPLIT_SEED, truth_of  # noqa: E402

from vise_fast.config import schema as configuration  # noqa: E402
from vise_fast.engine.fast import FastEngine  # noqa: E402
from vise_fast.images import geometry
from vise_fast.images.drawn import Scenes  # noqa: E402
from vise_fast.method import rewards  # noqa: E402
from vise_fast.method.experience import (
    join,  # noqa: E402
    play_batch,  # noqa: E402
)
from vise_fast.model import load as model


def pieces(evidence: rewards.Evidence, config: rewards.RewardConfig) -> dict[str, Tensor]:
    """(N,) each: what the default reward is made of, and the reward itself."""
    parts = rewards.dissect(evidence, config)
    named = {
        "true IoU": geometry.iou(
            geometry.clean_1000(evidence.box_1000), geometry.clean_1000(evidence.truth_1000)
        ),
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


def usable(evidence: rewards.Evidence) -> Tensor:
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
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))


def picked(values: Tensor, truth: Tensor, group: Tensor) -> float:
    """Mean truth of the row with the highest value of each group."""
    return float(
        torch.stack(
            [
                truth[rows][values[rows].argmax()]
                for g in group.unique()
                if len(rows := (group == g).nonzero()[:, 0])
            ]
        ).mean()
    )


def measure(scenes: int, extra: list[str]) -> dict:
    torch.set_num_threads(1)
    config = configuration.load(None, ["--train.seed", str(SPLIT_SEED["validation"]), *extra])
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    source = Scenes(config)
    collected = []
    truth = truth_of(source)
    size = config.train.batch
    for step in range(-(-scenes // size)):
        evidence = join(play_batch(engine, source.batch(step, size), config, step, truth))
        rows = usable(evidence).nonzero()[:, 0]
        collected.append(
            {n: v[rows].double() for n, v in pieces(evidence, config.reward).items()}
            | {
                "group": rows // config.rollout.samples + step * size,
                "log area": geometry.area_share(evidence.box_1000)[rows].log(),
            }
        )
    table = {name: torch.cat([part[name] for part in collected]) for name in collected[0]}
    group = table.pop("group")
    size_of = table.pop("log area")
    truth_of_row = table["true IoU"]
    known = deviation(truth_of_row, group)
    larger = deviation(size_of, group)
    rows = {
        name: {
            "with_iou": correlation(d := deviation(values, group), known),
            "with_log_area": correlation(d, larger),
            "picked_iou": picked(values, truth_of_row, group),
        }
        for name, values in table.items()
    }
    return {
        "bench": "signals",
        "scenes": scenes,
        "boxes": len(group),
        "groups": len(group.unique()),
        "mean_iou": float(truth_of_row.mean()),
        "extra": extra,
        "pieces": rows,
    }


def main() -> None:
    own = sys.argv[1:]
    extra = []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--smoke", action="store_true", help="one small batch")
    args = parser.parse_args(own)
    document = (
        measure(2, ["--train.batch", "2", "--rollout.samples", "4"])
        if args.smoke
        else measure(args.scenes, extra)
    )
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
