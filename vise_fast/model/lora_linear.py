"""One matrix product for several projections of the same input, with their LoRA terms: y = x Wᵀ +
(x Aᵀ) Bᵀ.

The projections' frozen weights are stacked into one tensor that the original modules keep as views,
so there is still one copy of every weight. The A matrices are stacked; the scaled B matrices are
set block-diagonally, one product instead of three, as long as the zeros cost less than the calls.
LoRA stays in fp32 masters owned by PEFT; a pack holds them in the compute dtype, cast once per
optimizer step. Dropout is off by design.

With gradients, a call is one autograd node from its input and the masters that computes with the
pack and saves nothing but the input: the cheap function before the product (a norm, SwiGLU, GELU),
the low-rank x Aᵀ and a quantised base's weight are computed again in the backward pass.
`FusedLinear.plain` is the same in plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from vise_kernels import rms_norm, rms_norm_backward, swiglu, swiglu_backward

from vise_fast.model import products, quantise

ADAPTER = "default"
# elements of a block-diagonal B: in larger ones the zeros cost more than extra calls
BLOCKS_UP_TO = 2**18
Before = Callable[[Tensor], Tensor]
"""What happens to the input before the product: (n, anything) to (n, in); must be cheap, for it is
done again in the backward pass.

It may bring its own `gradient(x, dz)`, dL/dx from dL/dz.
"""


class Pack(NamedTuple):
    """LoRA factors: down (k·r, in); up with alpha / r folded in: one block-diagonal (sum of outs,
    k·r), or each module's (out, r).
    """

    down: Tensor
    up: tuple[Tensor, ...]

    def factors(self) -> list[Tensor]:
        """All tensors, `down` first."""
        return [self.down, *self.up]

    def raise_(self, y: Tensor, low: Tensor) -> Tensor:
        """y (n, sum of outs) += low (n, k·r) · upᵀ."""
        if len(self.up) == 1:
            return y.addmm_(low, self.up[0].T)
        outs = y.split([len(up) for up in self.up], 1)
        lows = low.split(self.up[0].shape[1], 1)
        for out, part, up in zip(outs, lows, self.up, strict=True):
            out.addmm_(part, up.T)
        return y

    def lower(self, grad: Tensor) -> Tensor:
        """grad (n, sum of outs) · up: (n, k·r)."""
        if len(self.up) == 1:
            return grad @ self.up[0]
        pieces = grad.split([len(up) for up in self.up], 1)
        return torch.cat([piece @ up for piece, up in zip(pieces, self.up, strict=True)], 1)


@dataclass(frozen=True)
class Norm:
    """RMS norm with a frozen weight (in,)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def gradient(self, x: Tensor, dz: Tensor) -> Tensor:
        """dL/dx (n, in) from dL/dz (n, in)."""
        return rms_norm_backward(x, self.weight, dz, self.eps)


class Swiglu:
    """(n, 2·in), gate and up side by side, to silu(gate) · up (n, in)."""

    def __call__(self, x: Tensor) -> Tensor:
        return swiglu(x)

    def gradient(self, x: Tensor, dz: Tensor) -> Tensor:
        """dL/dx (n, 2·in) from dL/dz (n, in)."""
        return swiglu_backward(x, dz)


