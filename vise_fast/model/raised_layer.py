"""A decoder layer without gradients on a GPU, in eight launches beside its attention: four products
that take the LoRA down factors along, and after each of them one kernel that raises the low-rank
term and does the next cheap step (vise_kernels/raised.py).

Between layers there are two tensors, the sum and its norm. Needs unquantised weights without biases
whose LoRA factors lie below them (`FusedLinear.joined`) and one up factor a group.
"""

from __future__ import annotations

from torch import Tensor
from vise_kernels import raised_heads, raised_norm, raised_swiglu
from vise_kernels.heads import Parts, Turn
from vise_kernels.raised import Normed

from vise_fast.model.lora_linear import FusedLinear, Norm, Pack


class RaisedLayer:
    """One layer: its four groups of projections, the norm inside and the norm that follows."""

    def __init__(self, linears: list[FusedLinear], inside: Norm, following: Norm) -> None:
        self.qkv, self.out, self.gate_up, self.down = linears
        self.inside = inside
        self.following = following
        self.width: int = self.down.bases[0].in_features

    @staticmethod
    def takes(linears: list[FusedLinear]) -> bool:
        """Whether every group is laid out for it; after their packs were made."""
        return all(linear.joined is not None for linear in linears)

    def heads(self, z: Tensor, turn: Turn, queries: int, pack: Pack | None) -> Parts:
        """q (n, H, D), k and v (n, KV, D) from the normed input (n, E)."""
        return raised_heads(self.qkv.wide(z, pack), _up(pack), turn, queries)

    def after_attention(self, x: Tensor, attended: Tensor, pack: Pack | None) -> Normed:
        """x (n, E) plus attention's way out, of attended (n, H·D), and its norm."""
        wide = self.out.wide(attended, pack)
        return raised_norm(x, wide, _up(pack), self.inside.weight, self.inside.eps)

    def mlp(self, x: Normed, gate_up: Pack | None, down: Pack | None) -> Normed:
        """The sum with the MLP's way out, and the norm that follows."""
        wide = self.gate_up.wide(x.norm, gate_up)
        inner = raised_swiglu(wide, _up(gate_up), self.width)
        wide = self.down.wide(inner, down)
        return raised_norm(x.sum, wide, _up(down), self.following.weight, self.following.eps)


def _up(pack: Pack | None) -> Tensor | None:
    return None if pack is None else pack.up[0]
