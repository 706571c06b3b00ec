"""torch's fused attention kernels under one signature: output and log-sum-exp forwards, and
backwards gradients for a given log-sum-exp.

    cpu        FlashAttention for a CPU: any float dtype, a bias on keys
    flash      FlashAttention 2 on a GPU: bf16 and fp16, no bias, D up to 256 (Dao 2023)
    efficient  the memory-efficient kernel on a GPU: fp32 too, a bias on keys (Rabe & Staats 2021)

A backward pass that is given the output and log-sum-exp over *more* keys than it sees yields
exactly these keys' share of the gradients: their weights are exp(score - log-sum-exp). attention.py
merges parts that way, which F.scaled_dot_product_attention cannot express. Left out: dropout,
gradients of biases, and causal attention of unequally many queries and keys (the two GPU kernels
align that at different corners).

Shapes: q, output and gradients (B, H, L, D); keys and values (B, H, S, D); bias (B, S), additive,
of q's dtype; log-sum-exp (B, H, L) fp32, natural. Run: `pytest tests/model/test_flash.py`; with a
GPU `pytest -m gpu tests/model/test_flash.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import Choice, stands_for_a_gpu

from vise_fast.model.attending import flash_library

aten = torch.ops.aten
# rows of the memory-efficient kernel's log-sum-exp: a multiple of this, +inf beyond the last query
LSE_ROWS = 32
BIAS_ROW = 16  # elements: its biases' rows start at multiples of this
WIDTH = 8  # elements: the GPU kernels' head dimensions are multiples of this
AMPERE = (8, 0)  # compute capability


class Inputs(NamedTuple):
    """What is attended: q (B, H, L, D), keys and values (B, H, S, D), bias (B, S) or None; causal:
    query l sees the keys 0 to l.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    causal: bool
    scale: float


class Result(NamedTuple):
    """Output (B, H, L, D) in q's dtype and log-sum-exp (B, H, L) in fp32."""

    output: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """Of q, keys and values, in their shapes."""

    q: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Kernel:
    """Forward, and backward from the output's gradient (B, H, L, D). The result that `backward` is
    given may be over more keys than the inputs have.
    """

    name: str
    forward: Callable[[Inputs], Result]
    backward: Callable[[Tensor, Inputs, Result], Gradients]
    shares_heads: bool = False
    """takes fewer key heads than query heads, each for its neighbours"""


def look(device: torch.device, dtype: torch.dtype) -> Choice:
    """The best path for tensors of this kind, and why: "flash", "efficient" or "plain" (no kernel
    here).
    """
    if device.type in ("cpu", "meta"):
        return Choice("flash", "torch's FlashAttention for a CPU")
    if device.type != "cuda" or torch.version.hip:
        name = "ROCm" if torch.version.hip else device.type
        return Choice("plain", f"{name} has no fused attention with this log-sum-exp")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Choice("plain", f"no GPU kernel takes {str(dtype)[6:]}")
    capability = torch.cuda.get_device_capability(device)
    if dtype == torch.bfloat16 and capability < AMPERE:
        return Choice("plain", f"bfloat16 attention {_needs_ampere(capability)}")
    fault = _why_not_flash(dtype, capability)
    if fault is not None:
        return Choice("efficient", f"torch's memory-efficient kernel: {fault}")
    package = flash_library.of(device).reason
    return Choice("flash", f"{package}; torch's memory-efficient kernel for ragged banks")


def _why_not_flash(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    if dtype == torch.float32:
        return "FlashAttention takes 16 bits only"
    if capability < AMPERE:
        return f"FlashAttention {_needs_ampere(capability)}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    return None


def _needs_ampere(capability: tuple[int, int]) -> str:
    return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"


_looked = functools.cache(look)  # asked in every layer


_off: str | None = None


def switch_off(reason: str | None) -> None:
    """From here on attention is written out, for this reason; None: the best kernel again."""
    global _off
    _off = reason


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """`look`, remembered; tensors without data that stand for a GPU's take what a new one has."""
    if _off is not None:
        return Choice("plain", f"switched off: {_off}")
    if not stands_for_a_gpu(device):
        return _looked(device, dtype)
    kind = "efficient" if dtype == torch.float32 else "flash"
    return Choice(kind, "stands for a GPU")


def kernel(q: Tensor, bias: Tensor | None) -> Kernel:
    """The kernel for these queries; only where `choose` does not say "plain"."""
    if q.device.type != "cuda" and not stands_for_a_gpu(q.device):
        return CPU
    fits = bias is None and q.shape[-1] <= 256 and choose(q.device, q.dtype).path == "flash"
    return FLASH if fits else EFFICIENT


def _cpu_forward(x: Inputs) -> Result:
    mask = _spread(x.bias, 1, x.q.shape[2])
    return Result(
        *aten._scaled_dot_product_flash_attention_for_cpu(
            x.q, x.keys, x.values, 0.0, x.causal, attn_mask=mask, scale=x.scale
        )
    )


def _cpu_backward(grad: Tensor, x: Inputs, result: Result) -> Gradients:
    mask = _spread(x.bias, 1, x.q.shape[2])
    lse = result.lse.contiguous()
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *x[:3], result.output, lse, 0.0, x.causal, attn_mask=mask, scale=x.scale
    )
    return Gradients(*found)


