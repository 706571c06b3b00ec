"""Named rewards: pure functions of boxes, probabilities and masks; one row per sampled box, no
model, no image.

Rows are in group-major order: the G samples of image 0, then of image 1, ...; K views and C
controls per row. All box and probability tensors are on one device (the trainer gathers them on the
CPU in one copy). Left out: who asks and who judges (roles.py), what a reward does to the weights
(loss.py).

Rules that are decided here:
- a view whose answer cannot be read, or has no area, scores 0 for that view; the sampled box is not
  excused by it;
- a readable box none of whose views is usable gets the mean R_geo of its group's measured boxes, so
  that its other terms still count;
  with no measured box in the group the row carries no gradient (only when R_geo has weight);
- a box without area scores R_geo = R_sem = 0 and is charged the area term in full, so it never
  beats a box that was placed;
- an unreadable answer scores 0 under the plain paper reward, else -1 - w_area, below every readable
  answer, and carries gradient; with `unreadable: group` BELOW under the worst readable one of its
  group, which is below those it is compared with under every baseline but `ema`;
- a group whose query could not be read, or with p(x) below the gate, carries no gradient; both are
  counted;
- with `unique` the same holds of a group whose words do not come back (groups/named_again.py).

A further reward: `@register("mine")` over `def mine(evidence, parts, config, rng) -> (reward (N,),
known (N,) bool)` in the file that `reward.plugin` names. Run the tests: `pytest
tests/method/test_rewards.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vise_fast.config.schema import RewardConfig
from vise_fast.images import geometry
from vise_fast.method import as_released, invented
from vise_fast.method.evidence import VISIBLE, Evidence, beaf_cells, r_geo
from vise_fast.system import plugin
from vise_fast.system.errors import ConfigError, NumericFault

LARGE_AREA = 0.8
BELOW = 0.1
"""How far under the worst of its group an unreadable answer is, `reward.unreadable: group`: about
the standard deviation of the default reward (NOISE).
"""


@dataclass(frozen=True)
class Parts:
    """The pieces that rewards are made of; (N,) float64 unless stated."""

    agreement: Tensor
    """(N, K) R_geo of each view, 0 where it cannot be judged"""
    geometric: Tensor
    measured: Tensor
    """bool: the geometric part says something about this row or its group"""
    semantic: Tensor
    size: Tensor
    """sqrt(area) in 0..1; 1 for a box without area"""
    open: Tensor
    """bool: the query could be read and passed the gate, and its words came back where they must"""


@dataclass(frozen=True)
class Scores:
    """What the trainer gets; (N,) float64 unless stated."""

    reward: Tensor
    geometric: Tensor
    semantic: Tensor
    carries: Tensor
    """bool: rows that carry gradient; the reward of the others is 0 and means nothing"""
    view_reward: Tensor
    """(N, K) for `update.views_too`: the view's own agreement and size, baseline per view"""
    view_carries: Tensor
    """(N, K) bool"""
    metrics: dict[str, float]


Reward = Callable[[Evidence, Parts, RewardConfig, np.random.Generator], tuple[Tensor, Tensor]]
_REGISTRY: dict[str, Reward] = {}


def register(name: str) -> Callable[[Reward], Reward]:
    """Decorator: make a reward known under this name. Raises ConfigError when the name is taken."""

    if not isinstance(name, str):
        raise ConfigError('register needs a name; write @register("mine") above the function')

    def add(function: Reward) -> Reward:
        if name in _REGISTRY:
            raise ConfigError(
                f"reward {name!r} is registered twice; names are unique; rename one of them"
            )
        _REGISTRY[name] = function
        return function

    return add


def load_plugin(path: str) -> None:
    """Run a python file once, for the rewards it registers; a file that fails registers none.

    Raises ConfigError, with the file's own line, when it is missing, is not python, or raises.
    """
    before = dict(_REGISTRY)
    try:
        plugin.load(path, "reward.plugin")
    except ConfigError:
        _REGISTRY.clear()
        _REGISTRY.update(before)
        raise


