"""The product of a few rows and a large weight, with its low-rank term: y = x Wᵀ + b + low upᵀ, as
each decode step does dozens of.

Such a product costs the reading of the weight. Libraries arrange the weight for the multiplier
first, which pays with hundreds of rows and costs more than the product with a few; the native path
arranges x instead and reads the weight once, in order, with the lines that come next asked for in
advance. One thread: starting others for each product takes what they save. Left out: gradients and
other types than float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import address, compiled, without_gradients

ROWS = range(3, 65)  # one and two: PyTorch streams the weight too; more: libraries are as quick
LARGE = 2**18  # elements of a weight; smaller ones lie in the cache, arranged or not
NEAR = 2**17  # elements of x; more do not stay in the second cache while the weight passes


def gains(x: Tensor, weight: Tensor) -> bool:
    """Whether the native path is there, can take these operands and is the quicker one for them."""
    sized = (
        len(x) in ROWS
        and x.numel() <= NEAR
        and weight.numel() >= LARGE
        and torch.get_num_threads() == 1
    )
    return sized and without_gradients("few_rows", None, x, weight) == "native"


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    *,
    path: str | None = None,
) -> Tensor:
    """x (n, in) times weight (out, in), plus bias (out,), plus low (n, r) times up (out, r): (n,
    out). Native where it `gains`, else PyTorch's own.

    `path` forces "plain" or "native"; ValueError where that cannot run: operands that do not fit,
    are not float32 on a CPU, or carry gradients.
    """
    if (low is None) != (up is None):
        raise ValueError("few_rows: low and up do not fit: one is there without the other")
    if path is None:
        path = "native" if gains(x, weight) else "plain"
    if without_gradients("few_rows", path, x, weight, bias, low, up) == "native":
        return torch.ops.vise_kernels.few_rows(x, weight, bias, low, up)
    y = F.linear(x, weight, bias)
    if low is None or up is None:
        return y
    return y + F.linear(low, up)


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    _check(x, weight, bias, low, up)
    rows, width = x.shape
    outs = len(weight)
    rank = 0 if low is None else low.shape[1]
    y = x.new_empty(rows, outs)
    x = x.contiguous()
    weight = weight.contiguous()
    # held here: an address keeps nothing alive
    bias, low, up = (None if t is None else t.contiguous() for t in (bias, low, up))
    compiled().few_rows(
        address(x),
        rows,
        width,
        address(weight),
        outs,
        address(bias),
        address(low),
        rank,
        address(up),
        address(y),
    )
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> None:
    operands = (x, weight, bias, low, up)
    if any(t.dtype != torch.float32 for t in operands if t is not None):
        raise ValueError("few_rows: path 'native' takes float32 on a CPU")
    fits = (
        x.dim() == weight.dim() == 2
        and weight.shape[1] == x.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and _low_rank_fits(x, weight, low, up)
    )
    if not fits:
        shapes = [None if t is None else tuple(t.shape) for t in operands]
        told = ", ".join(f"{name} {shape}" for name, shape in zip(_NAMES, shapes, strict=True))
        raise ValueError(f"few_rows: {told} do not fit")


def _low_rank_fits(x: Tensor, weight: Tensor, low: Tensor | None, up: Tensor | None) -> bool:
    if low is None or up is None:
        return low is up
    rank = low.shape[-1:]
    return low.shape == (*x.shape[:1], *rank) and up.shape == (*weight.shape[:1], *rank)


_NAMES = ("x", "weight", "bias", "low", "up")
# Registered by hand: a call of torch.library.custom_op takes tens of microseconds, and a decode
# step makes dozens.
_LIBRARY = torch.library.Library("vise_kernels", "FRAGMENT")
_LIBRARY.define(
    "few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? low, Tensor? up) -> Tensor"
)
_LIBRARY.impl("few_rows", _native, "CPU")
