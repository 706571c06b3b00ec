"""One step with shapes only: the engine's own code run on the meta device. No weights, no GPU,
seconds.

Every live byte is counted as in a real step (live.py). Answers are as long as the limits allow,
every box is judged and differs from every other: the most a step can need. Left out: what lies
below torch (allocator rounding, workspaces of libraries, CUDA context).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText
from vise_kernels import linear_logprob_kl, sample

from vise_fast.config.schema import Config
from vise_fast.engine.fast import Engine, Features, Prefixes, Prompts, Rollout
from vise_fast.estimate.live_bytes import Live
from vise_fast.method.experience import GHOSTS_AT_ONCE, WITHOUT_GHOSTS, prefixes_of
from vise_fast.model import load as model
from vise_fast.model import quantise
from vise_fast.model.attention import Grid
from vise_fast.model.qwen3_vl import ENCODE_AT_ONCE

META = torch.device("meta")


aten = torch.ops.aten
# torch's Python rules for these cost half a millisecond a call on meta; their results are all alike
POINTWISE = {
    aten.neg.default,
    aten.exp.default,
    aten.cos.default,
    aten.sin.default,
    aten.rsqrt.default,
    aten.silu.default,
    aten.gelu.default,
    aten.log.default,
    aten.pow.Tensor_Scalar,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.add.Scalar,
    aten.div.Scalar,
    aten.silu_backward.default,
    aten.gelu_backward.default,
}


def _pointwise(args: tuple) -> Tensor | None:
    """The result of a pointwise op on meta tensors of one dtype, where one of them has the result's
    shape; else None.
    """
    tensors = [a for a in args if isinstance(a, Tensor) and a.dim() > 0]
    if (
        not tensors
        or any(t.dtype != tensors[0].dtype or not t.is_meta for t in tensors)
        or not tensors[0].is_floating_point()
    ):
        return None
    shape = torch.broadcast_shapes(*[t.shape for t in tensors])
    like = next((t for t in tensors if t.shape == shape), None)
    if like is None:
        return None
    # empty_like knows what becomes of the strides of a view, and takes its time
    return (
        torch.empty(shape, dtype=like.dtype, device=META)
        if like.is_contiguous()
        else torch.empty_like(like)
    )


class _MetaLive(Live):
    """The counter on meta, with quick rules for pointwise ops."""

    def __init__(self) -> None:
        super().__init__("meta")

    def compute(self, function, args: tuple, kwargs: dict):
        out = _pointwise(args) if function in POINTWISE else None
        return function(*args, **kwargs) if out is None else out


class _NoScores(TorchFunctionMode):
    """Fused attention keeps no scores on any real device; on meta torch would write them out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


