"""How loud is what a reward says, beside the noise of the samples that say it? Gradients of the
untrained policy, image by image.

    python bench/gradient_noise.py                 128 validation scenes, 16 samples, 8 views
    python bench/gradient_noise.py --scenes 512 --write
                                                   the table of docs/LEARNING.md (seven minutes)
    python bench/gradient_noise.py -- --rollout.temperature 1
                                                   any setting, behind --

Every sampled box has a gradient of its log-probability (mean over its tokens, as in the update); a
reward and a baseline make one of each image out of them, sum of advantage times gradient over the
number of samples. Of images drawn alike the gradient has a mean, which is the signal, and a scatter
around it. Per estimator: the images after whose average both are equally long, and the cosine of
its mean with that of true IoU as reward, and with that of small boxes as reward. Only products of
different images are used, so that noise does not pass for length. Brackets: 95 % intervals over
images. Few samples and few views are the first ones of all. `robust` is the default as it was
measured, with greedy views (`robust, before` of learning.py). Left out: the KL term (no gradient
where policy and reference are one), Adam's scaling, and everything after the first update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import _checkout
import _measure as measure
import numpy as np
import torch
from learning import BEFORE, SPLIT_SEED, of_scenes, parted
from torch import Tensor

from vise_fast.config import schema as configuration
from vise_fast.config.schema import Config, RewardConfig
from vise_fast.engine.fast import FastEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method import loss, rewards
from vise_fast.method.evidence import Evidence
from vise_fast.method.experience import Played, play_batch
from vise_fast.method.learner import Learner
from vise_fast.model import load as model

SAMPLES = 16
VIEWS = 8
RESAMPLES = 1000
RESULT = _checkout.ROOT / "bench" / "results" / "gradient_noise.json"


@dataclass(frozen=True)
class Estimator:
    """A way to make a gradient of an image's samples: words that change the reward, how many of the
    samples and views count, and the baseline.
    """

    changes: dict[str, object]
    samples: int = 8
    views: int = 4
    advantage: loss.AdvantageKind = "rloo"


ORACLE = {"name": "oracle", "w_area": 0.0}
GROUP = {"unreadable": "group"}
PIECES = {
    "R_geo alone": {"w_geo": 1.0, "w_sem": 0.0, "w_area": 0.0},
    "R_sem alone": {"w_geo": 0.0, "w_sem": 1.0, "w_area": 0.0},
    "area term alone": {"name": "area_only", "w_area": 1.0},
    "random": {"name": "random"},
}


def estimators() -> dict[str, Estimator]:
    """Those of the page, by name; the oracle's and the default's, and the pieces."""
    made = {}
    for name, told in (("oracle", ORACLE), ("robust", {})):
        made[name] = Estimator(told)
        made[f"{name}, grpo"] = Estimator(told, advantage="grpo")
        calm = told | GROUP
        made[f"{name}, unreadable by group"] = Estimator(calm)
        made[f"{name}, by group, grpo"] = Estimator(calm, advantage="grpo")
        made[f"{name}, by group, one mean for all"] = Estimator(calm, advantage="ema")
        for count in (2, 4, 16):
            made[f"{name}, by group, G {count}"] = Estimator(calm, samples=count)
    for count in (1, 2, 8):
        made[f"robust, by group, K {count}"] = Estimator(GROUP, views=count)
    for weight in (0.6, 0.5, 0.3, 0.0):
        made[f"robust, by group, w_area {weight}"] = Estimator(GROUP | {"w_area": weight})
    return made | {name: Estimator(told | GROUP) for name, told in PIECES.items()}


ESTIMATORS = estimators()
REFERENCE = "oracle, by group, G 16"
GROWTH = "area term alone"


class Seen(NamedTuple):
    """A batch of images: their evidence and every sample's gradient (images * G, P)."""

    evidence: Evidence
    gradient: Tensor


def sample_gradients(learner: Learner, played: Played, samples: int) -> Tensor:
    """(images * G, P): the gradient of each sample's mean log-probability; an answer's own forward
    and backward pass together with its image's others.
    """
    named = learner.parameters.items()
    parameters = [value for name, value in named if "lora_B" in name]  # A has none while B is 0
    rows = []
    for image in range(len(played.images)):
        chosen = list(range(image * samples, (image + 1) * samples))
        scores = learner.scorer.score(played, chosen)
        means = loss.token_mean(scores.table(scores.logprob), scores.mask)
        for n, value in enumerate(means):
            keep = n + 1 < len(means)
            gradients = torch.autograd.grad(value, parameters, retain_graph=keep)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        played.boxes.asked = None  # its graph is spent
    return torch.stack(rows)


def first(evidence: Evidence, samples: int, views: int) -> Evidence:
    """The evidence of the first samples of every group and their first views."""
    rows = torch.arange(len(evidence.box_1000)).view(-1, evidence.group_size)[:, :samples].flatten()
    found = {
        name: value[rows] for name, value in vars(evidence).items() if isinstance(value, Tensor)
    }
    for name in ("view_box_1000", "view_readable", "view_usable", "matrix_px"):
        found[name] = found[name][:, :views]
    return replace(evidence, group_size=samples, **found)


