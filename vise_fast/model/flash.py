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

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import Choice

aten = torch.ops.aten
# the memory-efficient kernel's log-sum-exp has a multiple of so many rows, +inf beyond the last
# query
LSE_ROWS = 32
BIAS_ROW = 16  # elements: its biases' rows start at multiples of this
WIDTH = 8  # elements: the GPU kernels' head dimensions are multiples of this


@dataclass(frozen=True)
class Kernel:
    """forward(q, k, v, bias, causal, scale) -> (output, log-sum-exp); backward(grad, q, k, v,
    output, log-sum-exp, bias, causal, scale) -> dq, dk, dv.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def look(device: torch.device, dtype: torch.dtype) -> Choice:
    """The best path for tensors of this kind: "flash", "efficient" or "plain" (no kernel here), and
    why.
    """
    if device.type in ("cpu", "meta"):
        return Choice("flash", "torch's FlashAttention for a CPU")
    if device.type != "cuda" or torch.version.hip:
        return Choice(
            "plain",
            (
                f"{'ROCm' if torch.version.hip else device.type} has no fused attention with this "
                "log-sum-exp"
            ),
        )
    capability = torch.cuda.get_device_capability(device)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Choice("plain", f"no GPU kernel takes {str(dtype)[6:]}")
    if dtype == torch.bfloat16 and capability < (8, 0):
        return Choice(
            "plain",
            (
                "bfloat16 attention needs compute capability 8.0, this GPU has "
                f"{capability[0]}.{capability[1]}"
            ),
        )
    if dtype == torch.float32:
        return Choice(
            "efficient", "torch's memory-efficient kernel: FlashAttention takes 16 bits only"
        )
    if capability < (8, 0):
        return Choice(
            "efficient",
            (
                "torch's memory-efficient kernel: FlashAttention needs compute capability 8.0, "
                f"this GPU has {capability[0]}.{capability[1]}"
            ),
        )
    if not torch.backends.cuda.is_flash_attention_available():
        return Choice(
            "efficient",
            "torch's memory-efficient kernel: this torch was built without FlashAttention",
        )
    return Choice("flash", "torch's FlashAttention; its memory-efficient kernel for ragged banks")


choose = functools.cache(look)  # asked in every layer


def kernel(q: Tensor, bias: Tensor | None) -> Kernel:
    """The kernel for these queries; only where `choose` does not say "plain"."""
    if q.device.type != "cuda":
        return CPU
    fits = bias is None and q.shape[-1] <= 256 and choose(q.device, q.dtype).path == "flash"
    return FLASH if fits else EFFICIENT


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=_spread(bias, 1, q.shape[2]), scale=scale
    )


def _cpu_backward(grad, q, k, v, out, lse, bias, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    mask = _spread(bias, 1, q.shape[2])
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=mask, scale=scale
    )


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _check_square(q, k, causal)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        _wide(q), _wide(k), _wide(v), 0.0, causal, False, scale=scale
    )
    return out[..., : q.shape[3]], lse


def _flash_backward(grad, q, k, v, out, lse, bias, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    wide = [_wide(x) for x in (grad, q, k, v, out)]
    seed = q.new_empty(2, dtype=torch.uint64)  # of the dropout, which there is not: never read
    found = aten._scaled_dot_product_flash_attention_backward(
        *wide,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        seed,
        q.new_empty(0),
        scale=scale,
    )
    return tuple(x[..., : q.shape[3]] for x in found)


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _check_square(q, k, causal)
    mask = _spread(_aligned(bias), q.shape[1], q.shape[2])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        _wide(q), _wide(k), _wide(v), mask, True, 0.0, causal, scale=scale
    )
    return out[..., : q.shape[3]], lse[:, :, : q.shape[2]]


def _efficient_backward(
    grad, q, k, v, out, lse, bias, causal, scale
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _spread(_aligned(bias), q.shape[1], q.shape[2])
    lse = F.pad(lse, (0, -lse.shape[2] % LSE_ROWS), value=torch.inf).contiguous()
    seed = q.new_empty((), dtype=torch.int64)
    *found, _ = aten._scaled_dot_product_efficient_attention_backward(
        _wide(grad),
        _wide(q),
        _wide(k),
        _wide(v),
        mask,
        _token_major(_wide(out)),
        lse,
        seed,
        seed,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    return tuple(x[..., : q.shape[3]] for x in found)


def _check_square(q: Tensor, k: Tensor, causal: bool) -> None:
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal attention of {q.shape[2]} queries over {k.shape[2]} keys: only their own "
            "keys, one each"
        )


def _wide(x: Tensor) -> Tensor:
    """Zeros after the head dimension, up to a multiple of WIDTH: they change no score and no
    output.
    """
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


CPU = Kernel("cpu", _cpu_forward, _cpu_backward)
FLASH = Kernel("flash", _flash_forward, _flash_backward)
EFFICIENT = Kernel("efficient", _efficient_forward, _efficient_backward)
