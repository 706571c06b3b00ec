"""One step with shapes only: the real code of a step (method/) run on the meta device. No weights,
no GPU, seconds.

Every live byte is counted as in a real step (live_bytes.py), with answers as long as the limits
allow: the most a step can need. Left out: what lies below torch (allocator rounding, workspaces of
libraries, CUDA context).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.choose import graphs_of
from vise_fast.engine.graphed import decoder_bytes
from vise_fast.estimate.live_bytes import Live
from vise_fast.estimate.meta_generic import MetaGenericEngine, MetaModules, kept_by_tower
from vise_fast.estimate.meta_model import (
    META,
    MetaEngine,
    MetaLive,
    MetaOptimizer,
    NoScores,
    meta_policy,
    runs_fast,
)
from vise_fast.estimate.stages import Stages
from vise_fast.images.image import Image
from vise_fast.method.experience import Draws, play
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import Lengths, StepPlan
from vise_fast.model.load import Policy
from vise_fast.model.stock_modules import StockModules

Phases = dict[str, dict[str, int]]
"""Bytes alive at the peak of each phase, by component."""

STEP = 1
ANYWHERE = (100.0, 100.0, 500.0, 500.0)
"""A true box, for the oracle."""
USUAL = Lengths()


@dataclass
class Rehearsed:
    """What a step needs, by phase and component."""

    phases: Phases

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.at_peak.values())

    @property
    def at_peak(self) -> dict[str, int]:
        """Components of the phase that needs most."""
        return self.phases[self.busiest]

    @property
    def busiest(self) -> str:
        """The phase of that moment."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


@dataclass(frozen=True)
class Case:
    """What is rehearsed, beside the model: `sizes` (height, width) in pixels, one per image of the
    batch; `device`: the type it would run on.
    """

    config: Config
    sizes: list[tuple[int, int]]
    dtype: torch.dtype
    lengths: Lengths
    device: str


class Counted(NamedTuple):
    """A step of one model, and the bytes of one vision block."""

    phases: Phases
    block: int


def rehearse(
    config: Config,
    model_config: Any,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    lengths: Lengths = USUAL,
    device: str = "cuda",
) -> Rehearsed:
    """One step on images of these (height, width) in pixels, one entry per image of the batch, as
    it would go on this type of device.
    """
    return rehearsed(Case(config, sizes, dtype, lengths, device), model_config)


def rehearsed(case: Case, model_config: Any) -> Rehearsed:
    """`rehearse`, of a case.

    Every layer needs what its neighbour needs, so two shallow models are rehearsed and the line
    through them drawn on to the full depth. In the shallowest a phase may need most at another
    moment than in deep ones.
    """
    if not runs_fast(case.config, model_config):
        return _rehearse_generic(case, model_config)
    depth = model_config.text_config.num_hidden_layers
    shallow = len(model_config.vision_config.deepstack_visual_indexes) + 3
    if depth <= shallow + 1:
        return Rehearsed(counted(case, model_config).phases)
    near = counted(case, _shallow(model_config, shallow))
    far = counted(case, _shallow(model_config, shallow + 1))
    phases = _drawn_on(near.phases, far.phases, depth - shallow)
    for components in phases.values():
        components["weights"] += near.block * (model_config.vision_config.depth - shallow)
    return Rehearsed(phases)


def _rehearse_generic(case: Case, model_config: Any) -> Rehearsed:
    """The same through the stock decoder: two depths that differ by one round of its kinds of
    layers. All blocks of the tower are there in both: none is run.
    """
    text = model_config.text_config
    depth = text.num_hidden_layers
    period = _period(text)
    if depth <= 3 * period:
        return Rehearsed(counted(case, model_config).phases)
    near = counted(case, _cut(model_config, period))
    far = counted(case, _cut(model_config, 2 * period))
    # the last round may be cut short: Gemma-3-4B has 34 layers in rounds of six
    return Rehearsed(_drawn_on(near.phases, far.phases, (depth - period) / period))


def _period(text: Any) -> int:
    """Layers after which their kinds come again."""
    crossing = getattr(text, "cross_attention_layers", None)
    if crossing and len(crossing) > 1:
        return crossing[1] - crossing[0]
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    first = kinds.index("full_attention") if "full_attention" in kinds else 0
    return first + 1 if len(set(kinds)) > 1 else 2


def _cut(model_config: Any, layers: int) -> Any:
    """The same model with fewer decoder layers."""
    small = copy.deepcopy(model_config)
    text = small.text_config
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if getattr(text, "cross_attention_layers", None):
        text.cross_attention_layers = [n for n in text.cross_attention_layers if n < layers]
    return small


def _drawn_on(near: Phases, far: Phases, layers: float) -> Phases:
    """The line through two models that differ by a layer (or a round), `layers` beyond the first;
    whole bytes, rounded up.
    """
    phases: Phases = {}
    for phase, first in near.items():
        second = far[phase]
        phases[phase] = {}
        for name in first | second:
            start = first.get(name, 0)
            phases[phase][name] = math.ceil(start + layers * (second.get(name, 0) - start))
    return phases


