"""Attention of new tokens over several banks of keys and values that rows share, with its
log-sum-exp: a CPU's forward pass.

    out[n, t] = softmax over all banks p and the tokens s that row n sees there of
                (q[n, t] . keys_p[owner_p[n], s] * scale), times the values there

The last bank may be causal: token t sees its first t + 1 tokens. The native path goes over all
banks in one softmax and copies nothing: no folded queries, no keys repeated for the heads that
share them, no parts to merge. Left out: gradients (the log-sum-exp is what a backward pass needs),
other types than float32, GPUs (vise_fast/model/attending/attention.py; one new token per row:
decode_attention.py).

Shapes: N rows, T new tokens, H query heads, KV key heads, D head dimension; bank p has M_p entries
of S_p tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.dispatch import address, compiled, threads_for, without_gradients

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
    keys = [bank.keys for bank in banks]
    values = [bank.values for bank in banks]
    if without_gradients("attention", path, q, *keys, *values) == "plain":
        return plain(q, banks, scale, causal)
    owners = [bank.owner for bank in banks]
    lengths = [bank.length for bank in banks]
    return torch.ops.vise_kernels.attention(
        q, keys, values, owners, lengths, causal=causal, scale=scale
    )


def plain(q: Tensor, banks: list[Bank], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch: each row's keys copied out, one softmax over all banks."""
    scores = []
    values = []
    for bank in banks:
        score, value = _scores(q, bank, scale)
        scores.append(score)
        values.append(value)
    if causal:
        size = (q.shape[1], banks[-1].keys.shape[2])
        later = torch.ones(size, dtype=torch.bool, device=q.device).triu(1)
        scores[-1] = scores[-1].masked_fill(later[:, None], -torch.inf)
    every = torch.cat(scores, -1)
    lse = every.logsumexp(-1)
    weights = every.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0)
    return torch.einsum("nths,nhsd->nthd", weights, torch.cat(values, 2)), lse


def _scores(q: Tensor, bank: Bank, scale: float) -> tuple[Tensor, Tensor]:
    """Scores (N,T,H,S) and values (N,H,S,D) of one bank; beyond a length -inf and zero."""
    repeat = q.shape[2] // bank.keys.shape[1]
    keys = _per_row(bank.keys, bank.owner).repeat_interleave(repeat, 1)
    values = _per_row(bank.values, bank.owner).repeat_interleave(repeat, 1)
    scores = torch.einsum("nthd,nhsd->nths", q, keys) * scale
    if bank.length is None:
        return scores, values
    length = _per_row(bank.length, bank.owner)
    beyond = torch.arange(keys.shape[2], device=q.device) >= length[:, None]
    scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    return scores, values.masked_fill(beyond[:, None, :, None], 0)


def _per_row(entries: Tensor, owner: Tensor | None) -> Tensor:
    return entries if owner is None else entries[owner]


def _native(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    owners: list[Tensor | None],
    lengths: list[Tensor | None],
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`plain` in C++, which takes banks as they lie."""
    banks = [Bank(*bank) for bank in zip(keys, values, owners, lengths, strict=True)]
    _check(q, banks)
    _check_native(q, keys, values)
    q = q.contiguous()
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3])
    # held here: the numbers are addresses, which keep nothing alive
    banks = [_ready(bank) for bank in banks]
    # a product costs less than an element that is read and written
    threads = threads_for(q.numel() * sum(bank.keys.shape[2] for bank in banks) // 32)
    rows, tokens, heads, dim = q.shape
    compiled().attention(
        q.data_ptr(),
        [rows, tokens, heads, keys[0].shape[1], dim],
        scale,
        [_numbers(bank) for bank in banks],
        causal,
        out.data_ptr(),
        lse.data_ptr(),
        threads,
    )
    return out, lse


def _ready(bank: Bank) -> Bank:
    """The bank with D and the tables contiguous."""
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in bank[:2])
    owner, length = (None if table is None else table.contiguous() for table in bank[2:])
    return Bank(keys, values, owner, length)


def _numbers(bank: Bank) -> tuple[int, int, int, int, list[int]]:
    """A bank as C++ takes it: addresses; tokens, strides of keys and of values, entries."""
    strides = [*bank.keys.stride()[:3], *bank.values.stride()[:3]]
    sizes = [bank.keys.shape[2], *strides, len(bank.keys)]
    return (
        address(bank.keys),
        address(bank.values),
        address(bank.owner),
        address(bank.length),
        sizes,
    )


def _check_native(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
    if any(t.dtype != torch.float32 for t in (q, *keys, *values)):
        raise ValueError("attention: path 'native' takes float32 on a CPU")
    if q.shape[3] % DIM_STEP:
        raise ValueError(
            f"attention: path 'native' takes head dimensions that are multiples of {DIM_STEP}, got "
            f"{q.shape[3]}"
        )


def _check(q: Tensor, banks: list[Bank]) -> None:
    if q.dim() != 4 or not banks:
        raise ValueError(
            f"attention: q must be (N,T,H,D), got {tuple(q.shape)}, over at least one bank"
        )
    for bank in banks:
        if not _fits(q, bank, banks[0]):
            raise ValueError(
                f"attention: keys {tuple(bank.keys.shape)} and values {tuple(bank.values.shape)} "
                f"do not fit q {tuple(q.shape)}"
            )
        _check_table("owner", bank.owner, len(q), q.device)
        _check_table("length", bank.length, len(bank.keys), q.device)


def _fits(q: Tensor, bank: Bank, first: Bank) -> bool:
    """One bank beside q and the first bank's key heads, of which there is at least one."""
    keys = bank.keys
    if keys.dim() != 4 or keys.shape != bank.values.shape or keys.shape[3] != q.shape[3]:
        return False
    heads = keys.shape[1]
    if heads < 1 or q.shape[2] % heads or first.keys.shape[1:2] != keys.shape[1:2]:
        return False
    return bank.owner is not None or len(keys) == len(q)


def _check_table(name: str, table: Tensor | None, size: int, device: torch.device) -> None:
    if table is None:
        return
    if table.shape != (size,) or table.dtype != torch.int64 or table.device != device:
        raise ValueError(
            f"attention: {name} must be int64 ({size},) on {device}, got {table.dtype} "
            f"{tuple(table.shape)} on {table.device}"
        )


_LIBRARY = torch.library.Library("vise_kernels", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor[] keys, Tensor[] values, Tensor?[] owners, Tensor?[] lengths, *, "
    "bool causal, float scale) -> (Tensor, Tensor)"
)
_LIBRARY.impl("attention", _native, "CPU")
