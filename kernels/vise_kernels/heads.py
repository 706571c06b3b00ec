"""Queries, keys and values out of one product: heads parted, queries and keys normed and rotated,
in one pass; and the way back.

    u = x · r · weight,  r = 1 / sqrt(mean(x²) + eps)
    (low, high) of u  ->  (low cos - high sin, high cos + low sin)

RMS norm over each head, then the rotary embedding (Su et al. 2021), halves paired as in GPT-NeoX.
The gradient is turned back by the same angle and goes through the norm as in rms_norm.py. Computed
in float32 throughout, rounded once. Values stay where they are. Left out: gradients of weights and
angles, models without these norms.

Shapes: n tokens, H query heads, KV key heads, D head dimension (even).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.dispatch import compiled, jit, launch, threads_for, tl, triton, without_gradients

HEADS = 8  # of a Triton program


class Turn(NamedTuple):
    """What happens to queries and keys: q_weight, k_weight (D,); cos, sin (n, D / 2), float32; eps
    of the norm.
    """

    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    eps: float


class Parts(NamedTuple):
    """q (n, H, D), k and v (n, KV, D), v a view of the product; or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor


class Sizes(NamedTuple):
    """n, H, KV and D / 2."""

    rows: int
    queries: int
    keys: int
    half: int


def heads(qkv: Tensor, turn: Turn, queries: int, *, path: str | None = None) -> Parts:
    """qkv (n, (H + 2 KV) D) parted; `queries` is H. All in qkv's dtype.

    Plain where qkv needs gradients or has a dtype that the fast path does not take; ValueError: a
    forced `path` that cannot run, shapes that do not fit.
    """
    sizes = _sizes(qkv, turn, queries)
    chosen = _path(path, qkv, turn)
    if chosen == "plain":
        return plain(qkv, turn, queries)
    rows, _, keys, half = sizes
    qkv = qkv.contiguous()
    turn = _contiguous(turn)
    q, k = (qkv.new_empty(rows, count, 2 * half) for count in (queries, keys))
    if chosen == "native":
        brain = qkv.dtype == torch.bfloat16
        tensors = _places(qkv, q, k)
        threads = threads_for(qkv.numel())
        compiled().heads(sizes, _places(*turn[:4]), turn.eps, *tensors, brain, threads)
    elif qkv.numel():
        given = (qkv, q, k, *turn, queries, keys)
        launch(_kernel, _grid(sizes), *given, **_constants(half))
    return Parts(q, k, qkv.view(rows, queries + 2 * keys, 2 * half)[:, queries + keys :])


def heads_backward(qkv: Tensor, turn: Turn, grads: Parts, *, path: str | None = None) -> Tensor:
    """dL/dqkv (n, (H + 2 KV) D) from the gradients of the parts; paths, dtypes and errors as
    `heads`.
    """
    sizes = _sizes(qkv, turn, grads.q.shape[1] if grads.q.dim() == 3 else 0)
    _check_grads(sizes, grads)
    chosen = _path(path, qkv, turn, *grads)
    if chosen == "plain":
        return plain_backward(qkv, turn, grads)
    qkv = qkv.contiguous()
    turn = _contiguous(turn)
    grads = Parts(*(grad.contiguous() for grad in grads))
    dqkv = torch.empty_like(qkv)
    if chosen == "native":
        brain = qkv.dtype == torch.bfloat16
        tensors = _places(qkv, *grads, dqkv)
        threads = threads_for(qkv.numel())
        compiled().heads_backward(sizes, _places(*turn[:4]), turn.eps, *tensors, brain, threads)
    elif qkv.numel():
        given = (qkv, *grads, *turn[:4], dqkv, turn.eps, sizes.queries, sizes.keys)
        launch(_backward_kernel, _grid(sizes), *given, **_constants(sizes.half))
    return dqkv


def plain(qkv: Tensor, turn: Turn, queries: int) -> Parts:
    """The formula in PyTorch."""
    rows, _, keys, half = _sizes(qkv, turn, queries)
    qk, v = qkv.view(rows, queries + 2 * keys, 2 * half).split([queries + keys, keys], 1)
    qk = _wide(qk)
    unit = qk * (qk.square().mean(-1, keepdim=True) + turn.eps).rsqrt()
    low, high = (unit * _weights(turn, queries, keys)).chunk(2, -1)
    cos = turn.cos[:, None]
    sin = turn.sin[:, None]
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    q, k = turned.to(qkv.dtype).split([queries, keys], 1)
    return Parts(q, k, v)