def _shallow(model_config: Any, layers: int) -> Any:
    """The same model with fewer layers; the vision tower keeps as many taps, and blocks to tap (no
    pass stores more for having more).
    """
    small = copy.deepcopy(model_config)
    taps = len(small.vision_config.deepstack_visual_indexes)
    small.text_config.num_hidden_layers = layers
    small.vision_config.depth = taps + 3
    small.vision_config.deepstack_visual_indexes = list(range(taps))
    return small


def counted(case: Case, model_config: Any) -> Counted:
    """A step of this very model.

    The largest slice of the batch is played, as if last: what the other slices keep for the update
    is as large.
    """
    config = case.config.model_copy(deep=True)
    config.train.attention_every = 0  # its shares would have to be read home
    config.reward.settled = 0.0  # at most: as if every ghost hid something and told of no other
    config.reward.implied = 0.0
    size = config.train.micro_batch or len(case.sizes)
    largest = sorted(case.sizes, key=lambda s: -s[0] * s[1])[:size]
    others = -(-len(case.sizes) // size) - 1
    pixels = [torch.empty(*side, 3, dtype=torch.uint8, device=META) for side in largest]
    with MetaLive() as live, NoScores():
        with live.labelled("weights"):
            policy = meta_policy(config, model_config, case.lengths, case.dtype, case.device)
        _sort_lora(live, policy)
        if case.device != "cpu":  # images come from the host
            live.adopt(pixels, "images and vision features")
        _keep(live, others * _kept_bytes(config, policy, largest))
        peaks = _step(config, policy, pixels, live, device=case.device, accumulates=others > 0)
    if isinstance(policy.backbone, StockModules):
        return Counted(peaks, 0)
    block = policy.backbone.vision.visual.blocks[0]
    return Counted(peaks, sum(p.numel() * p.dtype.itemsize for p in block.parameters()))


def _keep(live: Live, size: int) -> None:
    """So many bytes of the slices before this one."""
    held = torch.empty(size, dtype=torch.uint8, device=META)
    live.hold([held], "kept of other slices")


def _sort_lora(live: Live, policy: Policy) -> None:
    """The adapters' bytes under their own names."""
    live.relabel(policy.parameters().values(), "LoRA masters")
    if isinstance(policy.backbone, StockModules):
        return
    for linear in policy.backbone.fused():
        if linear.cached is not None:
            live.relabel(linear.cached.factors(), "LoRA in compute dtype")


def _kept_bytes(config: Config, policy: Policy, sizes: list[tuple[int, int]]) -> int:
    """Vision features that a slice keeps for the update."""
    backbone = policy.backbone
    if isinstance(backbone, MetaModules):
        return kept_by_tower(backbone, sizes) * StepPlan.of(config).trained
    patches = sum(height * width for height, width in sizes) // backbone.patch**2
    trained = StepPlan.of(config).trained
    vectors = patches * trained * len(backbone.mergers)
    return vectors * backbone.vision.width * backbone.dtype.itemsize


def _hold_decoders(live: Live, policy: Policy, config: Config, images: int) -> None:
    """The buffers of graphed decoding, which stay from one step to the next."""
    plan = StepPlan.of(config)
    rollout = config.rollout
    boxes = [plan.boxes] if plan.one_batch else [plan.samples, plan.views]
    # an answer drawn otherwise is decoded by another
    asks = 1 + plan.names_again
    size = asks * decoder_bytes(policy.backbone, images, rollout.query_tokens)
    for rows in boxes:
        size += decoder_bytes(policy.backbone, rows * images, rollout.box_tokens)
    held = torch.empty(size, dtype=torch.uint8, device=META)
    live.hold([held], "graphed decoders")


def _engine(policy: Policy, stages: Stages, device: str) -> Any:
    """The run's engine on shapes."""
    if isinstance(policy.backbone, MetaModules):
        return MetaGenericEngine(policy.backbone, policy.tokens, stages)
    return MetaEngine(policy.backbone, policy.tokens, stages, device)


def _step(
    config: Config,
    policy: Policy,
    pixels: list[Tensor],
    live: Live,
    *,
    device: str,
    accumulates: bool,
) -> Phases:
    """The step itself: components at the peak of each of its stages."""
    stages = Stages(live)
    engine = _engine(policy, stages, device)
    name = config.optim.name
    paged = name.startswith("paged") and device == "cuda"
    masters = list(policy.parameters().values())
    optimizer = MetaOptimizer(masters, name, live, paged=paged, accumulates=accumulates)
    learner = Learner(policy, engine, config, optimizer)
    if graphs_of(config, device) and isinstance(engine, MetaEngine):
        _hold_decoders(live, policy, config, len(pixels))
    images = [Image(image, f"image {i}", i) for i, image in enumerate(pixels)]
    played = play(engine, images, config, Draws(0, STEP), lambda image, query: ANYWHERE)
    learner.learn([played], STEP)
    return stages.peaks
