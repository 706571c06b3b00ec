"""A run's model and its learner as shapes only: everything on torch's meta device, nothing
computed.

Sampling is replaced by its last step, which is when it needs most; answers are as long as the
limits allow, can be read, and differ from each other, so that every box is judged and scored. Left
out: what lies below torch (allocator rounding, workspaces of libraries, CUDA context).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText
from vise_kernels.dispatch import announce

from vise_fast.config.schema import Config
from vise_fast.engine.choose import engine_of
from vise_fast.engine.fast import FastEngine, Sheet
from vise_fast.engine.rollout import Answered, Prefixes, Prompts, Rollout
from vise_fast.estimate.live_bytes import Live
from vise_fast.estimate.meta_generic import MetaModules
from vise_fast.estimate.stages import Stages
from vise_fast.images.geometry import Box
from vise_fast.method.step_plan import Lengths
from vise_fast.model import load as model
from vise_fast.model import quantise
from vise_fast.model.eight_bit_rows import replace_embedding
from vise_fast.model.families import FAMILIES
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.model.qwen3_vl_vision import ENCODE_AT_ONCE
from vise_fast.model.tree import Features
from vise_fast.text.prompts import Style
from vise_fast.text.tokens import Tokens

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
    if not tensors or not _alike(tensors):
        return None
    shape = torch.broadcast_shapes(*[t.shape for t in tensors])
    like = next((t for t in tensors if t.shape == shape), None)
    if like is None:
        return None
    if like.is_contiguous():
        return torch.empty(shape, dtype=like.dtype, device=META)
    # knows what becomes of the strides of a view, and takes its time
    return torch.empty_like(like)


def _alike(tensors: list[Tensor]) -> bool:
    """All on meta, of one floating dtype."""
    dtype = tensors[0].dtype
    return dtype.is_floating_point and all(t.is_meta and t.dtype == dtype for t in tensors)


class MetaLive(Live):
    """The counter on meta, with quick rules for pointwise ops."""

    def __init__(self) -> None:
        super().__init__("meta")

    def compute(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The op itself, or what its result would look like."""
        out = _pointwise(args) if function in POINTWISE else None
        return function(*args, **kwargs) if out is None else out


