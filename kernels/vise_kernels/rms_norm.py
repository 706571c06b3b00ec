"""RMS norm of rows (Zhang & Sennrich 2019) with a frozen weight, and its gradient.

    z = x · r · weight                           r = 1 / sqrt(mean(x²) + eps)
    dL/dx = r · (g - x · r² · mean(g · x))       g = dL/dz · weight

The native path reads a row once from memory; PyTorch on a CPU makes five passes. On a GPU PyTorch's
own kernel is used. Left out: a gradient of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import compiled, threads_for, without_gradients


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, path: str | None = None) -> Tensor:
    """x (n, in) normed, times weight (in,): (n, in) in x's dtype.

    Plain where x needs gradients or has a dtype that the native path does not take; ValueError: a
    forced `path` that cannot run, shapes that do not fit.
    """
    rows, width = _sizes(x, weight)
    if without_gradients("rms_norm", path, x, weight) == "plain":
        return F.rms_norm(x, (width,), weight, eps)
    x = x.contiguous()
    weight = weight.contiguous()
    z = torch.empty_like(x)
    given = (x.data_ptr(), weight.data_ptr(), rows, width, eps)
    brain = x.dtype == torch.bfloat16
    compiled().rms_norm(*given, z.data_ptr(), brain, threads_for(x.numel()))
    return z


def rms_norm_backward(
    x: Tensor, weight: Tensor, dz: Tensor, eps: float, *, path: str | None = None
) -> Tensor:
    """dL/dx (n, in) from dL/dz (n, in); paths, dtypes and errors as `rms_norm`."""
    rows, width = _sizes(x, weight, dz)
    if without_gradients("rms_norm", path, x, weight, dz) == "plain":
        return plain_backward(x, weight, dz, eps)
    x = x.contiguous()
    weight = weight.contiguous()
    dz = dz.contiguous()
    dx = torch.empty_like(x)
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


def _sizes(x: Tensor, weight: Tensor, dz: Tensor | None = None) -> tuple[int, int]:
    """Rows and width."""
    if x.dim() != 2 or weight.shape != x.shape[1:] or (dz is not None and dz.shape != x.shape):
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)} and dz "
            f"{None if dz is None else tuple(dz.shape)} do not fit"
        )
    rows, width = x.shape
    return rows, width
