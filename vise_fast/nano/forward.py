"""A quick forward over the embedded model's own weights for pretraining: all images equal in size,
so attention is one batched call.

`weights` is a dict from parameter names (as in `named_parameters`) to tensors, in any floating
dtype. Not here: caches beyond one shared prefix, ragged images, LoRA. tests/nano/test_nano.py holds
this forward to the stock modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 16
HEADS = 4
KV_HEADS = 2
DIM = 32
DEPTH = 4
LAYERS = 4
DEEPSTACK_AFTER = 1  # vision block whose output feeds the deepstack merger
IMAGE_START = 3  # position of the first image token: <|im_start|> user <|vision_start|>
IMAGE_TOKENS = (GRID // 2) ** 2
PREFIX = IMAGE_START + IMAGE_TOKENS + 1  # with <|vision_end|>
TEXT_START = IMAGE_START + GRID // 2 + 1  # rope position of the first token after <|vision_end|>

Weights = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
"""Rotated keys and values (B, kv heads, S, 32) of one layer."""
Past = list[Pair]
"""Of every layer."""


@dataclass(frozen=True)
class Rope:
    """cos, sin (S, 1, 32) of a sequence."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates (B, S, heads, 32)."""
        a, b = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat([-b, a], -1) * self.sin.to(x.dtype)


def merge_order() -> Tensor:
    """(256,) raster index of each patch in the order Qwen3-VL wants them: the four patches of a
    merged token are neighbours.
    """
    half = GRID // 2
    return torch.arange(GRID * GRID).view(half, 2, half, 2).permute(0, 2, 1, 3).reshape(-1)


