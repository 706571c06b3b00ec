"""Attention of new tokens over several banks of keys and values that rows share, with its
log-sum-exp: a CPU's forward pass.

    out[n, t] = softmax over all banks p and the tokens s that row n sees there of (q[n, t] .
    keys_p[owner_p[n], s] * scale), times the values there

The last bank may be causal: token t sees its first t + 1 tokens. The native path goes over all
banks in one softmax and copies nothing: no folded queries, no keys repeated for the heads that
share them, no parts to merge. Left out: gradients (the log-sum-exp is what a backward pass needs),
other types than float32, GPUs (vise_fast/attention.py; one new token per row: decode_attention.py).

Shapes: N rows, T new tokens, H query heads, KV key heads, D head dimension; bank p has M_p entries
of S_p tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.dispatch import native, threads_for, without_gradients

DIM_STEP = 16  # the native path takes head dimensions that are multiples of this


class Bank(NamedTuple):
    """keys, values (M, KV, S, D), D contiguous; owner int64 (N,): each row's entry (None: row n's
    is n); length int64 (M,): tokens seen (None: all).
    """

    keys: Tensor
    values: Tensor
    owner: Tensor | None = None
    length: Tensor | None = None


def attention(
    q: Tensor, banks: list[Bank], *, scale: float, causal: bool, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """q (N,T,H,D) over `banks`: output (N,T,H,D) and natural log-sum-exp (N,T,H), -inf where a
    query sees nothing.

    Plain where anything needs gradients, is not float32, or D is no multiple of 16; ValueError: a
    forced `path` that cannot run, shapes that do not fit, an owner beyond its bank (plain:
    PyTorch's own error).
    """
    _check(q, banks)
    if q.shape[3] % DIM_STEP and path is None:
        path = "plain"
    if without_gradients("attention", path, q, *(t for bank in banks for t in bank[:2])) == "plain":
        return plain(q, banks, scale, causal)
    return torch.ops.vise_kernels.attention(
        q, *([bank[i] for bank in banks] for i in range(4)), causal, scale
    )


def plain(q: Tensor, banks: list[Bank], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch: each row's keys copied out, one softmax over all banks."""
    scores = []
    values = []
    for index, bank in enumerate(banks, 1):
        keys, value, length = (
            x if x is None or bank.owner is None else x[bank.owner]
            for x in (bank.keys, bank.values, bank.length)
        )
        keys, value = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (keys, value))
        score = torch.einsum("nthd,nhsd->nths", q, keys) * scale
        if length is not None:
            beyond = torch.arange(keys.shape[2], device=q.device) >= length[:, None]
            score = score.masked_fill(beyond[:, None, None], -torch.inf)
            value = value.masked_fill(beyond[:, None, :, None], 0)
        if causal and index == len(banks):
            later = torch.ones(q.shape[1], keys.shape[2], dtype=torch.bool, device=q.device).triu(1)
            score = score.masked_fill(later[:, None], -torch.inf)
        scores.append(score), values.append(value)
    scores = torch.cat(scores, -1)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0)
    return torch.einsum("nths,nhsd->nthd", weights, torch.cat(values, 2)), lse


def _native(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    owners: list[Tensor | None],
    lengths: list[Tensor | None],
    causal: bool,
    scale: float,
):
    rows, tokens, heads, dim = q.shape
    if any(t.dtype != torch.float32 for t in (q, *keys, *values)):
        raise ValueError("attention: path 'native' takes float32 on a CPU")
    if dim % DIM_STEP:
        raise ValueError(
            f"attention: path 'native' takes head dimensions that are multiples of {DIM_STEP}, got "
            f"{dim}"
        )
    q, out, lse = q.contiguous(), q.new_empty(q.shape), q.new_empty(q.shape[:3])
    keys, values = (
        [x if x.stride(3) == 1 else x.contiguous() for x in bank] for bank in (keys, values)
    )
    owners, lengths = (
        [x if x is None else x.contiguous() for x in table] for table in (owners, lengths)
    )
    place = lambda x: 0 if x is None else x.data_ptr()
    banks = [
        (
            place(k),
            place(v),
            place(owner),
            place(length),
            [k.shape[2], *k.stride()[:3], *v.stride()[:3], len(k)],
        )
        for k, v, owner, length in zip(keys, values, owners, lengths, strict=True)
    ]
    threads = threads_for(
        q.numel() * sum(k.shape[2] for k in keys) // 32
    )  # a product costs less than an element that is read and written
    native().attention(
        q.data_ptr(),
        [rows, tokens, heads, keys[0].shape[1], dim],
        scale,
        banks,
        causal,
        out.data_ptr(),
        lse.data_ptr(),
        threads,
    )
    return out, lse


def _check(q: Tensor, banks: list[Bank]) -> None:
    if q.dim() != 4 or not banks:
        raise ValueError(
            f"attention: q must be (N,T,H,D), got {tuple(q.shape)}, over at least one bank"
        )
    for keys, values, owner, length in banks:
        fits = (
            keys.dim() == 4
            and keys.shape == values.shape
            and keys.shape[3] == q.shape[3]
            and keys.shape[1] == banks[0].keys.shape[1]
        )
        if not fits or q.shape[2] % keys.shape[1] or (owner is None and len(keys) != len(q)):
            raise ValueError(
                f"attention: keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit "
                f"q {tuple(q.shape)}"
            )
        for name, table, size in (("owner", owner, len(q)), ("length", length, len(keys))):
            if table is not None and (
                table.shape != (size,) or table.dtype != torch.int64 or table.device != q.device
            ):
                raise ValueError(
                    f"attention: {name} must be int64 ({size},) on {q.device}, got {table.dtype} "
                    f"{tuple(table.shape)} on {table.device}"
                )


_LIBRARY = torch.library.Library("vise_kernels", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor[] keys, Tensor[] values, Tensor?[] owners, Tensor?[] lengths, bool "
    "causal, float scale) -> (Tensor, Tensor)"
)
_LIBRARY.impl("attention", _native, "CPU")