class Packed(nn.Module):
    """A quantised linear's sizes: what it holds, and what its products need for a moment.

    On a GPU that includes what bitsandbytes takes from torch's allocator inside its operators; on a
    CPU such scratch is nobody's tensor.
    """

    def __init__(self, linear: nn.Linear, config: Config, device: str) -> None:
        super().__init__()
        self.inside = device != "cpu"
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        size = linear.weight.numel()
        blocks = -(-linear.weight.numel() // 64)
        self.int8 = config.model.quant == "int8"
        if self.int8:
            held = size + 4 * linear.out_features
        elif config.model.double_quant:
            held = size // 2 + blocks + 4 * -(-blocks // 256) + 1024 + 68
        else:
            held = size // 2 + 4 * blocks + 64
        self.weight = nn.Parameter(
            torch.empty(held, dtype=torch.uint8, device=META), requires_grad=False
        )

    def product(self, x: Tensor) -> Tensor:
        if self.int8:
            scratch = x.new_empty(
                x.shape[0], 3 * x.shape[1] + 4 * self.out_features * self.inside, dtype=torch.uint8
            )
        else:
            scratch = self.dequantised(x.dtype) if self.inside else None
        out = x.new_empty(x.shape[0], self.out_features)
        del scratch
        return out

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=META)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each piece of a conversation."""

    head: int = 4
    tail: int = 1
    ask: int = 80
    ground: int = 145
    verify: int = 80


@dataclass
class _Tokens:
    """The part of `tokens.Tokens` the engine reads."""

    lengths: Lengths
    vocabulary: int
    image_token: int = 0
    pad: int = 0
    eos: tuple[int, ...] = (0,)
    head: list[int] = field(init=False)
    tail: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.head = [0] * self.lengths.head
        self.tail = [0] * self.lengths.tail

    def banned(self) -> Tensor:
        return torch.zeros(self.vocabulary, dtype=torch.bool)


class _Script(Rollout):
    """Answers of full length, known without sampling."""

    def rows(self) -> list[list[int]]:
        return [[0] * n for n in self.lengths]


class _Engine(Engine):
    """The engine with sampling replaced by its last step, which is when it needs most."""

    def encode(self, images: list[tuple[int, int]]) -> Features:
        """Of (height, width) pairs."""
        b = self.backbone
        grids = [(height // b.patch, width // b.patch) for height, width in images]
        patches = torch.empty(
            sum(r * c for r, c in grids), 3 * b.patch**2, dtype=b.dtype, device=META
        )
        return b.encode_patches(patches, grids)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        owner = [r for r, count in enumerate(fan) for _ in range(count)]
        rows = len(owner)
        index = torch.tensor(owner, device=META)
        ids = torch.zeros(rows, limit, dtype=torch.long, device=META)
        logprob = torch.zeros(rows, limit, device=META)
        logits = self.backbone.logits(prompts.last)[index]
        buffer, start = self._continuation(prompts, fan, limit)
        prefix = Grid([prompts.owner[r] for r in owner], len(prompts.prefixes), META)
        prompt = Grid(owner, len(prompts.owner), META)
        parents = [] if start else [(prompts.prefixes.segment, prefix), (prompts.segment, prompt)]
        draw = lambda z: sample(
            z, temperature=temperature, banned=self.banned, seed=index, position=0
        )
        token, _ = draw(logits)
        hidden = self.backbone.decode(
            token,
            index,
            self.backbone.growing(parents, buffer, start + limit - 1),
            prompts.prefixes.adapters,
        )
        logits = self.backbone.logits(hidden)
        draw(logits)
        return _Script(ids, logprob, [limit] * rows)


def meta_policy(
    config: Config, model_config, lengths: Lengths, dtype: torch.dtype, device: str
) -> tuple[PeftModel, _Engine]:
    """The run's model on the meta device with its adapters; quantised linears are `Packed`."""
    with META:
        base = (
            AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
            .requires_grad_(False)
            .eval()
        )
    policy = model.attach(base, config)
    if config.model.quant != "none":
        for name, module in list(base.named_modules()):
            if isinstance(module, LoraLayer) and quantise.LANGUAGE.match(name):
                module.base_layer = Packed(module.base_layer, config, device)
    family, _ = model.FAMILIES[model_config.model_type]
    return policy, _Engine(family(policy), _Tokens(lengths, base.lm_head.weight.shape[0]))


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
    """(components at the peak of each phase, bytes of one vision block)."""
    with _MetaLive() as live, _NoScores():
        with live.labelled("weights"):
            policy, engine = meta_policy(config, model_config, lengths, dtype, device)
        engine.joins = device == "cpu"
        engine.backbone.encode_at_once = ENCODE_AT_ONCE if device == "cpu" else None
        trained = [p for p in policy.parameters() if p.requires_grad]
        live.relabel(trained, "LoRA masters")
        live.relabel(
            [
                t
                for linear in engine.backbone.fused()
                if linear.cached
                for t in (linear.cached.down, *linear.cached.up)
            ],
            "LoRA in compute dtype",
        )
        moments = sum(_moments(p, config.optim.name) for p in trained)
        # On a GPU paged moments lie in managed memory and are fetched for the optimizer step, when
        # there is room.
        paged = moments if config.optim.name.startswith("paged") and device == "cuda" else 0
        live.hold([torch.empty(moments - paged, dtype=torch.uint8, device=META)], "optimizer")
        step = _Step(config, engine, live, trained, paged)
        step.run(sizes)
    block = sum(p.numel() * p.dtype.itemsize for p in engine.backbone.visual.blocks[0].parameters())
    return step.phases, block