class FusedLinear:
    """Projections `modules` (nn.Linear, a bitsandbytes linear, or PEFT's wrapper of either) of one
    input, outputs side by side.
    """

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.bases: list[Any] = [m.base_layer if isinstance(m, LoraLayer) else m for m in modules]
        self.stacked = all(type(base) is nn.Linear for base in self.bases)
        self.adapted = isinstance(modules[0], LoraLayer)
        self.cached: Pack | None = None
        """The factors in the compute dtype, as of the last `refresh`."""
        if self.stacked:
            self.weight, self.bias = _stack(self.bases)

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Take over changed masters; in place, once there is a pack."""
        fresh = self.pack(dtype)
        if self.cached is None or fresh is None:
            self.cached = fresh
            return
        for held, new in zip(self.cached.factors(), fresh.factors(), strict=True):
            held.copy_(new)

    def pack(self, dtype: torch.dtype) -> Pack | None:
        """The LoRA factors in `dtype`; differentiable in the masters; None without adapters."""
        if not self.adapted:
            return None
        down = torch.cat([m.lora_A[ADAPTER].weight for m in self.modules])
        ups = [(m.lora_B[ADAPTER].weight * m.scaling[ADAPTER]).to(dtype) for m in self.modules]
        blocks = len(ups) > 1 and sum(map(len, ups)) * len(down) <= BLOCKS_UP_TO
        return Pack(down.to(dtype), (torch.block_diag(*ups),) if blocks else tuple(ups))

    def masters(self) -> list[nn.Parameter]:
        """The fp32 factors: A of each module, then B of each."""
        downs = [m.lora_A[ADAPTER].weight for m in self.modules]
        return downs + [m.lora_B[ADAPTER].weight for m in self.modules]

    def _widths(self) -> list[int]:
        """Outputs of each module."""
        return [base.out_features for base in self.bases]

    def __call__(self, x: Tensor, pack: Pack | None, before: Before | None = None) -> Tensor:
        """x (n, in), or what `before` takes, to (n, sum of outs); differentiable in x and in the
        masters that `pack` was made from.
        """
        if pack is not None and torch.is_grad_enabled():
            return _Adapted.apply(x, self, pack, before, *self.masters())
        return self._product(x if before is None else before(x), pack)

    def plain(self, x: Tensor, pack: Pack | None, before: Before | None = None) -> Tensor:
        """The same in plain autograd, differentiable in a `pack` made with gradients; keeps every
        intermediate. Unquantised bases only.
        """
        x = x if before is None else before(x)
        y = F.linear(x, self.weight, self.bias)
        if pack is None:
            return y
        return y + F.linear(F.linear(x, pack.down), torch.block_diag(*pack.up))

    def _product(self, x: Tensor, pack: Pack | None) -> Tensor:
        if self.stacked and pack is not None and len(pack.up) == 1:
            return products.adapted(x, self.weight, self.bias, pack.down, pack.up[0])
        y = self._frozen(x)
        return y if pack is None else pack.raise_(y, F.linear(x, pack.down))

    def _frozen(self, x: Tensor) -> Tensor:
        """x (n, in) through the frozen modules alone: (n, sum of outs)."""
        if self.stacked:
            return products.linear(x, self.weight, self.bias)
        widths = self._widths()
        y = x.new_empty(len(x), sum(widths))
        for base, place in zip(self.bases, y.split(widths, 1), strict=True):
            place.copy_(quantise.product(base, x))
        return y

    def _factor_gradients(self, x: Tensor, low: Tensor, grad: Tensor, down: Tensor) -> list[Tensor]:
        """Gradients of the masters, in their dtype, from x (n, in), low = grad · up (n, k·r) and
        grad (n, sum of outs).
        """
        rank = down.shape[0] // len(self.modules)
        high = F.linear(x, down)
        dtype = self.modules[0].lora_A[ADAPTER].weight.dtype
        found = list((low.T @ x).to(dtype).split(rank))
        pieces = zip(self.modules, grad.split(self._widths(), 1), high.split(rank, 1), strict=True)
        for module, piece, raised in pieces:
            found.append((piece.T @ raised).to(dtype) * module.scaling[ADAPTER])
        return found

    def _input_gradient(self, grad: Tensor) -> Tensor:
        """grad (n, sum of outs) times the frozen weights: (n, in)."""
        if self.stacked:
            return grad @ self.weight
        total = grad.new_zeros(len(grad), self.bases[0].in_features)
        for base, piece in zip(self.bases, grad.split(self._widths(), 1), strict=True):
            # one dequantised weight at a time
            total.addmm_(piece, quantise.dequantised(base, grad.dtype))
        return total


class _Adapted(torch.autograd.Function):
    """y = f(x) Wᵀ + (f(x) Aᵀ) Bᵀ with frozen W: saves x alone."""

    @staticmethod
    def forward(
        ctx, x: Tensor, linear: FusedLinear, pack: Pack, before: Before | None, *masters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        ctx.pack = pack
        ctx.before = before
        return linear._product(x if before is None else before(x), pack)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        linear = ctx.linear
        before = ctx.before
        down = ctx.pack.down
        low = ctx.pack.lower(grad)
        factors = linear._factor_gradients(x if before is None else before(x), low, grad, down)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, *factors
        dz = linear._input_gradient(grad).addmm_(low, down)
        dx = dz if before is None else _gradient(before, x, dz)
        return dx, None, None, None, *factors


def _gradient(function: Before, x: Tensor, dz: Tensor) -> Tensor:
    """dL/dx of z = function(x)."""
    if hasattr(function, "gradient"):
        return function.gradient(x, dz)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        z = function(leaf)
    return torch.autograd.grad(z, leaf, dz)[0]


def recomputed(function: Before, x: Tensor) -> Tensor:
    """function(x), saving x alone for the backward pass: for chains of cheap steps, whose
    intermediates are fp32 and larger than x.
    """
    return _Recomputed.apply(x, function) if torch.is_grad_enabled() else function(x)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function: Before) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _gradient(ctx.function, x, grad), None


def _stack(bases: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Stack weights and biases; the modules' own parameters become views of the stack."""
    if len(bases) == 1:
        return bases[0].weight, bases[0].bias
    with torch.no_grad():
        weight = torch.cat([base.weight for base in bases])
        bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        start = 0
        for base in bases:
            stop = start + base.out_features
            base.weight.data = weight[start:stop]
            if bias is not None:
                base.bias.data = bias[start:stop]
            start = stop
    return weight, bias
