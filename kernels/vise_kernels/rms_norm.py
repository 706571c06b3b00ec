"""RMS norm of rows (Zhang & Sennrich 2019) with a frozen weight, and its gradient.

    z = x · r · weight                           r = 1 / sqrt(mean(x²) + eps)
    dL/dx = r · (g - x · r² · mean(g · x))       g = dL/dz · weight

The native path reads a row once from memory; PyTorch on a CPU makes five passes. The Triton path is
one launch each way, where autograd's way back is several. Left out: a gradient of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import compiled, jit, launch, threads_for, tl, triton, without_gradients

WIDEST = 4096  # columns of a Triton program at once


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, path: str | None = None) -> Tensor:
    """x (n, in) normed, times weight (in,): (n, in) in x's dtype.

    Plain where x needs gradients or has a dtype that the fast path does not take; ValueError: a
    forced `path` that cannot run, shapes that do not fit.
    """
    rows, width = _sizes(x, weight)
    chosen = without_gradients("rms_norm", path, x, weight)
    if chosen == "plain":
        return F.rms_norm(x, (width,), weight, eps)
    x = x.contiguous()
    weight = weight.contiguous()
    z = torch.empty_like(x)
    if chosen == "triton":
        if z.numel():
            launch(_kernel, (rows,), x, weight, z, width, eps, **_options(width))
        return z
    given = (x.data_ptr(), weight.data_ptr(), rows, width, eps)
    brain = x.dtype == torch.bfloat16
    compiled().rms_norm(*given, z.data_ptr(), brain, threads_for(x.numel()))
    return z


def rms_norm_backward(
    x: Tensor, weight: Tensor, dz: Tensor, eps: float, *, path: str | None = None
) -> Tensor:
    """dL/dx (n, in) from dL/dz (n, in); paths, dtypes and errors as `rms_norm`."""
    rows, width = _sizes(x, weight, dz)
    chosen = without_gradients("rms_norm", path, x, weight, dz)
    if chosen == "plain":
        return plain_backward(x, weight, dz, eps)
    x = x.contiguous()
    weight = weight.contiguous()
    dz = dz.contiguous()
    dx = torch.empty_like(x)
    if chosen == "triton":
        if dx.numel():
            launch(_backward_kernel, (rows,), x, weight, dz, dx, width, eps, **_options(width))
        return dx
    given = (x.data_ptr(), weight.data_ptr(), dz.data_ptr(), rows, width, eps)
    brain = x.dtype == torch.bfloat16
    compiled().rms_norm_backward(*given, dx.data_ptr(), brain, threads_for(x.numel()))
    return dx


def plain_backward(x: Tensor, weight: Tensor, dz: Tensor, eps: float) -> Tensor:
    """By autograd, whose kernel is the quick one on a GPU."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        z = F.rms_norm(leaf, (x.shape[-1],), weight, eps)
    return torch.autograd.grad(z, leaf, dz)[0]


@jit
def _kernel(x, weight, z, width, eps, BLOCK: tl.constexpr):
    """Grid (n,): a row a program, read again from the cache to be written."""
    row = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + lane < width
        value = tl.load(x + row + start + lane, mask=inside, other=0.0).to(tl.float32)
        squares += value * value
    inverse = 1 / tl.sqrt(tl.sum(squares, 0) / width + eps)
    for start in range(0, width, BLOCK):
        inside = start + lane < width
        value = tl.load(x + row + start + lane, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + start + lane, mask=inside, other=0.0).to(tl.float32)
        out = value * inverse * scale
        tl.store(z + row + start + lane, out.to(z.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(x, weight, dz, dx, width, eps, BLOCK: tl.constexpr):
    """Grid (n,)."""
    row = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + lane < width
        value = tl.load(x + row + start + lane, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dz + row + start + lane, mask=inside, other=0.0).to(tl.float32)
        grad *= tl.load(weight + start + lane, mask=inside, other=0.0).to(tl.float32)
        squares += value * value
        products += value * grad
    inverse = 1 / tl.sqrt(tl.sum(squares, 0) / width + eps)
    share = inverse * inverse * tl.sum(products, 0) / width
    for start in range(0, width, BLOCK):
        inside = start + lane < width
        value = tl.load(x + row + start + lane, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dz + row + start + lane, mask=inside, other=0.0).to(tl.float32)
        grad *= tl.load(weight + start + lane, mask=inside, other=0.0).to(tl.float32)
        out = inverse * (grad - value * share)
        tl.store(dx + row + start + lane, out.to(dx.dtype.element_ty), mask=inside)


def _options(width: int) -> dict[str, int]:
    """Columns a program holds at once, and its warps."""
    block = min(WIDEST, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _sizes(x: Tensor, weight: Tensor, dz: Tensor | None = None) -> tuple[int, int]:
    """Rows and width."""
    if x.dim() != 2 or weight.shape != x.shape[1:] or (dz is not None and dz.shape != x.shape):
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)} and dz "
            f"{None if dz is None else tuple(dz.shape)} do not fit"
        )
    rows, width = x.shape
    return rows, width
