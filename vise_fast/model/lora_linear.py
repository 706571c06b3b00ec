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
from vise_kernels import rms_norm, rms_norm_backward, swiglu, swiglu_backward, up_gradient

from vise_fast.model import products, quantise

ADAPTER = "default"
# elements of a block-diagonal B: in larger ones the zeros cost more than extra calls, and a call
# costs more on a GPU
BLOCKS_UP_TO = 2**18
BLOCKS_UP_TO_ON_A_GPU = 2**20
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

    def up_of(self, module: int, widths: list[int], rank: int) -> Tensor:
        """The place (out, r) of one module's factor; widths: outs of each module."""
        if len(self.up) > 1 or len(widths) == 1:
            return self.up[module]
        start = sum(widths[:module])
        rows = self.up[0][start : start + widths[module]]
        return rows[:, module * rank : (module + 1) * rank]

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


class Copy(NamedTuple):
    """A master, where its copy in the compute dtype lies, and the factor in between."""

    source: Tensor
    target: Tensor
    scale: float


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

    def __init__(self, modules: list[Any], joins: bool = False) -> None:
        """joins: lay the LoRA down factors, in the weights' dtype, below the weights."""
        self.modules = modules
        self.bases: list[Any] = [m.base_layer if isinstance(m, LoraLayer) else m for m in modules]
        self.stacked = all(type(base) is nn.Linear for base in self.bases)
        self.adapted = isinstance(modules[0], LoraLayer)
        self.cached: Pack | None = None
        """The factors in the compute dtype, as of the last `refresh`."""
        self.joined: Tensor | None = None
        """Weights and, below them, LoRA down factors (sum of outs + k·r, in)."""
        if self.stacked:
            room = self._rank() * len(modules) if joins and self.adapted else 0
            stack, self.bias = _stack(self.bases, room)
            self.weight = stack[: sum(self._widths())]
            if room and self.bias is None:
                self.joined = stack

    @property
    def size(self) -> int:
        """Elements of the frozen weights."""
        return sum(base.in_features * base.out_features for base in self.bases)

    @torch.no_grad()
    def open(self, dtype: torch.dtype) -> list[Copy]:
        """Make the pack, once, and say what has to be copied where whenever the masters change."""
        self.cached = self.pack(dtype)
        if self.cached is None:
            return []
        if self.joined is not None:
            self._lay_below(self.cached)
        downs, ups = self.masters_by_kind()
        targets = zip(downs, self.cached.down.split(len(downs[0])), strict=True)
        copies = [Copy(source, target, 1.0) for source, target in targets]
        for index, (source, module) in enumerate(zip(ups, self.modules, strict=True)):
            target = self.cached.up_of(index, self._widths(), source.shape[1])
            copies.append(Copy(source, target, module.scaling[ADAPTER]))
        return copies

    def _lay_below(self, pack: Pack) -> None:
        """Move the down factors below the weights; not where there are several up factors."""
        if self.joined is None or len(pack.up) > 1:
            self.joined = None
            return
        below = self.joined[len(self.weight) :]
        below.copy_(pack.down)
        self.cached = Pack(below, pack.up)

    def wide(self, x: Tensor, pack: Pack | None) -> Tensor:
        """x (n, in) times the frozen weights and, with a pack, the down factors below them: (n, sum
        of outs [+ k·r]). Only where there is `joined`; no gradients.
        """
        return F.linear(x, self.weight if pack is None else self._below())

    def _below(self) -> Tensor:
        if self.joined is None:
            raise ValueError("these projections have no LoRA factors below their weights")
        return self.joined

    def _rank(self) -> int:
        return len(self.modules[0].lora_A[ADAPTER].weight)

    def pack(self, dtype: torch.dtype) -> Pack | None:
        """The LoRA factors in `dtype`; differentiable in the masters; None without adapters."""
        if not self.adapted:
            return None
        down = torch.cat([m.lora_A[ADAPTER].weight for m in self.modules])
        ups = [(m.lora_B[ADAPTER].weight * m.scaling[ADAPTER]).to(dtype) for m in self.modules]
        most = BLOCKS_UP_TO if down.device.type == "cpu" else BLOCKS_UP_TO_ON_A_GPU
        blocks = len(ups) > 1 and sum(map(len, ups)) * len(down) <= most
        return Pack(down.to(dtype), (torch.block_diag(*ups),) if blocks else tuple(ups))

    def masters(self) -> list[nn.Parameter]:
        """The fp32 factors: A of each module, then B of each."""
        downs, ups = self.masters_by_kind()
        return downs + ups

    def masters_by_kind(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """A (r, in) of each module, and B (out, r) of each."""
        downs = [m.lora_A[ADAPTER].weight for m in self.modules]
        return downs, [m.lora_B[ADAPTER].weight for m in self.modules]

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
            quantise.product_into(place, base, x)
        return y

    def _factor_gradients(self, x: Tensor, low: Tensor, grad: Tensor, down: Tensor) -> list[Tensor]:
        """Gradients of the masters, in their dtype, from x (n, in), low = grad · up (n, k·r) and
        grad (n, sum of outs).
        """
        rank = down.shape[0] // len(self.modules)
        high = F.linear(x, down)
        dtype = self.modules[0].lora_A[ADAPTER].weight.dtype
        scales = [module.scaling[ADAPTER] for module in self.modules]
        found = list(products.wide(low.T, x, dtype).split(rank))
        return found + up_gradient(grad, high, self._widths(), scales, dtype)

    def _input_gradient(self, grad: Tensor) -> Tensor:
        """grad (n, sum of outs) times the frozen weights: (n, in)."""
        if self.stacked:
            return grad @ self.weight
        first, *others = grad.split(self._widths(), 1)
        # one dequantised weight at a time
        total = first @ quantise.dequantised(self.bases[0], grad.dtype)
        for base, piece in zip(self.bases[1:], others, strict=True):
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


def _stack(bases: list[Any], room: int) -> tuple[Tensor, Tensor | None]:
    """Stack weights, with so many rows of room below them, and biases; the modules' own parameters
    become views of the stack.
    """
    if len(bases) == 1 and not room:
        return bases[0].weight, bases[0].bias
    with torch.no_grad():
        first = bases[0].weight
        below = first.new_zeros(room, first.shape[1])
        weight = torch.cat([*(base.weight for base in bases), below])
        bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        start = 0
        for base in bases:
            stop = start + base.out_features
            base.weight.data = weight[start:stop]
            if bias is not None:
                base.bias.data = bias[start:stop]
            start = stop
    return weight, bias
