"""What one step consists of, made from the configuration: who asks, boxes and judges, how many
questions of each kind, which ghosts a box gets, what is kept for the update.

Written once, read by the step itself (experience.py, learner.py), by its rehearsal on shapes
(estimate/rehearsal.py), by the closed form of its FLOPs (profile/flops.py) and by the benches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from vise_fast.config.schema import Config

WITHOUT_GHOSTS = ("oracle", "random", "area_only")
"""Rewards that read no verdict about ghosts: none is asked for."""


class GhostKind(NamedTuple):
    """One of the ghosts a box gets. `name` is the evidence's field; `control` numbers those that
    hide a box of the same size elsewhere.
    """

    name: str
    region: Literal["inside", "outside"] = "inside"
    control: int | None = None


GONE = GhostKind("gone")
KEEP = GhostKind("keep", region="outside")


@dataclass(frozen=True)
class Lengths:
    """Tokens of each piece of a conversation: head and tail around the image, the questions, the
    answers. The defaults are those of the pinned number of FLOPs (profile/minimal.py).
    """

    head: int = 4
    tail: int = 1
    ask: int = 80
    ground: int = 145
    verify: int = 80
    query: int = 14
    box: int = 22


@dataclass(frozen=True)
class StepPlan:
    """One step, per image. The defaults are the paper's."""

    samples: int = 1
    """G: boxes sampled per image"""
    views: int = 1
    """K: transformed views per image"""
    policy_asks: bool = True
    policy_boxes_views: bool = True
    policy_judges: bool = True
    """adapters on for the query, for the boxes in the views, for the verdicts"""
    one_batch: bool = True
    """samples and views' boxes come from one player, drawn alike: they are sampled together"""
    names_again: bool = False
    """whoever asks names what the boxes of a group hold, too"""
    kinds: tuple[GhostKind, ...] = (GONE,)
    """ghosts that the reward reads, per box"""
    judges_ghosts: bool = True
    trains_views: bool = False
    """gradient on the views' boxes as well"""
    shares_forward: bool = False
    """the update goes on from the rollout's forward pass over prefix and question"""
    keeps_reference: bool = False
    """the reference judge's prefixes serve the update's reference scores"""

    @classmethod
    def of(cls, config: Config, can_share: bool = True) -> StepPlan:
        """The step of a configuration. can_share: the engine's forward pass may serve the update
        (it keeps keys and values, and gains by it).
        """
        rollout = config.rollout
        policy_boxes_views = rollout.regrounder == "policy"
        alike = rollout.view_temperature == rollout.temperature
        reads_ghosts = config.reward.w_sem > 0 and config.reward.name not in WITHOUT_GHOSTS
        return cls(
            samples=rollout.samples,
            views=rollout.views,
            policy_asks=rollout.asker == "policy",
            policy_boxes_views=policy_boxes_views,
            policy_judges=config.reward.judge == "policy",
            one_batch=policy_boxes_views and alike,
            names_again=config.reward.unique,
            kinds=_kinds(config),
            judges_ghosts=reads_ghosts,
            trains_views=config.update.views_too,
            shares_forward=can_share and _shares_forward(config),
            keeps_reference=config.reward.judge == "reference" and _whole(config),
        )

    @property
    def ghosts(self) -> int:
        """Ghosts judged per image, when every box differs from every other."""
        return len(self.kinds) * self.samples if self.judges_ghosts else 0

    @property
    def boxes(self) -> int:
        """Boxes sampled per image, on it and on its views."""
        return self.samples + self.views

    @property
    def trained(self) -> int:
        """Images (it and its views) per image whose boxes are part of the update."""
        return 1 + self.views * self.trains_views


def _kinds(config: Config) -> tuple[GhostKind, ...]:
    reward = config.reward
    kinds = [GONE]
    if reward.sem == "contrast":
        kinds += [GhostKind(f"control{c}", control=c) for c in range(reward.controls)]
    if reward.sufficiency:
        kinds.append(KEEP)
    return tuple(kinds)


def _whole(config: Config) -> bool:
    """The batch is played at once. One that had to be cut into slices has no room for the prefixes
    of all: the update computes them again.
    """
    return config.train.micro_batch in (0, config.train.batch)


def _shares_forward(config: Config) -> bool:
    """Not where memory is short: the activations of prefixes and questions live until the update,
    those of a batch in slices all at once.
    """
    wanted = config.train.share_forward is not False and not config.train.checkpointing
    return wanted and _whole(config) and config.reward.preset != "as_released"