class NoScores(TorchFunctionMode):
    """Fused attention keeps no scores on any real device; on meta torch would write them out."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


class Packed(nn.Module):
    """A quantised linear's sizes: what it holds, and what its products need for a moment.

    On a GPU that includes what bitsandbytes takes from torch's allocator inside its operators; on a
    CPU such scratch is nobody's tensor.
    """

    def __init__(self, linear: Any, config: Config, device: str) -> None:
        super().__init__()
        self.inside = device != "cpu"
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.int8 = config.model.quant == "int8"
        self.rounds_rows = quantise.slices_matter(config)
        held = torch.empty(self._held_bytes(config), dtype=torch.uint8, device=META)
        self.weight = nn.Parameter(held, requires_grad=False)

    def _held_bytes(self, config: Config) -> int:
        """Of the weight and its scales."""
        size = self.out_features * self.in_features
        blocks = -(-size // 64)
        if self.int8:
            return size + 4 * self.out_features
        if config.model.double_quant:
            return size // 2 + blocks + 4 * -(-blocks // 256) + 1024 + 68
        return size // 2 + 4 * blocks + 64

    def writes_out(self, x: Tensor) -> bool:
        """As quantise.writes_out answers on this device."""
        return self.inside and not self.rounds_rows and (self.int8 or len(x) > quantise.FEW_ROWS)

    def product(self, x: Tensor) -> Tensor:
        """Empty (n, out) in x's dtype."""
        held = self.scratch(x)
        out = x.new_empty(len(x), self.out_features)
        del held
        return out

    def scratch(self, x: Tensor) -> list[Tensor]:
        """What a product needs for a moment, beside its result."""
        rows, width = x.shape
        work = 2 * rows * width * self.out_features
        moved = self._unpacked_bytes(x) + x.dtype.itemsize * rows * (width + self.out_features)
        announce("quantised product", flops=work, moved=moved)
        if not self.rounds_rows:
            written = self.int8 or self.inside  # read by torch, or inside bitsandbytes
            if not written:
                return []
            return [torch.empty(self.out_features, width, dtype=x.dtype, device=META)]
        # the fp16 copy that is quantised
        half = x.new_empty(rows, 2 * width, dtype=torch.uint8)
        held = x.new_empty(rows, width + 4, dtype=torch.uint8)
        del half
        return [held, x.new_empty(rows, 4 * self.out_features * self.inside, dtype=torch.uint8)]

    def _unpacked_bytes(self, x: Tensor) -> int:
        """Of the weight that a product with x reads, written out before it where that is done."""
        if self.rounds_rows:
            announce("rows to 8 bits", LLM_INT8, moved=x.numel() * (2 * x.dtype.itemsize + 1))
            return self.weight.numel()
        return self._announce_unpacking(x.dtype) if self.writes_out(x) else self.weight.numel()

    def _announce_unpacking(self, dtype: torch.dtype) -> int:
        """Bytes of the weight written out."""
        size = self.out_features * self.in_features * dtype.itemsize
        announce("unpack", moved=self.weight.numel() + size)
        return size

    def forward(self, x: Tensor) -> Tensor:
        """As a module (PEFT calls it so): (..., in) to empty (..., out)."""
        return self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Empty (out, in)."""
        self._announce_unpacking(dtype)
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=META)


LLM_INT8 = 3
"""Kernels beside its product: the cast and quantisation of the input, the scaling of the result."""
KINDS = Style("meta", ask_text="ask", ground_text="ground", verify_text="verify")
"""Questions by their kind: `MetaTokens` knows their lengths."""


class MetaTokens(Tokens):
    """What a step reads of `Tokens`, without a tokenizer: rows of given lengths."""

    def __init__(self, lengths: Lengths, vocabulary: int) -> None:
        self.lengths = lengths
        self.vocabulary = vocabulary
        self.style = KINDS
        self.head = [0] * lengths.head
        self.tail = [0] * lengths.tail
        self.image_token = 0
        self.pad = 0
        self.eos = [0]
        self.yes = [0]
        self.no = [1]
        self.digits = list(range(10))
        self.read = 0

    def row(self, text: str) -> list[int]:
        """A question of the kind `text`."""
        return [0] * getattr(self.lengths, text)

    def written_boxes(self, boxes_1000: list[Box]) -> list[list[int]]:
        """Boxes as answers, of the length of all."""
        return [[0] * self.lengths.box for _ in boxes_1000]

    def verdict_row(self, text: str) -> list[int]:
        """The same: its length counts the opening."""
        return self.row(text)

    def text(self, ids: list[int]) -> str:
        """An answer to either question: a query, and a box that no other answer names."""
        self.read += 1
        left = 37 * self.read % 400
        top = 53 * self.read % 400
        right = left + 200 + self.read % 97
        return f"<query>thing</query><box>{left},{top},{right},{top + 300}</box>"

    def banned(self) -> Tensor:
        """None of them."""
        return torch.zeros(self.vocabulary, dtype=torch.bool)


class MetaEngine(FastEngine):
    """The fast engine, every call a stage of its own."""

    backbone: Qwen3VL

    def __init__(self, backbone: Qwen3VL, tokens: Tokens, stages: Stages, device: str) -> None:
        super().__init__(backbone, tokens)
        self.clock = stages
        # pictures of the same sizes, once more, need what they needed the first time
        self._encoded: set[tuple] = set()
        self._judged: set[tuple] = set()
        self.joins = device == "cpu"
        self.chains = not self.joins

    def gains_by_sharing(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """As on the device that is rehearsed."""
        return self.joins or super().gains_by_sharing(sizes)

    def home(self, values: Tensor) -> Tensor:
        """Numbers that can be probabilities, no two alike."""
        return torch.linspace(1, 0.9, values.numel(), dtype=values.dtype).view(values.shape)

    def encode(self, images: list[Tensor]) -> Features:
        """Features of images whose patches nobody computes."""
        b = self.backbone
        grids = [(image.shape[0] // b.patch, image.shape[1] // b.patch) for image in images]
        count = sum(rows * columns for rows, columns in grids)
        with self.clock.phase("encode"):
            if tuple(grids) in self._encoded:
                held = [torch.empty(count, b.vision.width, dtype=b.dtype, device=META)]
                held += [torch.empty_like(held[0]) for _ in b.vision.taps]
                return Features(held[0], held[1:], grids)
            self._encoded.add(tuple(grids))
            patches = torch.empty(count, 3 * b.patch**2, dtype=b.dtype, device=META)
            return b.vision.encode_patches(patches, grids)

    def prefill(self, features: Features, adapters: bool, *, graph: bool = False) -> Prefixes:
        """As a stage."""
        with self.clock.phase("prefix" if adapters else "reference prefix"):
            return super().prefill(features, adapters, graph=graph)

    def prompt(self, prefixes: Prefixes, owner: list[int], rows: list[list[int]]) -> Prompts:
        """As a stage."""
        with self.clock.phase("question"):
            return super().prompt(prefixes, owner, rows)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """The first token and the last, when the keys and values of all are there."""
        with self.clock.phase("answers"):
            active = self._start(prompts, fan, limit, seeds)
            sheet = Sheet.blank(len(seeds), limit, self.tokens, self.device)
            logits = self.backbone.logits(prompts.last)[torch.tensor(active.owner, device=META)]
            token = self._drawn(logits, active.seeds, 0, temperature)[0]
            logits = self._next(active, token, limit - 1, prompts.prefixes.adapters)
            self._drawn(logits, active.seeds, limit - 1, temperature)
        home = [[0] * limit for _ in seeds]
        return Rollout(sheet.ids, sheet.logprob, [limit] * len(seeds), home)

    def verdict_logits(self, features: Features, rows: list[list[int]], adapters: bool) -> Tensor:
        """As a stage."""
        key = (tuple(features.grids), len(rows[0]), adapters)
        with self.clock.phase("verdicts"):
            if key in self._judged:
                return torch.empty(len(rows), self.tokens.vocabulary, device=META)
            self._judged.add(key)
            return super().verdict_logits(features, rows, adapters)

    def score(self, features: Features, answered: Answered, adapters: bool, **options) -> Tensor:
        """As a stage."""
        with self.clock.phase("scores" if adapters else "reference scores"):
            return super().score(features, answered, adapters, **options)


class MetaOptimizer:
    """What an optimizer holds and takes, of the kind `optim.name` names.

    torch's multi-tensor AdamW works on one more copy of all parameters, the 8-bit kinds on none.
    bitsandbytes keeps 8 bits and an fp32 scale per 256, twice; tensors below 4096 stay fp32. On a
    GPU paged moments lie in managed memory and are fetched for the step, when there is room.
    accumulates: other slices left gradients behind.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        name: str,
        live: Live,
        *,
        paged: bool,
        accumulates: bool,
    ) -> None:
        self.parameters = parameters
        self.name = name
        self.live = live
        self.accumulates = accumulates
        self.param_groups: list[dict] = []
        self.state = dict.fromkeys(parameters, True)
        moments = sum(_moment_bytes(p, name) for p in parameters)
        self.paged = moments if paged else 0
        held = torch.empty(moments - self.paged, dtype=torch.uint8, device=META)
        live.hold([held], "optimizer")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients are gone, or (before the first slice that counts) those of other slices."""
        with self.live.labelled("LoRA gradients"):
            for p in self.parameters:
                p.grad = torch.empty_like(p) if self.accumulates else None
        self.accumulates = False

    def step(self) -> None:
        """Takes what a step takes, and lets it go."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.live.relabel(grads, "LoRA gradients")
        scratch = grads if self.name == "adamw" else []
        held = [torch.empty_like(grad) for grad in scratch]
        held.append(torch.empty(self.paged, dtype=torch.uint8, device=META))


