"""One matrix product for several projections of the same input, with their LoRA terms: y = x Wᵀ + (x Aᵀ) Bᵀ.

The projections' frozen weights are stacked into one tensor that the original modules keep as views, so there is still one copy of
every weight. The A matrices are stacked and the scaled B matrices set block-diagonally, which turns three LoRA products into one.
LoRA stays in fp32 masters owned by PEFT; a pack casts them to the compute dtype once per optimizer step. Dropout is off by design.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTER = "default"


class Pack(NamedTuple):
    """Stacked LoRA factors: down (k·r, in), up (out, k·r) with alpha / r folded in."""

    down: Tensor
    up: Tensor


class FusedLinear:
    """Projections `modules` (nn.Linear, a bitsandbytes linear, or PEFT's wrapper of either) of one input, outputs side by side."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.bases = [m.base_layer if isinstance(m, LoraLayer) else m for m in modules]
        self.plain = all(type(base) is nn.Linear for base in self.bases)
        self.adapted = isinstance(modules[0], LoraLayer)
        if self.plain:
            self.weight, self.bias = _stack(self.bases)

    def pack(self, dtype: torch.dtype) -> Pack | None:
        """The LoRA factors in `dtype`; differentiable in the masters; None without adapters."""
        if not self.adapted:
            return None
        down = torch.cat([m.lora_A[ADAPTER].weight for m in self.modules])
        ups = [m.lora_B[ADAPTER].weight * m.scaling[ADAPTER] for m in self.modules]
        return Pack(down.to(dtype), (ups[0] if len(ups) == 1 else torch.block_diag(*ups)).to(dtype))

    def __call__(self, x: Tensor, pack: Pack | None) -> Tensor:
        """x (n, in) to (n, sum of outs)."""
        y = F.linear(x, self.weight, self.bias) if self.plain else torch.cat([base(x) for base in self.bases], -1)
        return y if pack is None else y + F.linear(F.linear(x, pack.down), pack.up)


def _stack(bases: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
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