def resolve(config: RewardConfig) -> Reward:
    """The function that `reward.name` means, after loading `reward.plugin`.

    Raises ConfigError for an unknown name.
    """
    if config.plugin is not None:
        load_plugin(config.plugin)
    if config.name not in _REGISTRY:
        near = difflib.get_close_matches(config.name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"known: {', '.join(sorted(_REGISTRY))}"
        raise ConfigError(f"unknown reward {config.name!r}; no such name is registered; {hint}")
    return _REGISTRY[config.name]


def wants_truth(config: RewardConfig) -> bool:
    """Whether the reward may look at true boxes: the oracle does, a reward of the user's may."""
    return config.name == "oracle" or config.plugin is not None


def check(config: RewardConfig, truth: bool) -> None:
    """One call of the configured reward on invented evidence, so that what is wrong with it is
    known before anything is loaded. truth: the run's images come with true boxes.

    Raises ConfigError.
    """
    resolve(config)
    if config.name == "oracle" and not truth:
        raise ConfigError(
            "reward oracle needs true boxes, which photographs do not have; leave data.dir out "
            "(the drawn scenes have them) or choose another reward.name"
        )
    made = invented.evidence(config, truth)
    try:
        score(made, config, np.random.default_rng(0))
    except NumericFault as fault:
        raise ConfigError(f"{fault} (tried on invented evidence)") from fault
    if not invented.same(made, invented.evidence(config, truth)):
        raise ConfigError(
            f"reward {config.name!r} ({plugin.where(_REGISTRY[config.name])}) changes the evidence "
            "it is given; figures and other rewards read it too; work on copies"
        )


def ask(
    evidence: Evidence, parts: Parts, config: RewardConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """What the configured reward says: (reward (N,), known (N,) bool).

    Raises ConfigError, with the place in the user's file, where a reward of the user's fails or
    returns something else.
    """
    function = resolve(config)
    if getattr(function, "__module__", None) == __name__:
        return function(evidence, parts, config, rng)
    with plugin.blamed(f"reward {config.name!r} failed", function):
        given = function(evidence, parts, config, rng)
    complaint = _complaint(given, evidence)
    if complaint is not None:
        raise ConfigError(
            f"reward {config.name!r} ({plugin.where(function)}) {complaint}; a reward returns two "
            "tensors, (N,) numbers and (N,) bool; correct it"
        )
    reward, known = given
    return reward.detach(), known


def _complaint(given: Any, evidence: Evidence) -> str | None:
    """What is wrong with the answer of a reward; None where it is right."""
    if not isinstance(given, tuple) or len(given) != 2:
        return f"returned {_described(given)}"
    rows = evidence.readable
    for name, value in zip(("reward", "known"), given, strict=True):
        if not isinstance(value, Tensor):
            return f"returned {_described(value)} as {name}"
        if value.shape != rows.shape or value.device != rows.device:
            return f"returned {name} of shape {tuple(value.shape)} for {len(rows)} boxes"
    reward, known = given
    if reward.is_complex() or reward.dtype == torch.bool:
        return f"returned {reward.dtype} as reward"
    return None if known.dtype == torch.bool else f"returned {known.dtype} as known"


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def lowest(config: RewardConfig) -> float:
    """The reward of an unreadable answer: 0 under the plain paper reward, else strictly below every
    readable one.
    """
    return 0.0 if config.sem == "paper" and config.w_area == 0 else -1.0 - config.w_area


def agreement(evidence: Evidence, config: RewardConfig) -> Tensor:
    """R_geo of every view, (N, K): (GIoU(projected box, view's box) + 1) / 2; 0 without two
    readable boxes that have area.
    """
    e = evidence
    boxes = geometry.clean_1000(e.box_1000)[:, None]
    answers = geometry.clean_1000(e.view_box_1000)
    if config.preset == "as_released":
        value = as_released.r_geo(boxes, answers, e.matrix_px)
    else:
        expected = geometry.project_1000(
            boxes, e.matrix_px, e.height[:, None], e.width[:, None], config.projection
        )
        value = r_geo(expected, answers)
    return value * (e.placed[:, None] & e.view_readable & geometry.proper(answers))


def geometric(evidence: Evidence, agreements: Tensor) -> tuple[Tensor, Tensor]:
    """Mean agreement over the usable views; the group's mean where there is none.

    -> value (N,), measured (N,) bool.
    """
    usable = evidence.view_usable
    count = usable.sum(1)
    mean = (agreements * usable).sum(1) / count.clamp_min(1)
    placed = evidence.placed
    viewed = count > 0
    neutral, any_measured = evidence.group_mean(mean, of=placed & viewed)
    return torch.where(placed & ~viewed, neutral, mean), ~placed | viewed | any_measured


def semantic(evidence: Evidence, config: RewardConfig) -> Tensor:
    """R_sem, (N,); 0 for answers that are not boxes with area, where nothing was judged, and where
    the ghost hides so little that no more was asked (`reward.settled`).

    paper: p(x) (1 - p(ghosted)). contrast: the same minus p(x) (1 - p(control)), not below 0. Times
    p(keep) with `sufficiency`. Each p is a probability (`soft`) or its verdict at one half.
    """

    def p(values: Tensor) -> Tensor:
        return values.double() if config.soft else (values >= VISIBLE).double()

    e = evidence
    seen = p(e.seen)
    value = seen * (1 - p(e.gone))
    if config.sem == "contrast":
        elsewhere = seen[:, None] * (1 - p(_given(e.control, "control")))
        value = (value - elsewhere.mean(1)).clamp_min(0)
    if config.sufficiency:
        value = value * p(_given(e.keep, "keep"))
    return torch.where(e.has_all_verdicts, value, torch.zeros_like(value))


def _given(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"this reward needs Evidence.{name}")
    return values


def _size(boxes_1000: Tensor) -> Tensor:
    """sqrt(area) for the area term; a box without area is charged like the full image."""
    return torch.where(geometry.proper(boxes_1000), geometry.area_share(boxes_1000).sqrt(), 1.0)


def dissect(evidence: Evidence, config: RewardConfig) -> Parts:
    """Evidence -> the pieces that every reward may use."""
    agreements = agreement(evidence, config)
    value, measured = geometric(evidence, agreements)
    seen, _ = evidence.group_mean(evidence.seen.double().nan_to_num(), of=evidence.seen.isfinite())
    is_open = evidence.query_readable & (seen >= config.gate)
    if config.unique:
        is_open = is_open & _given(evidence.named_again, "named_again")
    return Parts(
        agreement=agreements,
        geometric=value,
        measured=measured,
        semantic=semantic(evidence, config),
        size=_size(evidence.box_1000),
        open=is_open,
    )


def _unless_unreadable(
    evidence: Evidence, reward: Tensor, known: Tensor, config: RewardConfig
) -> tuple[Tensor, Tensor]:
    """An unreadable answer gets the lowest reward, and that is known."""
    floor = torch.full_like(reward, lowest(config))
    if config.unreadable == "group":
        floor = _below_group(evidence, reward, known & evidence.readable, floor)
    return torch.where(evidence.readable, reward, floor), known | ~evidence.readable


def _below_group(evidence: Evidence, reward: Tensor, of: Tensor, floor: Tensor) -> Tensor:
    """BELOW under the lowest reward of each group's chosen rows (N,) bool, spread over the group;
    the floor where none is chosen. (N,)
    """
    grouped = reward.masked_fill(~of, torch.inf).view(-1, evidence.group_size)
    worst = grouped.amin(1, keepdim=True).expand_as(grouped).reshape(-1) - BELOW
    return torch.where(worst.isfinite(), worst, floor)


@register("vise")
def vise(
    evidence: Evidence, parts: Parts, config: RewardConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """w_geo R_geo + w_sem R_sem - w_area sqrt(area)."""
    gained = config.w_geo * parts.geometric + config.w_sem * parts.semantic
    reward = gained - config.w_area * parts.size
    known = parts.measured if config.w_geo > 0 else torch.ones_like(parts.measured)
    return _unless_unreadable(evidence, reward, known, config)


@register("oracle")
def oracle(
    evidence: Evidence, parts: Parts, config: RewardConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """True IoU: what a perfect label-based reward could teach.

    Rows without a truth carry nothing.
    """
    truth = _given(evidence.truth_1000, "truth_1000")
    reward = geometry.iou(geometry.clean_1000(evidence.box_1000), geometry.clean_1000(truth))
    reward, _ = _unless_unreadable(evidence, reward, evidence.readable, config)
    return reward, geometry.proper(truth)


NOISE = 0.1
"""Standard deviation of the random reward: about that of `vise` over a batch of the embedded
model's samples, 0.095 (within a group 0.073; 96 validation scenes).
"""


@register("random")
def random(
    evidence: Evidence, parts: Parts, config: RewardConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Noise of mean 1/2, unreadable answers included: says nothing."""
    noise = torch.as_tensor(rng.normal(0.5, NOISE, len(evidence.box_1000)))
    return noise.to(evidence.box_1000.device), torch.ones_like(evidence.readable)


@register("shuffled")
def shuffled(
    evidence: Evidence, parts: Parts, config: RewardConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """`vise` permuted among all rows of the batch that carry gradient: its distribution without its
    meaning.
    """
    reward, known = vise(evidence, parts, config, rng)
    rows = (known & parts.open).nonzero()[:, 0]
    order = torch.as_tensor(rng.permutation(len(rows)), device=rows.device)
    return reward.index_put((rows,), reward[rows[order]]), known


@register("area_only")
def area_only(
    evidence: Evidence, parts: Parts, config: RewardConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """The area term alone: what shrinking every box is worth. Raises ConfigError without one."""
    if config.w_area == 0:
        raise ConfigError(
            "reward area_only with w_area 0 is constant; nothing would be learned; set "
            "reward.w_area"
        )
    known = torch.ones_like(evidence.readable)
    return _unless_unreadable(evidence, -config.w_area * parts.size, known, config)


def view_rewards(evidence: Evidence, parts: Parts, config: RewardConfig) -> tuple[Tensor, Tensor]:
    """Rewards for the views' own completions (`update.views_too`): w_geo R_geo of that view -
    w_area sqrt(its area). -> (N, K) x2.

    A view's answer carries gradient when it cannot be read (lowest reward), or when its view is
    usable and the sampled box has area; never under another reward than `vise`, whose meaning these
    numbers do not share.
    """
    reward = config.w_geo * parts.agreement - config.w_area * _size(evidence.view_box_1000)
    reward = torch.where(evidence.view_readable, reward, torch.full_like(reward, lowest(config)))
    judged = ~evidence.view_readable | (evidence.view_usable & evidence.placed[:, None])
    return reward, judged & parts.open[:, None] & (config.name == "vise")


def score(evidence: Evidence, config: RewardConfig, rng: np.random.Generator) -> Scores:
    """The configured reward of every row, which rows carry gradient, and the figures that are
    always logged.

    Raises ConfigError for an unknown reward and for one of the user's that fails, ValueError when
    evidence it needs is missing, NumericFault when it is not finite.
    """
    parts = dissect(evidence, config)
    reward, known = ask(evidence, parts, config, rng)
    carries = known & parts.open
    if not reward[carries].isfinite().all():
        raise NumericFault(
            f"reward {config.name!r} is not finite; the function returned NaN or infinity; correct "
            "it"
        )
    reward = torch.where(carries, reward.double(), 0.0)
    view_reward, view_carries = view_rewards(evidence, parts, config)
    return Scores(
        reward=reward,
        geometric=parts.geometric,
        semantic=parts.semantic,
        carries=carries,
        view_reward=view_reward,
        view_carries=view_carries,
        metrics=measure(evidence, parts, reward, carries),
    )


def _mean(values: Tensor, of: Tensor) -> float:
    """Mean over the chosen rows; 0 over none (the shares of readable rows tell)."""
    return float((values.double().nan_to_num() * of).sum() / of.sum().clamp_min(1))


def beaf(seen: Tensor, gone: Tensor, of: Tensor) -> dict[str, float]:
    """Share of each cell of the 2x2 verdict table among the chosen rows, verdicts at one half."""
    cells = beaf_cells(seen >= VISIBLE, gone >= VISIBLE)
    return {name: _mean(cell, of) for name, cell in cells.items()}


def measure(evidence: Evidence, parts: Parts, reward: Tensor, carries: Tensor) -> dict[str, float]:
    """Everything that is logged of a step's rewards, as plain floats.

    Shares are 0..1 of the rows named in the comment.
    """
    boxes = evidence.readable & evidence.query_readable
    figures = {
        "reward": _mean(reward, carries),
        "geometric": _mean(parts.geometric, boxes & parts.measured),
        "semantic": _mean(parts.semantic, boxes & parts.open),
        "size": _mean(parts.size, boxes),  # sqrt(area), as the area term takes it
        "carries": _mean(carries, torch.ones_like(carries)),  # of all rows
    }
    figures |= _readable_figures(evidence) | _box_figures(evidence)
    figures["unmeasured"] = _mean(~parts.measured, boxes)
    figures["gated"] = _mean(~parts.open, evidence.query_readable)  # of groups with a query
    if evidence.named_again is not None:
        figures["named_again"] = _mean(evidence.named_again, evidence.query_readable)  # the same
    return figures | _verdict_figures(evidence)


def _readable_figures(e: Evidence) -> dict[str, float]:
    asked = e.query_readable
    return {
        "parse_rate": _mean(e.readable, asked),  # of rows with a query
        "query_parse_rate": _mean(asked, torch.ones_like(asked)),  # of all rows
        "view_parse_rate": _mean(e.view_readable, asked[:, None].expand_as(e.view_readable)),
    }


def _box_figures(e: Evidence) -> dict[str, float]:
    boxes = e.readable & e.query_readable
    placed = e.placed & e.query_readable
    area = geometry.area_share(e.box_1000)
    views = boxes[:, None].expand_as(e.view_usable)
    return {
        "area": _mean(area, placed),  # of boxes with area
        "area_large": _mean(area > LARGE_AREA, placed),
        "zero_area": _mean(~e.placed, boxes),  # of readable boxes
        "views_dropped": _mean(~e.view_usable, views),  # of readable boxes' views
    }


def _verdict_figures(e: Evidence) -> dict[str, float]:
    boxes = e.readable & e.query_readable
    judged = e.has_verdicts
    figures = {
        "seen": _mean(e.seen, e.query_readable & e.seen.isfinite()),
        "judged": _mean(judged, boxes),  # of readable boxes; the verdicts below are of judged ones
        "gone": _mean(e.gone, judged),
    }
    asked = e.has_all_verdicts
    if e.control is not None:
        changed = (e.control >= VISIBLE) != (e.seen >= VISIBLE)[:, None]
        figures["control"] = _mean(e.control.mean(1), asked)
        figures["changed_elsewhere"] = _mean(changed.double().mean(1), asked)
    if e.keep is not None:
        figures["keep"] = _mean(e.keep, asked)
    return figures | beaf(e.seen, e.gone, judged)
