"""What a step must cost: the closed form of its FLOPs (`minimal_step`), per image, one term per
line; a product of (m, k) by (k, n) is 2mkn FLOPs:

    encode     every distinct image once: patch product (stills: both temporal taps folded, so 3·p·p
               inputs), blocks, full attention
    merge      mergers, once per distinct image and adapter state that reads it (they carry LoRA);
               the update's own is in `update`
    prefix     head + image + tail, once per distinct image and adapter state
    prompt     each question once: ask on the image, ground on image and views, verify on image and
               ghosts; with `reward.unique` ask on a cutout as well, taken to be as large as the
               image, which is encoded, merged and prefilled for it
    decode     every sampled token but the last, which nobody continues
    head       a row of logits per sampled token and per verdict
    update     policy: mergers, prefix, ground question and answers in one tree, forward and
               backward
    reference  the same tree forward with adapters off, without what the reference judge prefilled
               already
    loss       head rows of the sampled boxes: policy, reference, and the gradient with respect to
               the hidden states

A token costs 2 FLOPs per decoder weight, plus 2 per LoRA weight with adapters on. Attention is
4·heads·dim per layer and (query, key) pair that is seen: causal pairs only. Backward: as much again
for frozen weights (gradient of the input only), twice for LoRA and attention. Norms, rotary
embedding, softmax and sampling are not counted, neither here nor by torch's counter.

At Qwen3-VL-2B shapes, 640x480 (1,200 patches, 300 tokens), answers of 14 and 22 tokens, paper
preset, r 16: 11.5 TFLOP, when the ground question is 145 tokens (4 + 300 + 1 + 145 + 22 = the 472
tokens of a grounding sequence) and ask and verify 80 each. Each token more or less in every
question moves it by 0.014 + 0.008.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vise_fast.method.step_plan import Lengths, StepPlan

PINNED = Lengths()


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Qwen3-VL-architecture model that cost anything."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    depth: int
    width: int
    vision_mlp: int
    patch: int
    merge: int
    taps: int
    rank: int

    @classmethod
    def of(cls, config: Any, rank: int) -> Shapes:
        """From a transformers config; `rank` of the LoRA on every target, 0 without."""
        t = config.text_config
        v = config.vision_config
        return cls(
            hidden=t.hidden_size,
            layers=t.num_hidden_layers,
            heads=t.num_attention_heads,
            kv_heads=t.num_key_value_heads,
            head_dim=t.head_dim,
            mlp=t.intermediate_size,
            vocabulary=t.vocab_size,
            depth=v.depth,
            width=v.hidden_size,
            vision_mlp=v.intermediate_size,
            patch=v.patch_size,
            merge=v.spatial_merge_size,
            taps=len(v.deepstack_visual_indexes),
            rank=rank,
        )

    def _decoder(self) -> list[tuple[int, int]]:
        """(in, out) of one layer's projections: q, k, v, o, gate, up, down."""
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        e = self.hidden
        m = self.mlp
        return [(e, q), (e, kv), (e, kv), (q, e), (e, m), (e, m), (m, e)]

    def _merger(self) -> list[tuple[int, int]]:
        wide = self.width * self.merge**2
        return [(wide, wide), (wide, self.hidden)] * (1 + self.taps)

    def decoder_weights(self) -> int:
        """Of all layers' projections."""
        return self.layers * sum(i * o for i, o in self._decoder())

    def merger_weights(self) -> int:
        """Of all mergers."""
        return sum(i * o for i, o in self._merger())

    def decoder_lora(self) -> int:
        """LoRA weights on the decoder."""
        return self.layers * self.rank * sum(i + o for i, o in self._decoder())

    def merger_lora(self) -> int:
        """LoRA weights on the mergers."""
        return self.rank * sum(i + o for i, o in self._merger())

    def head_weights(self) -> int:
        """Of the LM head."""
        return self.vocabulary * self.hidden


def attention_flops(s: Shapes, pairs: float) -> float:
    """Attention of the decoder over this many (query, key) pairs, forward."""
    return 4.0 * s.heads * s.head_dim * s.layers * pairs


def forward_flops(
    s: Shapes, tokens: float, seen: float, adapters: bool, backward: bool = False
) -> float:
    """`tokens` consecutive tokens through the decoder, the first of which sees `seen` earlier ones;
    forward, or backward alone.
    """
    lora = s.decoder_lora() if adapters else 0
    pairs = tokens * seen + tokens * (tokens + 1) / 2
    products = 2.0 * tokens * (s.decoder_weights() + lora)
    attention = attention_flops(s, pairs)
    if backward:
        return products + 2.0 * tokens * lora + 2 * attention
    return products + attention


