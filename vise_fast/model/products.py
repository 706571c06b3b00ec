"""Two products where something beats torch's own on a CPU in fp32, without gradients: few rows
against a large weight, and linear + GELU.

MKL packs the weight before it multiplies; with a few rows that takes longer than the product. On
one thread our kernel reads it once, at nearly the memory's speed, and adds the low-rank term in
passing; on several oneDNN is as quick and starts no threads. And oneDNN applies the tanh form of
GELU while the product is in the cache, where torch's own kernel is slow. The plain versions are
F.linear and F.gelu; they run wherever an operator is absent, elsewhere than on a CPU, and under
autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import mm_flop, register_flop_formula
from vise_kernels.dispatch import announce, stands_for_a_gpu
from vise_kernels.few_rows import gains

FAST = ("wide product", "gelu in a product")
"""What a GPU does in its own way, and can be switched off."""
_OFF: set[str] = set()
FEW_ROWS = range(3, 65)  # fewer: MKL streams the weight too; more: both run at the cores' speed
LARGE = 2**18  # elements of a weight; a call costs oneDNN about 10 us more than MKL


def _flops(x: tuple[int, int], weight: tuple[int, int], *args, out_shape=None, **kwargs) -> int:
    """What torch's FLOP counter says of F.linear."""
    return mm_flop(x, weight[::-1])


@register_flop_formula(torch.ops.vise_kernels.few_rows)
def _few_rows_flops(
    x, weight, bias=None, low=None, up=None, *args, out_shape=None, **kwargs
) -> int:
    return _flops(x, weight) + (0 if low is None else _flops(low, up))


@functools.cache
def _operator() -> Callable[..., Tensor] | None:
    """Linear with a function applied to its result; None where torch was built without oneDNN."""
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_linear_pointwise"):
        return None
    operator = mkldnn._linear_pointwise.default
    register_flop_formula(operator.overloadpacket)(_flops)
    return operator


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, in) times weight (out, in), plus bias (out,)."""
    if not _few(x, weight):
        return F.linear(x, weight, bias)
    if gains(x, weight):
        return torch.ops.vise_kernels.few_rows(x, weight, bias, None, None)
    operator = _operator()
    if operator is None:
        return F.linear(x, weight, bias)
    return operator(x, weight, bias, "none", [], None)


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """`linear`, plus x times down (r, in) times up (out, r)."""
    low = F.linear(x, down)
    if _few(x, weight) and gains(x, weight):
        return torch.ops.vise_kernels.few_rows(x, weight, bias, low, up)
    return linear(x, weight, bias).addmm_(low, up.T)


def wide(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left (m, k) times right (k, n) in `dtype`; 16-bit factors of a float32 result are multiplied
    as they are on a GPU and not rounded in between.
    """
    narrow = left.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    narrow = narrow and "wide product" not in _OFF
    if narrow and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    if narrow and stands_for_a_gpu(left.device):
        out = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
        size = sum(t.numel() * t.dtype.itemsize for t in (left, right, out))
        announce("mm", flops=2 * left.numel() * right.shape[1], moved=size)
        return out
    return (left @ right).to(dtype)


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU in its tanh form of x (n, in) times weight (out, in) plus bias (out,)."""
    fast = "gelu in a product" not in _OFF and _on_a_gpu(x)
    if fast and bias is not None:  # cuBLASLt's own: the tanh form
        return torch.ops.aten._addmm_activation(bias, x, weight.T, use_gelu=True)
    operator = _operator() if _applies(x) else None
    if operator is None:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return operator(x, weight, bias, "gelu", [], "tanh")


def switch_off(names: set[str]) -> None:
    """From here on these of FAST are done in plain steps; the others are as they were made."""
    _OFF.clear()
    _OFF.update(names)


def _on_a_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda" or stands_for_a_gpu(x.device)


def _few(x: Tensor, weight: Tensor) -> bool:
    return len(x) in FEW_ROWS and weight.numel() >= LARGE and _applies(x)


def _applies(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
