"""Rotary embedding (Su et al. 2021) of heads that lie side by side, halves paired as in GPT-NeoX:

    (low, high)  ->  (low cos - high sin, high cos + low sin)

In float32 and rounded once; one launch on a GPU instead of two casts and three products, one pass
on a CPU instead of five. Left out: gradients, the norm before it (heads.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from vise_kernels.dispatch import compiled, jit, launch, threads_for, tl, triton, without_gradients

HEADS = 8  # of a Triton program


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, path: str | None = None) -> Tensor:
    """x (n, H, D), rows and heads at any distance, by cos and sin (n, D / 2) in float32; (n, H, D).

    Plain where gradients are wanted or for dtypes the fast path does not take; ValueError: shapes
    that do not fit, a forced `path` that cannot run.
    """
    if x.dim() != 3 or x.shape[2] % 2 or cos.shape != sin.shape:
        raise ValueError(f"rotate: x {tuple(x.shape)}, cos {tuple(cos.shape)}: do not fit")
    if cos.shape != (len(x), x.shape[2] // 2):
        raise ValueError(f"rotate: x {tuple(x.shape)}, cos {tuple(cos.shape)}: do not fit")
    chosen = without_gradients("rotate", path, x, tables=(cos, sin))
    if chosen == "plain":
        return plain(x, cos, sin)
    x = x if x.stride(2) == 1 else x.contiguous()
    rows, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos = cos.contiguous()
    sin = sin.contiguous()
    if chosen == "native":
        tables = (cos.data_ptr(), sin.data_ptr(), out.data_ptr())
        brain = x.dtype == torch.bfloat16
        sizes = [rows, heads, dim // 2, *x.stride()[:2]]
        compiled().rotate(x.data_ptr(), sizes, *tables, brain, threads_for(out.numel()))
    elif out.numel():
        grid = (rows, triton.cdiv(heads, HEADS))
        given = (x, cos, sin, out, heads, *x.stride()[:2])
        shape = {"HALF": dim // 2, "LANES": triton.next_power_of_2(dim // 2), "HEADS": HEADS}
        launch(_kernel, grid, *given, **shape, num_warps=2)
    return out


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in PyTorch."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    low, high = wide.chunk(2, -1)
    c = cos[:, None]
    s = sin[:, None]
    out = torch.cat([low * c, high * c], -1)
    left, right = out.chunk(2, -1)
    left.addcmul_(high, s, value=-1)
    right.addcmul_(low, s)
    return out.to(x.dtype)


@jit
def _kernel(
    x,
    cos,
    sin,
    out,
    heads,
    row_stride,
    head_stride,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (n, blocks of H)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    there = lane < HALF
    mask = (head < heads)[:, None] & there[None, :]
    place = x + row * row_stride + head[:, None] * head_stride + lane[None, :]
    low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + row * HALF + lane, mask=there, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + lane, mask=there, other=0.0)[None, :]
    to = out + (row * heads + head[:, None]) * (2 * HALF) + lane[None, :]
    tl.store(to, (low * c - high * s).to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (high * c + low * s).to(out.dtype.element_ty), mask=mask)