def merge_flops(s: Shapes, patches: int, adapters: bool, backward: bool = False) -> float:
    """The mergers over one image; forward, or backward alone."""
    lora = s.merger_lora() if adapters else 0
    frozen = s.merger_weights()
    if backward:
        # Nothing below the mergers learns: the first of each pair needs no gradient of its input,
        # only of its LoRA factors.
        wide = s.width * s.merge**2
        first = (1 + s.taps) * (wide * wide + s.rank * wide)
        frozen = frozen - first
        lora = 2 * lora
    return 2.0 * patches / s.merge**2 * (frozen + lora)


def encode_flops(s: Shapes, height: int, width: int) -> float:
    """The vision tower up to the mergers, one image."""
    patches = height // s.patch * (width // s.patch)
    embedding = 3 * s.patch**2 * s.width
    blocks = s.depth * (4 * s.width**2 + 2 * s.width * s.vision_mlp)
    attention = 4.0 * s.depth * s.width * patches**2
    return 2.0 * patches * (blocks + embedding) + attention


def minimal_step(
    s: Shapes, plan: StepPlan, lengths: Lengths = PINNED, size: tuple[int, int] = (480, 640)
) -> dict[str, float]:
    """FLOPs per term of the module's docstring for one image of `size` (height, width) in pixels;
    their sum is the minimal step.
    """
    return _Minimal(s, plan, lengths, size).terms()


@dataclass(frozen=True)
class _Minimal:
    """The terms of one image's step."""

    s: Shapes
    plan: StepPlan
    lengths: Lengths
    size: tuple[int, int]

    @property
    def patches(self) -> int:
        """Of the image."""
        return self.size[0] // self.s.patch * (self.size[1] // self.s.patch)

    @property
    def prefix(self) -> int:
        """Tokens of head, image and tail."""
        return self.lengths.head + self.patches // self.s.merge**2 + self.lengths.tail

    @property
    def prompted(self) -> int:
        """Tokens of the prefix and the ground question."""
        return self.prefix + self.lengths.ground

    def terms(self) -> dict[str, float]:
        """FLOPs by term."""
        plan = self.plan
        images = 1 + plan.views
        again = int(plan.names_again)
        policy = images + plan.ghosts * plan.policy_judges + again * plan.policy_asks
        reference = again * (not plan.policy_asks)
        reference += 0 if plan.policy_judges else 1 + plan.ghosts
        forward = self._answers(True) if plan.shares_forward else self._tree(True)
        row = 2.0 * self.s.head_weights()
        rows = (1 + again) * self.lengths.query + plan.boxes * self.lengths.box + 1 + plan.ghosts
        return {
            "encode": (images + plan.ghosts + again) * encode_flops(self.s, *self.size),
            "merge": policy * self._merge(True) + reference * self._merge(False),
            "prefix": policy * self._read(True) + reference * self._read(False),
            "prompt": self._questions(),
            "decode": self._decoded(),
            "head": row * rows,
            "update": forward + self._tree(True, backward=True),
            "reference": self._tree(False, cached=not plan.policy_judges),
            "loss": 3 * row * plan.samples * self.lengths.box,
        }

    def _merge(self, adapters: bool) -> float:
        return merge_flops(self.s, self.patches, adapters)

    def _read(self, adapters: bool) -> float:
        """A prefix through the decoder."""
        return forward_flops(self.s, self.prefix, 0, adapters)

    def _questions(self) -> float:
        """Ask on the image, ground on image and views, verify on image and ghosts."""
        ask = forward_flops(self.s, self.lengths.ask, self.prefix, True)
        ground = forward_flops(self.s, self.lengths.ground, self.prefix, True)
        policy = self.plan.policy_judges
        verify = forward_flops(self.s, self.lengths.verify, self.prefix, policy)
        asks = (1 + self.plan.names_again) * ask
        return asks + (1 + self.plan.views) * ground + (1 + self.plan.ghosts) * verify

    def _decoded(self) -> float:
        seen = self.prefix + self.lengths.ask
        query = forward_flops(self.s, self.lengths.query - 1, seen, True)
        box = forward_flops(self.s, self.lengths.box - 1, self.prompted, True)
        return (1 + self.plan.names_again) * query + self.plan.boxes * box

    def _answers(self, adapters: bool, backward: bool = False) -> float:
        """The sampled boxes of the image, scored."""
        tokens = self.lengths.box - 1
        one = forward_flops(self.s, tokens, self.prompted, adapters, backward)
        return self.plan.samples * one

    def _tree(self, adapters: bool, backward: bool = False, cached: bool = False) -> float:
        """Prefix (unless cached), ground question and answers in one tree."""
        ground = forward_flops(self.s, self.lengths.ground, self.prefix, adapters, backward)
        below = ground + self._answers(adapters, backward)
        if cached:
            return below
        prefix = forward_flops(self.s, self.prefix, 0, adapters, backward)
        return prefix + merge_flops(self.s, self.patches, adapters, backward) + below
