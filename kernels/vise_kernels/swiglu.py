"""SwiGLU (Shazeer 2020) of gate and up side by side, and its gradient.

    z = silu(gate) · up                          silu(g) = g s,  s = 1 / (1 + exp(-g))
    dL/dgate = dz · up · s (1 + g (1 - s))       dL/dup = dz · g s

One pass over memory each way, computed in float32. Left out: other gates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import compiled, jit, launch, threads_for, tl, triton, without_gradients

BLOCK = 1024  # columns of a Triton program


def swiglu(x: Tensor, *, path: str | None = None) -> Tensor:
    """x (n, 2 w), gate and up, to (n, w) in x's dtype.

    Plain where x needs gradients or has a dtype that the fast path does not take; ValueError: a
    forced `path` that cannot run, an odd width.
    """
    rows, width = _sizes(x)
    chosen = without_gradients("swiglu", path, x)
    if chosen == "plain":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    x = x.contiguous()
    z = x.new_empty(rows, width)
    if chosen == "native":
        brain = x.dtype == torch.bfloat16
        threads = threads_for(x.numel())
        compiled().swiglu(x.data_ptr(), rows, width, z.data_ptr(), brain, threads)
    elif z.numel():
        launch(_kernel, _grid(rows, width), x, z, width, BLOCK=BLOCK)
    return z


def swiglu_backward(x: Tensor, dz: Tensor, *, path: str | None = None) -> Tensor:
    """dL/dx (n, 2 w) from dL/dz (n, w); paths, dtypes and errors as `swiglu`."""
    rows, width = _sizes(x, dz)
    chosen = without_gradients("swiglu", path, x, dz)
    if chosen == "plain":
        return plain_backward(x, dz)
    x = x.contiguous()
    dz = dz.contiguous()
    dx = torch.empty_like(x)
    if chosen == "native":
        places = (x.data_ptr(), dz.data_ptr(), rows, width, dx.data_ptr())
        compiled().swiglu_backward(*places, x.dtype == torch.bfloat16, threads_for(x.numel()))
    elif dx.numel():
        launch(_backward_kernel, _grid(rows, width), x, dz, dx, width, BLOCK=BLOCK)
    return dx


def plain_backward(x: Tensor, dz: Tensor) -> Tensor:
    """The formula in PyTorch."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    share = gate.sigmoid()
    return torch.cat([dz * up * share * (1 + gate * (1 - share)), dz * gate * share], -1).to(
        x.dtype
    )


@jit
def _kernel(x, z, width, BLOCK: tl.constexpr):
    """Grid (n, blocks of w)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + 2 * row * width + lane, mask=lane < width, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * width + lane, mask=lane < width, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(z + row * width + lane, value.to(z.dtype.element_ty), mask=lane < width)


@jit
def _backward_kernel(x, dz, dx, width, BLOCK: tl.constexpr):
    """Grid (n, blocks of w)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + 2 * row * width + lane, mask=lane < width, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * width + lane, mask=lane < width, other=0.0).to(tl.float32)
    grad = tl.load(dz + row * width + lane, mask=lane < width, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = grad * up * share * (1 + gate * (1 - share))
    of_up = grad * gate * share
    tl.store(dx + 2 * row * width + lane, of_gate.to(dx.dtype.element_ty), mask=lane < width)
    tl.store(dx + (2 * row + 1) * width + lane, of_up.to(dx.dtype.element_ty), mask=lane < width)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, BLOCK)


def _sizes(x: Tensor, dz: Tensor | None = None) -> tuple[int, int]:
    """Rows and w."""
    if x.dim() != 2 or x.shape[1] % 2 or (dz is not None and dz.shape != (len(x), x.shape[1] // 2)):
        raise ValueError(
            f"swiglu: x {tuple(x.shape)} and dz {None if dz is None else tuple(dz.shape)} do not "
            "fit"
        )
    return len(x), x.shape[1] // 2