def _moment_bytes(p: Tensor, name: str) -> int:
    if name == "adamw" or p.numel() < 4096:
        return 8 * p.numel()
    return 2 * p.numel() + 8 * -(-p.numel() // 256)


def meta_policy(
    config: Config, model_config: Any, lengths: Lengths, dtype: torch.dtype, device: str
) -> model.Policy:
    """The run's model on the meta device with its adapters; quantised linears are `Packed`."""
    with META:
        base = AutoModelForImageTextToText.from_config(
            model_config, dtype=dtype, trust_remote_code=False
        )
    base.requires_grad_(False).eval()
    if config.model.int8_embedding:
        replace_embedding(base, config.model.path)
    policy = model.attach(base, config)
    if config.model.quant != "none":
        for name, module in list(base.named_modules()):
            if isinstance(module, LoraLayer) and quantise.LANGUAGE.match(name):
                module.base_layer = Packed(module.base_layer, config, device)
    tokens = MetaTokens(lengths, base.lm_head.weight.shape[0])
    if not runs_fast(config, model_config):
        return model.Policy(policy, tokens, MetaModules(policy), "")
    backbone = model.backbone_of(policy)
    backbone.vision.at_once = ENCODE_AT_ONCE if device == "cpu" else None
    return model.Policy(policy, tokens, backbone, "")


def runs_fast(config: Config, model_config: Any) -> bool:
    """Whether the run's engine is the fast one; the stock one, which shares nothing, needs less
    than the generic one that is rehearsed in its place.
    """
    return engine_of(config, FAMILIES[model_config.model_type]).path == "fast"