def _flash_forward(x: Inputs) -> Result:
    _check_square(x)
    wide = [_wide(t) for t in x[:3]]
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        *wide, 0.0, x.causal, False, scale=x.scale
    )
    return Result(out[..., : x.q.shape[3]], lse)


def _flash_backward(grad: Tensor, x: Inputs, result: Result) -> Gradients:
    wide = [_wide(t) for t in (grad, *x[:3], result.output)]
    lse = result.lse.contiguous()
    sizes = (x.q.shape[2], x.keys.shape[2])
    # of the dropout, which there is not: never read
    seed = x.q.new_empty(2, dtype=torch.uint64)
    offset = x.q.new_empty(0)
    found = aten._scaled_dot_product_flash_attention_backward(
        *wide, lse, None, None, *sizes, 0.0, x.causal, seed, offset, scale=x.scale
    )
    return Gradients(*(t[..., : x.q.shape[3]] for t in found))


def _efficient_forward(x: Inputs) -> Result:
    _check_square(x)
    wide = [_wide(t) for t in x[:3]]
    mask = _spread(_aligned(x.bias), x.q.shape[1], x.q.shape[2])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *wide, mask, True, 0.0, x.causal, scale=x.scale
    )
    return Result(out[..., : x.q.shape[3]], lse[:, :, : x.q.shape[2]])


def _efficient_backward(grad: Tensor, x: Inputs, result: Result) -> Gradients:
    wide = [_wide(t) for t in (grad, *x[:3])]
    mask = _spread(_aligned(x.bias), x.q.shape[1], x.q.shape[2])
    out = _token_major(_wide(result.output))
    missing = -result.lse.shape[2] % LSE_ROWS
    lse = F.pad(result.lse, (0, missing), value=torch.inf).contiguous()
    seed = x.q.new_empty((), dtype=torch.int64)
    wanted = [True, True, True, False]
    *found, _ = aten._scaled_dot_product_efficient_attention_backward(
        *wide, mask, out, lse, seed, seed, 0.0, wanted, x.causal, scale=x.scale
    )
    return Gradients(*(t[..., : x.q.shape[3]] for t in found))


def _check_square(x: Inputs) -> None:
    queries = x.q.shape[2]
    keys = x.keys.shape[2]
    if x.causal and queries != keys:
        raise ValueError(
            f"causal attention of {queries} queries over {keys} keys: only their own keys, one each"
        )


def _wide(x: Tensor) -> Tensor:
    """Zeros after the head dimension up to a multiple of WIDTH: no score and no output changes."""
    return F.pad(x, (0, -x.shape[3] % WIDTH)) if x.shape[3] % WIDTH else x


def _token_major(x: Tensor) -> Tensor:
    """The same values laid out as (B, L, H, D): the memory-efficient backward computes the output's
    strides from that layout, it does not ask.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _aligned(bias: Tensor | None) -> Tensor | None:
    """The bias with rows that start at multiples of BIAS_ROW."""
    if bias is None or (bias.stride(0) % BIAS_ROW == 0 and bias.stride(1) == 1):
        return bias
    return F.pad(bias, (0, -bias.shape[1] % BIAS_ROW))[:, : bias.shape[1]]


def _spread(bias: Tensor | None, heads: int, queries: int) -> Tensor | None:
    """(B, S) as a view (B, heads, queries, S): every query of an entry sees the same keys.

    Strides are 0 where a size is 1 too: they are checked.
    """
    if bias is None:
        return None
    return bias.as_strided(
        (bias.shape[0], heads, queries, bias.shape[1]), (bias.stride(0), 0, 0, bias.stride(1))
    )


def takes_packed(q: Tensor) -> bool:
    """Whether rows of different lengths can be attended side by side, without padding: 16 bits on a
    GPU with FlashAttention.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if q.device.type != "cuda" and not stands_for_a_gpu(q.device):
        return False
    fits = q.shape[-1] <= 256 and q.shape[-1] % WIDTH == 0
    return fits and choose(q.device, q.dtype).path == "flash"


class Rows(NamedTuple):
    """Which packed tokens belong together: `ends` int32 (N + 1,), the longest row."""

    ends: Tensor
    longest: int


def packed_forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Result:
    """Causal attention within each row: q (n, H, D), k and v (n, KV, D); output (n, H, D) and
    log-sum-exp (H, n).
    """
    spans = (rows.ends, rows.ends, rows.longest, rows.longest)
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *spans, 0.0, True, False, scale=scale)
    return Result(out, lse)


def packed_backward(grad: Tensor, x: tuple[Tensor, ...], result: Result, rows: Rows, scale: float):
    """Gradients of x = (q, k, v), in their shapes."""
    spans = (rows.ends, rows.ends, rows.longest, rows.longest)
    # of the dropout, which there is not: never read
    seed = grad.new_empty(2, dtype=torch.uint64)
    return Gradients(
        *aten._flash_attention_backward(
            grad.contiguous(), *x, *result, *spans, 0.0, True, seed, grad.new_empty(0), scale=scale
        )
    )


CPU = Kernel("cpu", _cpu_forward, _cpu_backward)
FLASH = Kernel("flash", _flash_forward, _flash_backward, shares_heads=True)
EFFICIENT = Kernel("efficient", _efficient_forward, _efficient_backward)
