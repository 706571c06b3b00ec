"""Attention outputs over several stretches of keys, merged by their log-sum-exp (Milakov &
Gimelshein 2018):

    lse = log sum_p exp(lse_p)                   out = sum_p exp(lse_p - lse) · out_p

One launch instead of a stack, a log-sum-exp, and a multiplication for each part. Parts may be views
with any strides whose last is 1: nothing is copied first. Left out: gradients (each part's backward
pass takes the merged log-sum-exp).

Shapes: N rows, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.dispatch import jit, launch, tl, triton, without_gradients

HEADS = 8  # of a Triton program
MOST = 3  # parts of one launch


class Merged(NamedTuple):
    """Output (N, T, H, D) in the parts' dtype and natural log-sum-exp (N, T, H) in float32."""

    output: Tensor
    lse: Tensor


def merge_attention(
    outputs: list[Tensor], lses: list[Tensor], *, path: str | None = None
) -> Merged:
    """outputs (N, T, H, D) and float32 lses (N, T, H) of one or more parts, over all of them.

    A part may also come as it was attended, with rows and heads in groups: (M, F, T, KV, R, D) and
    (M, F, T, KV, R), where N = M·F and H = KV·R.

    Plain where gradients are wanted or for a dtype that the fast path does not take; ValueError:
    shapes that do not fit, no part, a forced `path` that cannot run.
    """
    _check(outputs, lses)
    chosen = without_gradients("merge_attention", path, *outputs, tables=tuple(lses))
    if chosen == "plain":
        return plain([_flat(out) for out in outputs], [_flat(lse) for lse in lses])
    merged = _triton(outputs[:MOST], lses[:MOST])
    for start in range(MOST, len(outputs), MOST - 1):
        more = slice(start, start + MOST - 1)
        merged = _triton([merged.output, *outputs[more]], [merged.lse, *lses[more]])
    return merged


def plain(outputs: list[Tensor], lses: list[Tensor]) -> Merged:
    """The formula in PyTorch, weights rounded to the outputs' dtype."""
    if len(outputs) == 1:
        return Merged(outputs[0], lses[0])
    stacked = torch.stack(lses)
    total = stacked.logsumexp(0)
    weights = (stacked - total).exp_().to(outputs[0].dtype)[..., None]
    merged = outputs[0] * weights[0]
    for out, weight in zip(outputs[1:], weights[1:], strict=True):
        merged = torch.addcmul(merged, out, weight)
    return Merged(merged, total)


def _flat(x: Tensor) -> Tensor:
    """Rows and heads not in groups: (N, T, H[, D])."""
    return x.flatten(3, 4).flatten(0, 1) if x.dim() > 4 else x


def _shape(out: Tensor) -> tuple[int, ...]:
    """N, T, H and D."""
    if out.dim() == 4:
        return tuple(out.shape)
    entries, fan, tokens, keys, repeat, dim = out.shape
    return entries * fan, tokens, keys * repeat, dim


def _triton(outputs: list[Tensor], lses: list[Tensor]) -> Merged:
    if len(outputs) == 1:
        return Merged(_flat(outputs[0]), _flat(lses[0]))
    shape = _shape(outputs[0])
    rows, tokens, heads, dim = shape
    merged = Merged(
        torch.empty(shape, dtype=outputs[0].dtype, device=outputs[0].device),
        torch.empty(shape[:3], dtype=lses[0].dtype, device=lses[0].device),
    )
    if not merged.output.numel():
        return merged
    given: list[Tensor | int] = []
    for part in range(MOST):
        last = min(part, len(outputs) - 1)  # a part that is not there: never read
        given += _places(outputs[last], lses[last])
    grid = (rows * tokens, triton.cdiv(heads, HEADS))
    sizes = {"PARTS": len(outputs), "DIM": dim, "WIDE": triton.next_power_of_2(dim)}
    launch(_kernel, grid, *merged, *given, tokens, heads, **sizes, HEADS=HEADS, num_warps=4)
    return merged


def _places(out: Tensor, lse: Tensor) -> list[Tensor | int]:
    """One part's tensors, its fan and repeat, and the strides of entry, fan, token, key head and
    repeat in each.
    """
    if out.dim() == 4:
        out = out[:, None, :, :, None]
        lse = lse[:, None, :, :, None]
    if out.stride(5) != 1:
        out = out.contiguous()
    return [out, lse, out.shape[1], out.shape[4], *out.stride()[:5], *lse.stride()]


