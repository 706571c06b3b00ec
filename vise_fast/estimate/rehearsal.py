"""One step with shapes only: the real code of a step (method/) run on the meta device. No weights,
no GPU, seconds.

Every live byte is counted as in a real step (live_bytes.py), with answers as long as the limits
allow: the most a step can need. Left out: what lies below torch (allocator rounding, workspaces of
libraries, CUDA context).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.estimate.live_bytes import Live
from vise_fast.estimate.meta_model import (
    META,
    MetaEngine,
    MetaLive,
    MetaOptimizer,
    NoScores,
    meta_policy,
)
from vise_fast.estimate.stages import Stages
from vise_fast.images.image import Image
from vise_fast.method.experience import Draws, play
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import Lengths, StepPlan
from vise_fast.model.load import Policy

STEP = 1
ANYWHERE = (100.0, 100.0, 500.0, 500.0)
"""A true box, for the oracle."""


@dataclass
class Rehearsed:
    """Bytes alive at the peak of each phase, by component."""

    phases: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    @property
    def at_peak(self) -> dict[str, int]:
        """Components of the phase that needs most."""
        return self.phases[self.busiest]

    @property
    def busiest(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


def rehearse(
    config: Config,
    model_config,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    lengths: Lengths = Lengths(),
    device: str = "cuda",
) -> Rehearsed:
    """One step on images of these (height, width) in pixels, one entry per image of the batch, as
    it would go on this type of device.

    Every layer needs what its neighbour needs, so two shallow models are rehearsed and the line
    through them drawn on to the full depth. In the shallowest a phase may need most at another
    moment than in deep ones.
    """
    depth = model_config.text_config.num_hidden_layers
    shallow = len(model_config.vision_config.deepstack_visual_indexes) + 3
    if depth <= shallow + 1:
        return Rehearsed(_rehearse(config, model_config, sizes, dtype, lengths, device)[0])
    (near, block), (far, _) = (
        _rehearse(config, _shallow(model_config, layers), sizes, dtype, lengths, device)
        for layers in (shallow, shallow + 1)
    )
    missing = block * (model_config.vision_config.depth - shallow)
    phases = {}
    for phase, first in near.items():
        second = far[phase]
        line = {
            name: first.get(name, 0)
            + (depth - shallow) * (second.get(name, 0) - first.get(name, 0))
            for name in first | second
        }
        phases[phase] = line | {"weights": line["weights"] + missing}
    return Rehearsed(phases)


def _shallow(model_config, layers: int):
    """The same model with fewer layers; the vision tower keeps as many taps, and blocks to tap (no
    pass stores more for having more).
    """
    small = copy.deepcopy(model_config)
    taps = len(small.vision_config.deepstack_visual_indexes)
    small.text_config.num_hidden_layers = layers
    small.vision_config.depth = taps + 3
    small.vision_config.deepstack_visual_indexes = list(range(taps))
    return small


def _rehearse(
    config: Config,
    model_config,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    lengths: Lengths,
    device: str,
) -> tuple[dict[str, dict[str, int]], int]:
    """(components at the peak of each phase, bytes of one vision block).

    The largest slice of the batch is played, as if last: what the other slices keep for the update
    is as large.
    """
    config = config.model_copy(deep=True)
    config.train.attention_every = 0  # its shares would have to be read home
    size = config.train.micro_batch or len(sizes)
    largest = sorted(sizes, key=lambda s: -s[0] * s[1])[:size]
    others = -(-len(sizes) // size) - 1
    pixels = [torch.empty(*side, 3, dtype=torch.uint8, device=META) for side in largest]
    with MetaLive() as live, NoScores():
        with live.labelled("weights"):
            policy = meta_policy(config, model_config, lengths, dtype, device)
        _sort_lora(live, policy)
        if device != "cpu":  # images come from the host
            live.adopt(pixels, "images and vision features")
        kept = others * _kept_bytes(config, policy, largest)
        held = torch.empty(kept, dtype=torch.uint8, device=META)
        live.hold([held], "kept of other slices")
        peaks = _step(config, policy, pixels, live, device=device, accumulates=others > 0)
    blocks = policy.backbone.vision.visual.blocks
    return peaks, sum(p.numel() * p.dtype.itemsize for p in blocks[0].parameters())


def _sort_lora(live: Live, policy: Policy) -> None:
    """The adapters' bytes under their own names."""
    live.relabel(list(policy.parameters().values()), "LoRA masters")
    packs = [linear.cached for linear in policy.backbone.fused() if linear.cached]
    live.relabel([t for pack in packs for t in pack.factors()], "LoRA in compute dtype")


def _kept_bytes(config: Config, policy: Policy, sizes: list[tuple[int, int]]) -> int:
    """Vision features that a slice keeps for the update."""
    backbone = policy.backbone
    patches = sum(height * width for height, width in sizes) // backbone.patch**2
    trained = StepPlan.of(config).trained
    vectors = patches * trained * len(backbone.mergers)
    return vectors * backbone.vision.width * backbone.dtype.itemsize


def _step(
    config: Config,
    policy: Policy,
    pixels: list[Tensor],
    live: Live,
    *,
    device: str,
    accumulates: bool,
) -> dict[str, dict[str, int]]:
    """The step itself: components at the peak of each of its stages."""
    stages = Stages(live)
    engine = MetaEngine(policy.backbone, policy.tokens, stages, device)  # type: ignore[arg-type]
    name = config.optim.name
    optimizer = MetaOptimizer(
        list(policy.parameters().values()),
        name,
        live,
        paged=name.startswith("paged") and device == "cuda",
        accumulates=accumulates,
    )
    learner = Learner(policy, engine, config, optimizer)
    images = [Image(image, f"image {i}", i) for i, image in enumerate(pixels)]
    played = play(engine, images, config, Draws(0, STEP), lambda image, query: ANYWHERE)
    learner.learn([played], STEP)
    return stages.peaks
