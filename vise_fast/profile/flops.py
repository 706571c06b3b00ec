"""What a step costs, executed FLOPs; and what it must cost: minimal FLOPs, bytes, roofline.

The first part observes running code, the second is arithmetic on a model's shapes and an answer's
lengths. Nothing here changes what it watches; counting slows it down, so times and counts are taken
in separate runs (bench/rollout.py does). Left out: seconds and peak memory (system/clock.py), host
syncs (host_syncs.py), printing.

The closed form of the minimum (`minimal_step`), per image, one term per line; a product of (m, k) by (k, n) is 2mkn FLOPs:

    encode     every distinct image once: patch product (stills: both temporal taps folded, so 3·p·p inputs), blocks, full attention
    merge      mergers, once per distinct image and adapter state that reads it (they carry LoRA); the update's own is in `update`
    prefix     head + image + tail, once per distinct image and adapter state
    prompt     each question once: ask on the image, ground on image and views, verify on image and ghosts
    decode     every sampled token but the last, which nobody continues
    head       a row of logits per sampled token and per verdict
    update     policy: mergers, prefix, ground question and answers in one tree, forward and backward
    reference  the same tree forward with adapters off, without what the reference judge prefilled already
    loss       head rows of the sampled boxes: policy, reference, and the gradient with respect to the hidden states

A token costs 2 FLOPs per decoder weight, plus 2 per LoRA weight with adapters on. Attention is 4·heads·dim per layer and (query, key)
pair that is seen: causal pairs only. Backward: as much again for frozen weights (gradient of the input only), twice for LoRA and
attention. Norms, rotary embedding, softmax and sampling are not counted, neither here nor by torch's counter.

At Qwen3-VL-2B shapes, 640x480 (1,200 patches, 300 tokens), answers of 14 and 22 tokens, paper preset, r 16: 11.5 TFLOP, when the ground
question is 145 tokens (4 + 300 + 1 + 145 + 22 = the 472 tokens of a grounding sequence) and ask and verify 80 each. Each token more or
less in every question moves it by 0.014 + 0.008.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import vise_kernels.attention  # noqa: F401  defines its operator
from torch.utils.flop_counter import FlopCounterMode

# ---- executed FLOPs ------------------------------------------------------------------------------


aten = torch.ops.aten


def _pairs(query, key, causal: bool) -> int:
    """(query, key) pairs of one head; the causal kernel skips what lies above the diagonal."""
    queries = query.shape[2]
    keys = key.shape[2]
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + max(0, queries - keys) * keys if causal else queries * keys


def _flash(query, key, value, dropout_p=0.0, is_causal=False, *args, out_val=None, **kwargs) -> int:
    return 4 * query.shape[0] * query.shape[1] * query.shape[3] * _pairs(query, key, is_causal)


def _flash_backward(
    grad, query, key, value, out, logsumexp, dropout_p, is_causal, *args, out_val=None, **kwargs
) -> int:
    """Five products: the scores again, then the gradients of weights, values, queries and keys."""
    return 10 * query.shape[0] * query.shape[1] * query.shape[3] * _pairs(query, key, is_causal)


def _gpu_flash_backward(
    grad,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *args,
    out_val=None,
    **kwargs,
) -> int:
    return _flash_backward(grad, query, key, value, out, logsumexp, dropout_p, is_causal)


def _efficient(
    query,
    key,
    value,
    bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    *args,
    out_val=None,
    **kwargs,
) -> int:
    return _flash(query, key, value, dropout_p, is_causal)


def _efficient_backward(
    grad,
    query,
    key,
    value,
    bias,
    out,
    logsumexp,
    seed,
    offset,
    dropout_p,
    wanted,
    is_causal=False,
    *args,
    out_val=None,
    **kwargs,
) -> int:
    return _flash_backward(grad, query, key, value, out, logsumexp, dropout_p, is_causal)


def _banks(q, keys, values, owners, lengths, causal, *args, out_val=None, **kwargs) -> int:
    """vise_kernels' attention over several banks, of which the last may be causal."""
    rows, tokens, heads, dim = q.shape
    seen = [tokens * bank.shape[2] for bank in keys]
    if causal:
        seen[-1] = tokens * (tokens + 1) // 2
    return 4 * rows * heads * dim * sum(seen)


def _added(y, left, right, *args, out_val=None, **kwargs) -> int:
    """y += left · right, which torch's counter knows out of place only."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


FORMULAS = {
    aten.addmm_: _added,
    torch.ops.vise_kernels.attention: _banks,
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_flash_attention_backward: _gpu_flash_backward,
    aten._scaled_dot_product_efficient_attention: _efficient,
    aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
}
for formula in FORMULAS.values():
    formula._get_raw = True


@contextlib.contextmanager
def executed_flops() -> Iterator[FlopCounterMode]:
    """torch's counter of matrix products, attention and their backward passes; read `.get_total_flops()` afterwards."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        yield counter