def image_gradients(way: Estimator, seen: Seen, config: RewardConfig, step: int) -> Tensor:
    """(images, P) of one batch: what the update would take of each image, without the KL."""
    evidence = first(seen.evidence, way.samples, way.views)
    told = config.model_copy(update=way.changes)
    scores = rewards.score(evidence, told, np.random.default_rng(step))
    advantage, _ = loss.advantages(scores.reward, scores.carries, way.samples, way.advantage)
    images = len(advantage) // way.samples
    gradient = seen.gradient.view(images, -1, seen.gradient.shape[1])[:, : way.samples]
    weights = advantage.view(images, 1, way.samples).to(gradient) / way.samples
    return (weights @ gradient)[:, 0]


def collect(config: Config, scenes: int) -> dict[str, Tensor]:
    """{estimator: (scenes, P)} of the untrained policy."""
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    learner = Learner(policy, engine, config)
    source = Scenes(config)
    size = config.train.batch
    found: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    for step in range(-(-scenes // size)):
        (played,) = play_batch(engine, source.batch(step, size), config, step, source.truth)
        gradient = sample_gradients(learner, played, config.rollout.samples)
        seen = Seen(played.evidence, gradient)
        for name, way in ESTIMATORS.items():
            found[name].append(image_gradients(way, seen, config.reward, step))
    return {name: torch.cat(parts) for name, parts in found.items()}


class Products(NamedTuple):
    """Inner products (images, images) of an estimator's gradients with themselves, with another's,
    and of the other's with themselves.
    """

    own: np.ndarray
    mixed: np.ndarray
    other: np.ndarray

    @classmethod
    def of(cls, own: Tensor, other: Tensor) -> Products:
        """From gradients (images, P)."""
        pairs = (own, own), (own, other), (other, other)
        return cls(*((a.double() @ b.double().T).numpy() for a, b in pairs))


def _apart(products: np.ndarray, weights: np.ndarray) -> float:
    """Mean product of two different images; weights (images,): how often each was drawn."""
    same = float(weights**2 @ np.diag(products))
    pairs = float(weights.sum() ** 2 - weights @ weights)
    return (float(weights @ products @ weights) - same) / max(pairs, 1)


def needed(products: Products, weights: np.ndarray) -> float:
    """Images after which mean and scatter are equally long, of images (images,) drawn so often;
    infinite where no mean is seen.
    """
    signal = _apart(products.own, weights)
    length = float(weights @ np.diag(products.own) / weights.sum())
    return (length - signal) / signal if signal > 0 else float("inf")


def cosine(products: Products, weights: np.ndarray) -> float:
    """Of both means; NaN where either is not seen."""
    lengths = _apart(products.own, weights) * _apart(products.other, weights)
    seen = _apart(products.own, weights) > 0 and lengths > 0
    return _apart(products.mixed, weights) / lengths**0.5 if seen else float("nan")


def estimate(
    figure: Callable[[Products, np.ndarray], float], products: Products
) -> list[float | None]:
    """A figure and the ends of its 95 % interval over images; None: no mean is seen."""
    images = len(products.own)
    rng = np.random.default_rng(0)
    chance = np.full(images, 1 / images)
    drawn = [figure(products, rng.multinomial(images, chance)) for _ in range(RESAMPLES)]
    ends = np.quantile(drawn, (0.025, 0.975), method="nearest")
    value = figure(products, np.ones(images))
    return [float(x) if np.isfinite(x) else None for x in (value, *ends)]


def estimates(scenes: int, extra: list[str]) -> dict:
    """Every estimator's."""
    torch.set_num_threads(1)
    words = ["--train.seed", str(SPLIT_SEED["validation"]), "--train.share_forward", "false"]
    words += BEFORE.split()
    words += ["--rollout.samples", str(SAMPLES), "--rollout.views", str(VIEWS), *extra]
    found = collect(configuration.load(None, words), scenes)
    rows = {}
    for name, gradients in found.items():
        beside = Products.of(gradients, found[REFERENCE])
        rows[name] = {
            "images": estimate(needed, beside),
            "cosine": estimate(cosine, beside),
            "shrinks": estimate(cosine, Products.of(gradients, found[GROWTH])),
        }
    return {"bench": "gradient_noise", "scenes": scenes, "extra": extra, "estimators": rows}


def main() -> None:
    """Measure and tell; the last line is the JSON."""
    own, extra = parted(sys.argv[1:])
    parser = of_scenes(__doc__)
    parser.add_argument("--write", action="store_true", help="bench/results/gradient_noise.json")
    args = parser.parse_args(own)
    if args.smoke:
        args.scenes = 2
        extra = ["--train.batch", "2"]
    document = estimates(args.scenes, extra)
    print("| estimator | images until signal = noise | cosine with the oracle | with shrinking |")
    print("|---|---|---|---|")
    for name, row in document["estimators"].items():
        cells = _cell(row["images"], 0), _cell(row["cosine"], 2), _cell(row["shrinks"], 2)
        print(f"| {name} | {' | '.join(cells)} |")
    machine = {"machine": measure.machine(torch.device("cpu"))}
    measure.finish(document | machine, RESULT if args.write else None)


def _cell(value: list[float | None], digits: int) -> str:
    middle, low, high = ("none" if x is None else f"{x:.{digits}f}" for x in value)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
