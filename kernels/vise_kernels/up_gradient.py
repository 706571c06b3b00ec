"""The gradients of a group's LoRA up factors in one launch:

    dB_j = s_j · grad_jᵀ · high_j                for each module j of the group

`grad` (n, sum of outs) holds the modules' output gradients side by side, `high` (n, k·r) their
low-rank inputs. Products are summed in float32 and leave in float32, the masters' dtype. In plain
PyTorch this is a product, a cast and a scaling per module.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vise_kernels.dispatch import jit, launch, tl, triton, without_gradients

OUTS = 64  # of a Triton program
ROWS = 64  # summed at a time
MODULES = 3  # at most, of a launch


def up_gradient(
    grad: Tensor,
    high: Tensor,
    widths: list[int],
    scales: list[float],
    dtype: torch.dtype,
    *,
    path: str | None = None,
) -> list[Tensor]:
    """(out_j, r) in `dtype` for each of the k modules; grad (n, sum of widths), high (n, k·r).

    Plain where the fast path takes no such dtype, or for more than three modules. ValueError:
    shapes that do not fit, a forced `path` that cannot run.
    """
    modules = len(widths)
    fits = grad.dim() == high.dim() == 2 and len(grad) == len(high) and modules == len(scales)
    if not fits or grad.shape[1] != sum(widths) or high.shape[1] % modules:
        raise ValueError(
            f"up_gradient: grad {tuple(grad.shape)}, high {tuple(high.shape)}, widths {widths} and "
            f"{len(scales)} scales do not fit"
        )
    chosen = without_gradients("up_gradient", path, grad, high)
    if chosen == "plain" or modules > MODULES or dtype != torch.float32:
        return plain(grad, high, widths, scales, dtype)
    return _triton(grad, high, widths, scales)


def plain(
    grad: Tensor, high: Tensor, widths: list[int], scales: list[float], dtype: torch.dtype
) -> list[Tensor]:
    """The formula in PyTorch, module by module."""
    rank = high.shape[1] // len(widths)
    pieces = zip(grad.split(widths, 1), high.split(rank, 1), scales, strict=True)
    return [(piece.T @ raised).to(dtype) * scale for piece, raised, scale in pieces]


def _triton(grad: Tensor, high: Tensor, widths: list[int], scales: list[float]) -> list[Tensor]:
    rank = high.shape[1] // len(widths)
    out = torch.empty(sum(widths), rank, dtype=torch.float32, device=grad.device)
    grad = grad.contiguous()
    high = high.contiguous()
    missing = MODULES - len(widths)
    ends = [sum(widths[: j + 1]) for j in range(len(widths))]
    ends += ends[-1:] * missing
    factors = [*scales, *[0.0] * missing]
    grid = (triton.cdiv(max(widths), OUTS), len(widths))
    sizes = {"RANK": rank, "WIDE": max(16, triton.next_power_of_2(rank)), "OUTS": OUTS}
    if out.numel():
        given = (grad, high, out, len(grad), *ends, *factors)
        exact = grad.dtype == torch.float32
        launch(_kernel, grid, *given, **sizes, ROWS=ROWS, EXACT=exact, num_warps=4)
    return list(out.split(widths))


@jit
def _kernel(
    grad,
    high,
    out,
    rows,
    end0,
    end1,
    end2,
    scale0,
    scale1,
    scale2,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (blocks of the widest module's outs, modules)."""
    module = tl.program_id(1)
    modules = tl.num_programs(1)
    begin = tl.where(module == 0, 0, tl.where(module == 1, end0, end1))
    end = tl.where(module == 0, end0, tl.where(module == 1, end1, end2))
    scale = tl.where(module == 0, scale0, tl.where(module == 1, scale1, scale2))
    column = begin + tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    lane = tl.arange(0, WIDE)
    width = end2.to(tl.int64)
    total = tl.zeros([OUTS, WIDE], tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = row < rows
        left = tl.load(
            grad + row[None, :] * width + column[:, None],
            mask=there[None, :] & (column < end)[:, None],
            other=0.0,
        )
        right = tl.load(
            high + row[:, None] * (modules * RANK) + module * RANK + lane[None, :],
            mask=there[:, None] & (lane < RANK)[None, :],
            other=0.0,
        )
        if EXACT:
            total += tl.dot(left, right, input_precision="ieee")
        else:
            total += tl.dot(left, right)
    place = column.to(tl.int64)[:, None] * RANK + lane[None, :]
    inside = (column < end)[:, None] & (lane < RANK)[None, :]
    tl.store(out + place, total * scale, mask=inside)