# ---- the closed form -----------------------------------------------------------------------------


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
    def of(cls, config, rank: int) -> Shapes:
        """From a transformers config; `rank` of the LoRA on every target, 0 without."""
        t = config.text_config
        v = config.vision_config
        return cls(
            t.hidden_size,
            t.num_hidden_layers,
            t.num_attention_heads,
            t.num_key_value_heads,
            t.head_dim,
            t.intermediate_size,
            t.vocab_size,
            v.depth,
            v.hidden_size,
            v.intermediate_size,
            v.patch_size,
            v.spatial_merge_size,
            len(v.deepstack_visual_indexes),
            rank,
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
        return self.layers * sum(i * o for i, o in self._decoder())

    def merger_weights(self) -> int:
        return sum(i * o for i, o in self._merger())

    def decoder_lora(self) -> int:
        return self.layers * self.rank * sum(i + o for i, o in self._decoder())

    def merger_lora(self) -> int:
        return self.rank * sum(i + o for i, o in self._merger())

    def head_weights(self) -> int:
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Plan:
    """One image's step: its size in pixels, the tokens of each piece, and how many of each there are.

    Defaults are the paper preset (G 1, K 1, judged by the policy, one ghost) at the lengths of the pinned number.
    """

    height: int = 480
    width: int = 640
    before: int = 4
    after: int = 1
    ask: int = 80
    ground: int = 145
    verify: int = 80
    query: int = 14
    box: int = 22
    samples: int = 1
    views: int = 1
    ghosts: int = 1
    policy_judges: bool = True
    shares_forward: bool = False
    """the update begins where the rollout's pass over prefix and question ended"""


def attention_flops(s: Shapes, pairs: float) -> float:
    """Attention of the decoder over this many (query, key) pairs, forward."""
    return 4.0 * s.heads * s.head_dim * s.layers * pairs


def forward_flops(
    s: Shapes, tokens: float, seen: float, adapters: bool, backward: bool = False
) -> float:
    """`tokens` consecutive tokens through the decoder, the first of which sees `seen` earlier ones; forward, or backward alone."""
    lora = s.decoder_lora() if adapters else 0
    pairs = tokens * seen + tokens * (tokens + 1) / 2
    products = 2.0 * tokens * (s.decoder_weights() + lora)
    attention = attention_flops(s, pairs)
    return products + 2.0 * tokens * lora + 2 * attention if backward else products + attention


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
    blocks = s.depth * (4 * s.width**2 + 2 * s.width * s.vision_mlp)
    return (
        2.0 * patches * (blocks + 3 * s.patch**2 * s.width) + 4.0 * s.depth * s.width * patches**2
    )


def minimal_step(s: Shapes, p: Plan) -> dict[str, float]:
    """FLOPs per term of the module's docstring for one image; their sum is the minimal step."""
    patches = p.height // s.patch * (p.width // s.patch)
    prefix = p.before + patches // s.merge**2 + p.after
    prompted = prefix + p.ground
    policy_images = 1 + p.views + p.ghosts * p.policy_judges
    reference_images = 0 if p.policy_judges else 1 + p.ghosts
    boxes = p.samples + p.views
    verdicts = 1 + p.ghosts
    merged = policy_images * merge_flops(s, patches, True) + reference_images * merge_flops(
        s, patches, False
    )
    prefilled = policy_images * forward_flops(
        s, prefix, 0, True
    ) + reference_images * forward_flops(s, prefix, 0, False)
    prompts = (
        forward_flops(s, p.ask, prefix, True)
        + (1 + p.views) * forward_flops(s, p.ground, prefix, True)
        + verdicts * forward_flops(s, p.verify, prefix, p.policy_judges)
    )
    decoded = forward_flops(s, p.query - 1, prefix + p.ask, True) + boxes * forward_flops(
        s, p.box - 1, prompted, True
    )

    def answers(adapters: bool, backward: bool = False) -> float:
        return p.samples * forward_flops(s, p.box - 1, prompted, adapters, backward)

    def tree(adapters: bool, backward: bool = False, cached: bool = False) -> float:
        shared = (
            0.0
            if cached
            else forward_flops(s, prefix, 0, adapters, backward)
            + merge_flops(s, patches, adapters, backward)
        )
        return (
            shared
            + forward_flops(s, p.ground, prefix, adapters, backward)
            + answers(adapters, backward)
        )

    row = 2.0 * s.head_weights()
    return {
        "encode": (1 + p.views + p.ghosts) * encode_flops(s, p.height, p.width),
        "merge": merged,
        "prefix": prefilled,
        "prompt": prompts,
        "decode": decoded,
        "head": row * (p.query + boxes * p.box + verdicts),
        "update": (answers(True) if p.shares_forward else tree(True)) + tree(True, backward=True),
        "reference": tree(False, cached=not p.policy_judges),
        "loss": 3 * row * p.samples * p.box,
    }


# ---- bytes and the roofline ----------------------------------------------------------------------


def decode_bytes(
    s: Shapes,
    rows: int,
    context: int,
    bytes_per_weight: float = 2.0,
    bytes_per_value: int = 2,
    shared: int = 0,
) -> float:
    """Bytes one decode step must move: decoder, LoRA and head once, and each row's keys and values.

    context: tokens each row sees; the first `shared` of them belong to one prefix that is read once for all rows.
    """
    weights = s.decoder_weights() * bytes_per_weight + (s.decoder_lora() + s.head_weights()) * 2.0
    per_token = 2 * s.layers * s.kv_heads * s.head_dim * bytes_per_value
    return weights + per_token * (rows * (context - shared) + shared)


@dataclass(frozen=True)
class Ceiling:
    """What a machine can do: FLOP/s of its matrix units and bytes/s of its memory, measured in the same run."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline: neither compute nor memory can be faster (Williams et al. 2009, "Roofline")."""
        return max(flops / self.flops, moved / self.bandwidth)

    def share(self, seconds: float, flops: float, moved: float) -> float:
        """Which part of the ceiling a measured time reaches, 0..1."""
        return self.seconds(flops, moved) / seconds
