"""The product of a few rows and a large weight: y = x Wᵀ + b, as each decode step does dozens of.

Such a product costs the reading of the weight. Libraries arrange the weight for the multiplier first, which pays with hundreds of rows and
costs more than the product with a few; the native path reads it once, in order, with the lines that come next asked for in advance. One
thread: starting others for each product takes what they save. Left out: gradients and other types than float32, for which there is F.linear.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vise_kernels.dispatch import choose, native

ROWS = range(3, 41)  # one and two: PyTorch streams the weight too; more: libraries are as quick
LARGE = 2**18  # elements of a weight; smaller ones lie in the cache, arranged or not
NEAR = 24_576  # elements of x; more do not stay in the cache while the weight passes


def gains(x: Tensor, weight: Tensor) -> bool:
    """Whether the native path is there, can take these operands and is the quicker one for them."""
    sized = len(x) in ROWS and x.numel() <= NEAR and weight.numel() >= LARGE and torch.get_num_threads() == 1
    return sized and _obstacle(x, weight, None) is None and choose("few_rows", x.device).path == "native"


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, path: str | None = None) -> Tensor:
    """x (n, in) times weight (out, in), plus bias (out,): (n, out). Native where it `gains`, else PyTorch's own product.

    `path` forces "plain" or "native"; ValueError where that cannot run: operands that do not fit, are not float32 on a CPU, or carry gradients.
    """
    if path is None:
        path = "native" if gains(x, weight) else "plain"
    if choose("few_rows", x.device, path).path == "plain":
        return F.linear(x, weight, bias)
    obstacle = _obstacle(x, weight, bias)
    if obstacle:
        raise ValueError(f"few_rows: path {path!r} cannot run here: {obstacle}")
    return torch.ops.vise_kernels.few_rows(x, weight, bias)


def _obstacle(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the native path cannot take these operands, or None."""
    operands = [t for t in (x, weight, bias) if t is not None]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in operands):
        return "it takes float32 on a CPU"
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return "it has no gradients"
    return None


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (rows, width), outs = x.shape, len(weight)
    if weight.shape != (outs, width) or (bias is not None and bias.shape != (outs,)):
        raise ValueError(f"few_rows: x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} do not fit")
    x, weight, y = x.contiguous(), weight.contiguous(), x.new_empty(rows, outs)
    bias = None if bias is None else bias.contiguous()
    native().few_rows(x.data_ptr(), rows, width, weight.data_ptr(), outs, 0 if bias is None else bias.data_ptr(), y.data_ptr())
    return y


# Registered by hand: a call of torch.library.custom_op takes tens of microseconds, and a decode step makes dozens.
_LIBRARY = torch.library.Library("vise_kernels", "FRAGMENT")
_LIBRARY.define("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("few_rows", _native, "CPU")