def patches(pixels: Tensor) -> Tensor:
    """uint8 (B, 128, 128, 3) → float32 (B, 256, 192), scaled to [-1, 1], channel first within a
    patch, in merge order.
    """
    half = GRID // 2
    x = pixels.view(-1, half, 2, 8, half, 2, 8, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.reshape(-1, GRID * GRID, 192).float() / 127.5 - 1


def vision_rope() -> Rope:
    """Row and column of each patch, in merge order."""
    spots = merge_order()
    rates = 1e4 ** (-torch.arange(0, DIM // 2, 2).float() / (DIM // 2))
    angles = torch.cat([(spots // GRID)[:, None] * rates, (spots % GRID)[:, None] * rates], 1)
    return Rope(angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None])


def text_rope(positions: Tensor) -> Rope:
    """positions (3, S): time, row, column of each token; the three share the 16 rates in the
    interleaved order T H W T H W …
    """
    rates = 1e4 ** (-torch.arange(0, DIM, 2).float() / DIM)
    axis = torch.arange(DIM // 2) % 3  # mrope_section [6, 5, 5] fills all sixteen
    angles = positions[axis].T * rates
    return Rope(angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None])


def prefix_positions() -> Tensor:
    """(3, PREFIX) positions of `<|im_start|>user<|vision_start|>` image `<|vision_end|>`."""
    cells = torch.arange(IMAGE_TOKENS)
    image = IMAGE_START + torch.stack(
        [torch.zeros_like(cells), cells // (GRID // 2), cells % (GRID // 2)]
    )
    head = torch.arange(IMAGE_START).expand(3, -1)
    return torch.cat([head, image, torch.full((3, 1), TEXT_START - 1)], 1)


def vision(weights: Weights, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """patches (B, 256, 192) → merged tokens and deepstack features, each (B, 64, 128)."""
    root = "model.visual."
    # Both temporal taps see the same image.
    kernel = weights[root + "patch_embed.proj.weight"].sum(2).flatten(1)
    x = F.linear(x.to(kernel.dtype), kernel, weights[root + "patch_embed.proj.bias"])
    x = x + weights[root + "pos_embed.weight"][merge_order()]
    deep = x
    for index in range(DEPTH):
        x = _vision_block(weights, f"{root}blocks.{index}.", x, rope)
        if index == DEEPSTACK_AFTER:
            merged = x.reshape(len(x), IMAGE_TOKENS, -1)  # its norm spans the merged patches
            deep = _merger(weights, root + "deepstack_merger_list.0.", merged)
    return _merger(weights, root + "merger.", x), deep


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def _layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], 1e-6)


def _rms_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weights[name + ".weight"], 1e-6)


def _vision_block(weights: Weights, root: str, x: Tensor, rope: Rope) -> Tensor:
    batch, length, width = x.shape
    qkv = _linear(weights, root + "attn.qkv", _layer_norm(weights, root + "norm1", x))
    qk, v = qkv.view(batch, length, 3 * HEADS, DIM).split([2 * HEADS, HEADS], 2)
    q, k = rope(qk.contiguous()).chunk(2, 2)
    mixed = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
    mixed = mixed.transpose(1, 2).reshape(batch, length, width)
    x = x + _linear(weights, root + "attn.proj", mixed)
    inner = _linear(weights, root + "mlp.linear_fc1", _layer_norm(weights, root + "norm2", x))
    inner = F.gelu(inner, approximate="tanh")
    return x + _linear(weights, root + "mlp.linear_fc2", inner)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, heads, S, 32) each → the same; `bias` (S, keys) is added to the scores. Plain products:
    on a CPU in bf16 the fused attention's backward takes ten times as long at these lengths.
    """
    scores = (q * DIM**-0.5) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def _merger(weights: Weights, root: str, x: Tensor) -> Tensor:
    """(B, 256, 128) or (B, 64, 512) → (B, 64, 128)."""
    x = _layer_norm(weights, root + "norm", x).reshape(len(x), IMAGE_TOKENS, -1)
    return _linear(weights, root + "linear_fc2", F.gelu(_linear(weights, root + "linear_fc1", x)))


def embed(weights: Weights, ids: Tensor) -> Tensor:
    """ids (B, S) → (B, S, 128)."""
    return F.embedding(ids, weights["model.language_model.embed_tokens.weight"])


def text(
    weights: Weights,
    x: Tensor,
    rope: Rope,
    bias: Tensor,
    deep: Tensor | None = None,
    past: Past | None = None,
) -> tuple[Tensor, Past]:
    """(B, S, 128) → final hidden states and each layer's rotated keys and values.

    bias: (S, past + S), 0 where a query may look and -inf elsewhere, in the weights' dtype. deep:
    (B, 64, 128), added at the image tokens after the first layer. past: keys and values (B, kv, P,
    32) per layer, as returned for the prefix.
    """
    kept = []
    for index in range(LAYERS):
        root = f"model.language_model.layers.{index}."
        normed = _rms_norm(weights, root + "input_layernorm", x)
        before = None if past is None else past[index]
        mixed, pair = _text_attention(weights, root + "self_attn.", normed, rope, bias, before)
        x = x + mixed
        normed = _rms_norm(weights, root + "post_attention_layernorm", x)
        x = x + _text_mlp(weights, root + "mlp.", normed)
        if index == 0 and deep is not None:
            x = x + F.pad(deep, (0, 0, IMAGE_START, x.shape[1] - IMAGE_START - IMAGE_TOKENS))
        kept.append(pair)
    return _rms_norm(weights, "model.language_model.norm", x), kept


def _text_attention(
    weights: Weights, root: str, x: Tensor, rope: Rope, bias: Tensor, past: Pair | None
) -> tuple[Tensor, Pair]:
    batch, length, width = x.shape
    q = _linear(weights, root + "q_proj", x).view(batch, length, HEADS, DIM)
    k = _linear(weights, root + "k_proj", x).view(batch, length, KV_HEADS, DIM)
    v = _linear(weights, root + "v_proj", x).view(batch, length, KV_HEADS, DIM).transpose(1, 2)
    q = rope(_rms_norm(weights, root + "q_norm", q)).transpose(1, 2)
    k = rope(_rms_norm(weights, root + "k_norm", k)).transpose(1, 2)
    pair = (k, v)
    k, v = pair if past is None else joined(past, pair)
    share = HEADS // KV_HEADS
    mixed = _attend(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), bias)
    mixed = mixed.transpose(1, 2).reshape(batch, length, width)
    return _linear(weights, root + "o_proj", mixed), pair


def joined(old: Pair, late: Pair) -> Pair:
    """Keys and values of what was read before and of what comes after it."""
    return torch.cat([old[0], late[0]], 2), torch.cat([old[1], late[1]], 2)


def _text_mlp(weights: Weights, root: str, x: Tensor) -> Tensor:
    gate = F.silu(_linear(weights, root + "gate_proj", x))
    return _linear(weights, root + "down_proj", gate * _linear(weights, root + "up_proj", x))


def head(weights: Weights, hidden: Tensor) -> Tensor:
    """Logits over the vocabulary; the head is the embedding table."""
    return F.linear(hidden, weights["model.language_model.embed_tokens.weight"])