def _moments(p: Tensor, name: str) -> int:
    """Bytes an optimizer keeps for a parameter. bitsandbytes: 8 bits and an fp32 scale per 256,
    twice; tensors below 4096 stay fp32.
    """
    if name == "adamw" or p.numel() < 4096:
        return 8 * p.numel()
    return 2 * p.numel() + 8 * -(-p.numel() // 256)


class _Step:
    """experience.play and learner.learn, as far as they need memory."""

    def __init__(
        self, config: Config, engine: _Engine, live: Live, trained: list[Tensor], paged: int
    ) -> None:
        self.config = config
        self.engine = engine
        self.live = live
        self.trained = trained
        self.paged = paged
        self.phases: dict[str, dict[str, int]] = {}
        self.lengths = engine.tokens.lengths

    def run(self, sizes: list[tuple[int, int]]) -> None:
        """The largest slice of the batch, played last; what the other slices keep for the update is
        as large.
        """
        size = self.config.train.micro_batch or len(sizes)
        largest = sorted(sizes, key=lambda s: -s[0] * s[1])[:size]
        others = -(-len(sizes) // size) - 1
        self.live.hold(
            [torch.empty(others * self._kept_bytes(largest), dtype=torch.uint8, device=META)],
            "kept of other slices",
        )
        played = self._play(largest)
        if self.config.reward.w_sem > 0 and self.config.reward.name not in WITHOUT_GHOSTS:
            with self._phase("verify ghosts", "rollout"):
                self._judge(largest)
        if others:
            with self.live.labelled("LoRA gradients"):
                for p in self.trained:
                    p.grad = torch.empty_like(p)
        self._learn(*played)
        with self._phase("optimizer step", "optimizer"):
            self._apply()

    def _kept_bytes(self, sizes: list[tuple[int, int]]) -> int:
        """Vision features of a slice's images."""
        b = self.engine.backbone
        c = self.config
        patches = (
            sum(h * w for h, w in sizes) // b.patch**2 * (1 + c.rollout.views * c.update.views_too)
        )
        return patches * b.visual.config.hidden_size * len(b.mergers) * b.dtype.itemsize

    @contextlib.contextmanager
    def _phase(self, name: str, label: str) -> Iterator[None]:
        self.live.restart()
        with self.live.labelled(label):
            yield
        found = {label: size for label, size in self.live.at_peak.items() if size}
        self.phases[name] = max(
            found, self.phases.get(name, {}), key=lambda parts: sum(parts.values())
        )

    def _pixels(self, sizes: list[tuple[int, int]]) -> list[Tensor]:
        return [
            torch.empty(height, width, 3, dtype=torch.uint8, device=META) for height, width in sizes
        ]

    def _play(
        self, sizes: list[tuple[int, int]]
    ) -> tuple[Features, Prefixes | None, Prompts | None, Rollout, list[int]]:
        engine = self.engine
        c = self.config
        count = len(sizes)
        samples = c.rollout.samples
        views = c.rollout.views
        originals = list(range(count))
        with self._phase("vision encode", "images and vision features"):
            moved = self._pixels([size for size in sizes for _ in range(views)])
            features = engine.encode(sizes + [size for size in sizes for _ in range(views)])
        with self._phase("prefill", "prefix keys and values"):
            prefixes, elsewhere = prefixes_of(engine, features, count, c)
        asked = prefixes
        if c.rollout.asker == "reference":
            with self._phase("reference prefill", "reference keys and values"):
                asked = engine.prefill(features.select(originals), False)
        with self._phase("ask", "rollout"):
            asked_for = engine.prompt(asked, originals, [[0] * self.lengths.ask] * count)
        with self._phase("ask: answers", "rollout"):
            engine.generate(asked_for, [1] * count, c.rollout.query_tokens, [])
        del asked_for
        asked_to_box, answers = self._ground(prefixes, elsewhere, count)
        kept = features if c.update.views_too else features.select(originals)
        judges = (
            prefixes
            if c.reward.judge == "policy"
            else asked
            if c.rollout.asker == "reference"
            else None
        )
        del features, prefixes, elsewhere, asked, moved
        if judges is None:
            with self._phase("reference prefill", "reference keys and values"):
                judges = engine.prefill(kept.select(originals), False)
        with self._phase("verify", "rollout"):
            engine.forked_verdict_logits(judges, originals, [[0] * self.lengths.verify] * count)
        reference = (
            judges
            if c.reward.judge == "reference" and c.train.micro_batch in (0, c.train.batch)
            else None
        )
        del judges
        fan = [samples] * count + [1] * (count * views)
        owner = [r for r, n in enumerate(fan) for _ in range(n)]
        return kept, reference, asked_to_box, answers, owner

    def _ground(
        self, prefixes: Prefixes, elsewhere: Prefixes, count: int
    ) -> tuple[Prompts | None, Rollout]:
        """The questions kept for the update, the samples' answers, and the views' behind them where
        one batch makes both.
        """
        limits = self.config.rollout
        views = count * self.config.rollout.views
        fan = [limits.samples] * count
        there = [1] * views

        def boxes(held: Prefixes, places: range, fan: list[int]) -> tuple[Prompts | None, Rollout]:
            trained = 0 if held.trained is None else len(held.trained)
            with self._phase("ground", "rollout"):
                prompts = self.engine.prompt(
                    held, list(places), [[0] * self.lengths.ground] * len(places), trained
                )
            with self._phase("ground: answers", "rollout"):
                return prompts.trained, self.engine.generate(prompts, fan, limits.box_tokens, [])

        if elsewhere is prefixes and limits.view_temperature == limits.temperature:
            return boxes(prefixes, range(count + views), fan + there)
        answered = boxes(prefixes, range(count), fan)
        boxes(elsewhere, range(len(elsewhere) - views, len(elsewhere)), there)
        return answered

    def _judge(self, sizes: list[tuple[int, int]]) -> None:
        """Every box differs from every other and is judged."""
        kinds = (
            1
            + self.config.reward.controls * (self.config.reward.sem == "contrast")
            + self.config.reward.sufficiency
        )
        at_once = GHOSTS_AT_ONCE * len(sizes)
        all_sizes = [size for size in sizes for _ in range(self.config.rollout.samples)] * kinds
        ghosts = self._pixels(all_sizes)
        features = self.engine.encode(all_sizes[:at_once])
        self.engine.verdict_logits(
            features,
            [[0] * self.lengths.verify] * len(features),
            self.config.reward.judge == "policy",
        )
        del ghosts

    def _learn(
        self,
        kept: Features,
        reference: Prefixes | None,
        asked: Prompts | None,
        answers: Rollout,
        owner: list[int],
    ) -> None:
        engine = self.engine
        c = self.config
        chosen = list(
            range(len(answers.lengths) if c.update.views_too else c.rollout.samples * len(kept))
        )
        answers = _Script(
            answers.ids[chosen], answers.logprob[chosen], [answers.lengths[n] for n in chosen]
        )
        owner = [owner[n] for n in chosen]
        rows = [[0] * self.lengths.ground] * len(kept)
        with self._phase("reference scores", "activations"), torch.no_grad():
            cached = reference if reference is not None and len(reference) == len(kept) else None
            truth = engine.score(kept, rows, answers, owner, False, prefixes=cached)
        with self._phase("forward", "activations"):
            hidden = engine.score(
                kept, rows, answers, owner, True, recompute=c.train.checkpointing, prompts=asked
            )
        with self._phase("head", "head workspace"):
            ids = torch.zeros(len(hidden), dtype=torch.long, device=META)
            logprob, _, kl = linear_logprob_kl(
                hidden, truth, engine.backbone.head.weight, ids, banned=engine.banned
            )
        with self._phase("backward", "gradients in flight"):
            (logprob + kl).sum().backward()
        self.live.relabel([p.grad for p in self.trained], "LoRA gradients")

    def _apply(self) -> None:
        """torch's multi-tensor AdamW works on one more copy of all parameters; the 8-bit kinds on
        none.
        """
        scratch = (
            [torch.empty_like(p) for p in self.trained] if self.config.optim.name == "adamw" else []
        )
        scratch.append(torch.empty(self.paged, dtype=torch.uint8, device=META))
        self.engine.backbone.refresh()
        del scratch
