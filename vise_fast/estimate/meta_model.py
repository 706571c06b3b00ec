"""A run's model and its learner as shapes only: everything on torch's meta device, nothing
computed.

Sampling is replaced by its last step, which is when it needs most; answers are as long as the
limits allow, can be read, and differ from each other, so that every box is judged and scored. Left
out: what lies below torch (allocator rounding, workspaces of libraries, CUDA context).
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText
from vise_kernels import sample

from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine, Sheet
from vise_fast.engine.rollout import Answered, Prefixes, Prompts, Rollout
from vise_fast.estimate.live_bytes import Live
from vise_fast.estimate.stages import Stages
from vise_fast.method.step_plan import Lengths
from vise_fast.model import load as model
from vise_fast.model import quantise
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.model.qwen3_vl_vision import ENCODE_AT_ONCE
from vise_fast.model.tree import Features

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


class MetaLive(Live):
    """The counter on meta, with quick rules for pointwise ops."""

    def __init__(self) -> None:
        super().__init__("meta")

    def compute(self, function, args: tuple, kwargs: dict):
        out = _pointwise(args) if function in POINTWISE else None
        return function(*args, **kwargs) if out is None else out


class NoScores(TorchFunctionMode):
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
        """Empty (n, out) in x's dtype."""
        rows, width = x.shape
        if self.int8:
            half = x.new_empty(
                rows, 2 * width, dtype=torch.uint8
            )  # the fp16 copy that is quantised
            held = x.new_empty(rows, width + 4, dtype=torch.uint8)
            del half
            sums = x.new_empty(rows, 4 * self.out_features * self.inside, dtype=torch.uint8)
        else:
            held = self.dequantised(x.dtype) if self.inside else x
            sums = held
        out = x.new_empty(rows, self.out_features)
        del held, sums
        return out

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=META)


class MetaStyle:
    """Questions by their kind: `MetaTokens` knows their lengths."""

    def ask(self) -> str:
        return "ask"

    def ground(self, query: str) -> str:
        return "ground"

    def verify(self, query: str) -> str:
        return "verify"


class MetaTokens:
    """The part of `tokens.Tokens` that a step reads, for rows of given lengths."""

    image_token = 0
    pad = 0
    eos = (0,)
    yes = (0,)
    no = (1,)
    style = MetaStyle()

    def __init__(self, lengths: Lengths, vocabulary: int) -> None:
        self.lengths = lengths
        self.vocabulary = vocabulary
        self.head = [0] * lengths.head
        self.tail = [0] * lengths.tail
        self.read = 0

    def row(self, kind: str) -> list[int]:
        return [0] * getattr(self.lengths, kind)

    verdict_row = row

    def text(self, ids: list[int]) -> str:
        """An answer to either question: a query, and a box that no other answer names."""
        self.read += 1
        left = 37 * self.read % 400
        top = 53 * self.read % 400
        right = left + 200 + self.read % 97
        return f"<query>thing</query><box>{left},{top},{right},{top + 300}</box>"

    def banned(self) -> Tensor:
        return torch.zeros(self.vocabulary, dtype=torch.bool)


class MetaEngine(FastEngine):
    """The fast engine, every call a stage of its own."""

    backbone: Qwen3VL

    def __init__(self, backbone: Qwen3VL, tokens: MetaTokens, stages: Stages, device: str) -> None:
        super().__init__(backbone, tokens)  # type: ignore[arg-type]
        self.clock = stages  # type: ignore[assignment]
        self.joins = device == "cpu"

    def home(self, values: Tensor) -> Tensor:
        """Numbers that can be probabilities, no two alike."""
        return torch.linspace(1, 0.9, values.numel(), dtype=values.dtype).view(values.shape)

    def encode(self, images: list[Tensor]) -> Features:
        b = self.backbone
        grids = [(image.shape[0] // b.patch, image.shape[1] // b.patch) for image in images]
        count = sum(rows * columns for rows, columns in grids)
        with self.clock.phase("encode"):
            patches = torch.empty(count, 3 * b.patch**2, dtype=b.dtype, device=META)
            return b.vision.encode_patches(patches, grids)

    def prefill(self, features: Features, adapters: bool, *, graph: bool = False) -> Prefixes:
        with self.clock.phase("prefix" if adapters else "reference prefix"):
            return super().prefill(features, adapters, graph=graph)

    def prompt(self, prefixes: Prefixes, owner: list[int], rows: list[list[int]]) -> Prompts:
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
        with self.clock.phase("answers"):
            active = self._start(prompts, fan, limit, seeds)
            sheet = Sheet.blank(len(seeds), limit, self.tokens, self.device)
            logits = self.backbone.logits(prompts.last)[torch.tensor(active.owner, device=META)]
            token = self._draw(logits, active.seeds, temperature)
            logits = self._next(active, token, limit - 1, prompts.prefixes.adapters)
            self._draw(logits, active.seeds, temperature)
        home = [[0] * limit for _ in seeds]
        return Rollout(sheet.ids, sheet.logprob, [limit] * len(seeds), home)

    def _draw(self, logits: Tensor, seeds: Tensor, temperature: float) -> Tensor:
        token, _ = sample(
            logits, temperature=temperature, banned=self.banned, seed=seeds, position=0
        )
        return token

    def verdict_logits(self, features: Features, rows: list[list[int]], adapters: bool) -> Tensor:
        with self.clock.phase("verdicts"):
            return super().verdict_logits(features, rows, adapters)

    def score(self, features: Features, answered: Answered, adapters: bool, **options) -> Tensor:
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
        self, parameters: list[Tensor], name: str, live: Live, *, paged: bool, accumulates: bool
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
    config: Config, model_config, lengths: Lengths, dtype: torch.dtype, device: str
) -> model.Policy:
    """The run's model on the meta device with its adapters; quantised linears are `Packed`."""
    with META:
        base = AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
    base.requires_grad_(False).eval()
    policy = model.attach(base, config)
    if config.model.quant != "none":
        for name, module in list(base.named_modules()):
            if isinstance(module, LoraLayer) and quantise.LANGUAGE.match(name):
                module.base_layer = Packed(module.base_layer, config, device)
    tokens = MetaTokens(lengths, base.lm_head.weight.shape[0])
    backbone = model.FAMILIES[model_config.model_type].backbone(policy)
    backbone.vision.at_once = ENCODE_AT_ONCE if device == "cpu" else None
    return model.Policy(policy, tokens, backbone, "")  # type: ignore[arg-type]