@jit
def _part(
    out,
    lse,
    fan,
    repeat,
    out_m,
    out_f,
    out_t,
    out_k,
    out_r,
    lse_m,
    lse_f,
    lse_t,
    lse_k,
    lse_r,
    row,
    token,
    head,
    inside,
    there,
):
    """Output (HEADS, WIDE) and log-sum-exp (HEADS,) of one part of one token."""
    entry = row // fan
    rank = row % fan
    key = head // repeat
    copy = head % repeat
    place = entry * lse_m + rank * lse_f + token * lse_t + key * lse_k + copy * lse_r
    value = tl.load(lse + place, mask=inside, other=0.0)
    lane = tl.arange(0, there.shape[1])
    place = entry * out_m + rank * out_f + token * out_t + key * out_k + copy * out_r
    rows = tl.load(out + place[:, None] + lane[None, :], mask=there, other=0.0)
    return rows.to(tl.float32), value


@jit
def _kernel(
    merged,
    total,
    out0,
    lse0,
    fan0,
    repeat0,
    out0_m,
    out0_f,
    out0_t,
    out0_k,
    out0_r,
    lse0_m,
    lse0_f,
    lse0_t,
    lse0_k,
    lse0_r,
    out1,
    lse1,
    fan1,
    repeat1,
    out1_m,
    out1_f,
    out1_t,
    out1_k,
    out1_r,
    lse1_m,
    lse1_f,
    lse1_t,
    lse1_k,
    lse1_r,
    out2,
    lse2,
    fan2,
    repeat2,
    out2_m,
    out2_f,
    out2_t,
    out2_k,
    out2_r,
    lse2_m,
    lse2_f,
    lse2_t,
    lse2_k,
    lse2_r,
    tokens,
    heads,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (N T, blocks of H)."""
    place = tl.program_id(0).to(tl.int64)
    row = place // tokens
    token = place % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    lane = tl.arange(0, WIDE)
    there = inside[:, None] & (lane < DIM)[None, :]
    where = (row, token, head, inside, there)
    a, lse_a = _part(
        out0,
        lse0,
        fan0,
        repeat0,
        out0_m,
        out0_f,
        out0_t,
        out0_k,
        out0_r,
        lse0_m,
        lse0_f,
        lse0_t,
        lse0_k,
        lse0_r,
        *where,
    )
    b, lse_b = _part(
        out1,
        lse1,
        fan1,
        repeat1,
        out1_m,
        out1_f,
        out1_t,
        out1_k,
        out1_r,
        lse1_m,
        lse1_f,
        lse1_t,
        lse1_k,
        lse1_r,
        *where,
    )
    top = tl.maximum(lse_a, lse_b)
    if PARTS == 3:
        c, lse_c = _part(
            out2,
            lse2,
            fan2,
            repeat2,
            out2_m,
            out2_f,
            out2_t,
            out2_k,
            out2_r,
            lse2_m,
            lse2_f,
            lse2_t,
            lse2_k,
            lse2_r,
            *where,
        )
        top = tl.maximum(top, lse_c)
    share_a = tl.exp(lse_a - top)
    share_b = tl.exp(lse_b - top)
    mass = share_a + share_b
    value = a * share_a[:, None] + b * share_b[:, None]
    if PARTS == 3:
        share_c = tl.exp(lse_c - top)
        mass += share_c
        value += c * share_c[:, None]
    to = merged + (place * heads + head[:, None]) * DIM + lane[None, :]
    tl.store(to, (value / mass[:, None]).to(merged.dtype.element_ty), mask=there)
    tl.store(total + place * heads + head, top + tl.log(mass), mask=inside)


def _check(outputs: list[Tensor], lses: list[Tensor]) -> None:
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention: {len(outputs)} outputs and {len(lses)} log-sum-exps; one or more, "
            "as many of each"
        )
    if any(out.dim() not in (4, 6) for out in outputs):
        raise ValueError("merge_attention: outputs must be (N, T, H, D), or in groups")
    shapes = {_shape(out) for out in outputs}
    if len(shapes) > 1:
        raise ValueError(f"merge_attention: outputs must be all alike, got {sorted(shapes)}")
    for out, lse in zip(outputs, lses, strict=True):
        if lse.shape != out.shape[:-1]:
            raise ValueError("merge_attention: a log-sum-exp does not fit its output")
