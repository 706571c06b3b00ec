"""One step with shapes only, as a GPU would run it: the real code of a step, counted
(profile/launches.py). No weights, no GPU, under a minute.

Answers are as long as the limits allow, can be read, and differ from each other. Graphed decoding
is counted as it would replay: one launch a step, its kernels apart. Left out: the capture of
graphs, compiling, the first step's making of moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vise_fast.config.schema import Config
from vise_fast.engine.choose import graphs_of
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import Decoder, GraphedEngine, Shape
from vise_fast.engine.rollout import Prefixes, Prompts, Rollout
from vise_fast.estimate.meta_model import META, meta_policy
from vise_fast.images.image import Image
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import Lengths
from vise_fast.model.load import Policy
from vise_fast.model.tree import Features
from vise_fast.profile.launches import Launches, list_launches
from vise_fast.profile.minimal import PINNED

STEP = 1
ANYWHERE = (100.0, 100.0, 500.0, 500.0)
"""A true box, for the oracle."""


def count_step(
    config: Config,
    model_config: Any,
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.bfloat16,
    lengths: Lengths = PINNED,
) -> Launches:
    """A step on images of these (height, width) in pixels, as a GPU runs it; what is made once is
    there: its first slice goes before it, uncounted.
    """
    config = config.model_copy(deep=True)
    config.train.attention_every = 0  # its shares would have to be read home
    config.reward.settled = 0.0  # at most: as if every ghost hid something and told of no other
    config.reward.implied = 0.0
    with Launches():
        policy = meta_policy(config, model_config, lengths, dtype, "cuda")
    pixels = [torch.empty(*side, 3, dtype=torch.uint8, device=META) for side in sizes]
    images = [Image(image, f"image {i}", i) for i, image in enumerate(pixels)]
    for played in (images[: config.train.micro_batch or None], images):
        seen = Launches()
        engine = _engine(policy, config, seen)
        learner = _Learner(policy, engine, config, _Optimizer(policy, config, seen))
        learner.seen = seen
        with seen:
            slices = play_batch(engine, played, config, STEP, lambda image, query: ANYWHERE)
            learner.learn(slices, STEP)
    return seen


class _Counted:
    """An engine whose calls are phases, and whose reads home are counted and answered."""

    seen: Launches

    def home(self, values: Tensor) -> Tensor:
        """Numbers that can be probabilities, no two alike; of a sheet of answers, all at the
        limit.
        """
        self.seen.read()
        if values.dtype == torch.int64:
            return torch.full(values.shape, values.shape[1] - 1)
        return torch.linspace(1, 0.9, values.numel(), dtype=values.dtype).view(values.shape)

    def prefill(self, features: Features, adapters: bool, *, graph: bool = False) -> Prefixes:
        """As a phase."""
        with self.seen.clock.phase("prefix"):
            return super().prefill(features, adapters, graph=graph)  # type: ignore[misc]

    def prompt(self, prefixes: Prefixes, owner: list[int], rows: list[list[int]]) -> Prompts:
        """As a phase."""
        with self.seen.clock.phase("question"):
            return super().prompt(prefixes, owner, rows)  # type: ignore[misc]

    def generate(self, *args: Any, **options: Any) -> Rollout:
        """As a phase."""
        with self.seen.clock.phase("decode"):
            return super().generate(*args, **options)  # type: ignore[misc]

    def verdict_logits(self, features: Features, rows: list[list[int]], adapters: bool) -> Tensor:
        """As a phase."""
        with self.seen.clock.phase("verdicts"):
            return super().verdict_logits(features, rows, adapters)  # type: ignore[misc]

    def score(self, *args: Any, **options: Any) -> Tensor:
        """As a phase."""
        with self.seen.clock.phase("scores" if args[2] else "reference scores"):
            return super().score(*args, **options)  # type: ignore[misc]


class _Fast(_Counted, FastEngine):
    pass


class _Graphed(_Counted, GraphedEngine):
    def _made(self, shape: Shape) -> Decoder:
        decoder = _Replayed(self.backbone, self.tokens, self.banned, shape)
        decoder.seen = self.seen
        return decoder


class _Replayed(Decoder):
    """A decoder whose step is a replay."""

    seen: Launches

    def replay(self) -> None:
        """One more token of every row: one launch."""
        with self.seen.replay():
            self._advance()


def _engine(policy: Policy, config: Config, seen: Launches) -> FastEngine:
    """The engine that the configuration would open on a GPU."""
    kind = _Graphed if graphs_of(config, "cuda") else _Fast
    engine = kind(policy.backbone, policy.tokens)
    engine.seen = seen
    engine.clock = seen.clock
    return engine


class _Learner(Learner):
    seen: Launches

    def _clip(self) -> Tensor:
        """What clipping by lists of tensors launches on a GPU (torch's does, there): norms, their
        norm, the factor, the scaling.
        """
        count = len(self.parameters)
        size = sum(p.numel() * p.dtype.itemsize for p in self.parameters.values())
        self.seen.launch("norms", 2 * list_launches(count, 1), 0, size)
        self.seen.launch("norm of norms", -(-count // 128) + 5)
        self.seen.launch("scaling", list_launches(count, 1), 0, 2 * size)
        return torch.empty((), device=META)


class _Optimizer:
    """What a fused AdamW launches: its kernel over lists of tensors, and the steps' counters."""

    def __init__(self, policy: Policy, config: Config, seen: Launches) -> None:
        self.parameters: list[nn.Parameter] = list(policy.parameters().values())
        self.config = config
        self.seen = seen
        self.param_groups: list[dict] = []
        self.state = dict.fromkeys(self.parameters, True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients are gone."""
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        """Counts the launches."""
        count = len(self.parameters)
        if self.config.optim.name != "adamw":
            self.seen.launch("8-bit AdamW", count)
            return
        moved = sum(7 * p.numel() * p.dtype.itemsize for p in self.parameters)
        self.seen.launch("fused AdamW", list_launches(count, 4), 0, moved)
        self.seen.launch("steps", list_launches(count, 1))
