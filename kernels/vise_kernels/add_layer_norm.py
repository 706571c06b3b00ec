"""A residual sum and the layer norm of it (Ba et al. 2016) in one pass:

    y = x + b                   z = (y - mean(y)) / sqrt(var(y) + eps) · weight + bias

Computed in float32, the norm of the rounded sum as if it had been read again. One launch on a GPU
instead of two. Left out: gradients (the vision tower is frozen).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import jit, launch, tl, triton, without_gradients

WIDEST = 4096  # columns: a program holds a row at once


class Summed(NamedTuple):
    """y and z, (n, C) each, in x's dtype."""

    sum: Tensor
    norm: Tensor


class Affine(NamedTuple):
    """weight and bias (C,) of the norm, and its eps."""

    weight: Tensor
    bias: Tensor
    eps: float


def add_layer_norm(x: Tensor, b: Tensor, affine: Affine, *, path: str | None = None) -> Summed:
    """x and b (n, C).

    Plain where gradients are wanted, for dtypes the fast path does not take and rows of more than
    4096; ValueError: shapes that do not fit, a forced `path` that cannot run.
    """
    weight, bias, eps = affine
    if (
        x.dim() != 2
        or b.shape != x.shape
        or weight.shape != x.shape[1:]
        or bias.shape != x.shape[1:]
    ):
        raise ValueError(
            f"add_layer_norm: x {tuple(x.shape)}, b {tuple(b.shape)}, weight {tuple(weight.shape)} "
            f"and bias {tuple(bias.shape)} do not fit"
        )
    chosen = without_gradients("add_layer_norm", path, x, b, weight, bias)
    if chosen == "plain" or x.shape[1] > WIDEST:
        total = x + b
        return Summed(total, F.layer_norm(total, weight.shape, weight, bias, eps))
    x = x.contiguous()
    b = b.contiguous()
    found = Summed(torch.empty_like(x), torch.empty_like(x))
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        given = (x, b, weight.contiguous(), bias.contiguous(), *found, x.shape[1], eps)
        warps = max(1, min(8, block // 256))
        launch(_kernel, (len(x),), *given, BLOCK=block, num_warps=warps)
    return found


@jit
def _kernel(x, b, weight, bias, y, z, width, eps, BLOCK: tl.constexpr):
    """Grid (n,)."""
    row = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    total = tl.load(x + row + lane, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(b + row + lane, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + row + lane, rounded, mask=inside)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    out = centred * inverse * scale + shift
    tl.store(z + row + lane, out.to(z.dtype.element_ty), mask=inside)