def plain_backward(qkv: Tensor, turn: Turn, grads: Parts) -> Tensor:
    """The formula in PyTorch."""
    queries = grads.q.shape[1]
    keys = grads.k.shape[1]
    low, high = _wide(torch.cat(grads[:2], 1)).chunk(2, -1)
    cos = turn.cos[:, None]
    sin = turn.sin[:, None]
    turned = torch.cat([low * cos + high * sin, high * cos - low * sin], -1)
    g = turned * _weights(turn, queries, keys)
    x = _wide(qkv).view(len(qkv), queries + 2 * keys, g.shape[-1])[:, : queries + keys]
    inverse = (x.square().mean(-1, keepdim=True) + turn.eps).rsqrt()
    dx = inverse * (g - x * inverse.square() * (g * x).mean(-1, keepdim=True))
    return torch.cat([dx.to(qkv.dtype), grads.v], 1).flatten(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weights(turn: Turn, queries: int, keys: int) -> Tensor:
    """(H + KV, D)."""
    return torch.cat([turn.q_weight.expand(queries, -1), turn.k_weight.expand(keys, -1)])


@jit
def _load(qkv, row, head, total, HALF: tl.constexpr, LANES: tl.constexpr):
    """Both halves of some heads of a row, float32, and the offsets of the first half; heads beyond
    `total` are zero.
    """
    lane = tl.arange(0, LANES)
    place = (row * total + head)[:, None] * (2 * HALF) + lane[None]
    mask = (head < total)[:, None] & (lane < HALF)[None]
    return (
        tl.load(qkv + place, mask=mask, other=0.0).to(tl.float32),
        tl.load(qkv + place + HALF, mask=mask, other=0.0).to(tl.float32),
        place,
        mask,
    )


@jit
def _turn_of(q_weight, k_weight, cos, sin, row, is_query, HALF: tl.constexpr, LANES: tl.constexpr):
    """Weights of both halves per head, cos and sin."""
    lane = tl.arange(0, LANES)
    there = lane < HALF
    low = tl.where(
        is_query[:, None],
        tl.load(q_weight + lane, mask=there, other=0.0)[None],
        tl.load(k_weight + lane, mask=there, other=0.0)[None],
    )
    high = tl.where(
        is_query[:, None],
        tl.load(q_weight + HALF + lane, mask=there, other=0.0)[None],
        tl.load(k_weight + HALF + lane, mask=there, other=0.0)[None],
    )
    c = tl.load(cos + row * HALF + lane, mask=there, other=0.0)[None]
    s = tl.load(sin + row * HALF + lane, mask=there, other=0.0)[None]
    return low.to(tl.float32), high.to(tl.float32), c, s


@jit
def _part_places(row, head, queries, keys, lane, HALF: tl.constexpr):
    """Offsets of these heads in q, k and v; only those of a head's own part mean anything."""
    q = (row * queries + head)[:, None] * (2 * HALF) + lane[None]
    k = (row * keys + head - queries)[:, None] * (2 * HALF) + lane[None]
    v = (row * keys + head - queries - keys)[:, None] * (2 * HALF) + lane[None]
    return q, k, v


@jit
def _kernel(
    qkv,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    eps,
    queries,
    keys,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (n, blocks of HEADS heads)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    low, high, _, mask = _load(qkv, row, head, queries + 2 * keys, HALF, LANES)
    w_low, w_high, c, s = _turn_of(q_weight, k_weight, cos, sin, row, head < queries, HALF, LANES)
    inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
    u_low = low * inverse * w_low
    u_high = high * inverse * w_high
    out_low = u_low * c - u_high * s
    out_high = u_high * c + u_low * s
    of_q, of_k, _ = _part_places(row, head, queries, keys, tl.arange(0, LANES), HALF)
    is_q = (head < queries)[:, None]
    is_v = (head >= queries + keys)[:, None]
    kind = q.dtype.element_ty
    tl.store(q + of_q, out_low.to(kind), mask=mask & is_q)
    tl.store(q + of_q + HALF, out_high.to(kind), mask=mask & is_q)
    tl.store(k + of_k, out_low.to(kind), mask=mask & ~is_q & ~is_v)
    tl.store(k + of_k + HALF, out_high.to(kind), mask=mask & ~is_q & ~is_v)


@jit
def _backward_kernel(
    qkv,
    dq,
    dk,
    dv,
    q_weight,
    k_weight,
    cos,
    sin,
    dqkv,
    eps,
    queries,
    keys,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (n, blocks of HEADS heads)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    low, high, place, mask = _load(qkv, row, head, queries + 2 * keys, HALF, LANES)
    w_low, w_high, c, s = _turn_of(q_weight, k_weight, cos, sin, row, head < queries, HALF, LANES)
    of_q, of_k, of_v = _part_places(row, head, queries, keys, tl.arange(0, LANES), HALF)
    is_q = (head < queries)[:, None]
    is_v = (head >= queries + keys)[:, None]
    g_low = tl.load(dq + of_q, mask=mask & is_q, other=0.0).to(tl.float32) + tl.load(
        dk + of_k, mask=mask & ~is_q & ~is_v, other=0.0
    ).to(tl.float32)
    g_high = tl.load(dq + of_q + HALF, mask=mask & is_q, other=0.0).to(tl.float32) + tl.load(
        dk + of_k + HALF, mask=mask & ~is_q & ~is_v, other=0.0
    ).to(tl.float32)
    u_low = (g_low * c + g_high * s) * w_low
    u_high = (g_high * c - g_low * s) * w_high
    inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
    share = (
        (tl.sum(u_low * low, 1) + tl.sum(u_high * high, 1))[:, None]
        * inverse
        * inverse
        / (2 * HALF)
    )
    of_v_low = tl.load(dv + of_v, mask=mask & is_v, other=0.0).to(tl.float32)
    of_v_high = tl.load(dv + of_v + HALF, mask=mask & is_v, other=0.0).to(tl.float32)
    kind = dqkv.dtype.element_ty
    tl.store(
        dqkv + place, tl.where(is_v, of_v_low, (u_low - low * share) * inverse).to(kind), mask=mask
    )
    tl.store(
        dqkv + place + HALF,
        tl.where(is_v, of_v_high, (u_high - high * share) * inverse).to(kind),
        mask=mask,
    )


def _grid(sizes: Sizes) -> tuple[int, int]:
    return sizes.rows, triton.cdiv(sizes.queries + 2 * sizes.keys, HEADS)


def _constants(half: int) -> dict[str, int]:
    return {"HALF": half, "LANES": triton.next_power_of_2(half), "HEADS": HEADS}


def _path(path: str | None, qkv: Tensor, turn: Turn, *grads: Tensor) -> str:
    weights = (turn.q_weight, turn.k_weight)
    return without_gradients("heads", path, qkv, *weights, *grads, tables=(turn.cos, turn.sin))


def _contiguous(turn: Turn) -> Turn:
    q_weight, k_weight, cos, sin = (table.contiguous() for table in turn[:4])
    return Turn(q_weight, k_weight, cos, sin, turn.eps)


def _places(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _sizes(qkv: Tensor, turn: Turn, queries: int) -> Sizes:
    """ValueError: shapes that do not fit."""
    half = turn.cos.shape[-1] if turn.cos.dim() == 2 else 0
    keys, rest = (0, 1)
    if half and qkv.dim() == 2:
        keys, rest = divmod(qkv.shape[1] - queries * 2 * half, 4 * half)
    angles = turn.cos.shape == turn.sin.shape == (*qkv.shape[:1], half)
    weights = turn.q_weight.shape == turn.k_weight.shape == (2 * half,)
    if rest or keys < 1 or queries < 0 or not angles or not weights:
        shapes = [tuple(table.shape) for table in turn[:4]]
        named = zip(Turn._fields[:4], shapes, strict=True)
        told = ", ".join(f"{name} {shape}" for name, shape in named)
        raise ValueError(
            f"heads: qkv {tuple(qkv.shape)} with {queries} query heads, {told} do not fit"
        )
    return Sizes(len(qkv), queries, keys, half)


def _check_grads(sizes: Sizes, grads: Parts) -> None:
    rows, queries, keys, half = sizes
    wanted = [(rows, count, 2 * half) for count in (queries, keys, keys)]
    shapes = [tuple(grad.shape) for grad in grads]
    if shapes != wanted:
        raise ValueError(f"heads: gradients {shapes} do not fit; {wanted} are wanted")
