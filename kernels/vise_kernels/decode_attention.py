"""Attention of one new token per row over several banks of keys and values that rows share, at
addresses and lengths read on the device.

    out[n] = softmax over all banks p and tokens t < length[p, n] of
             (q[n] . keys_p[owner[p, n], t] * scale), times the values there

Everything that changes from one token, or one rollout, to the next (which entry of a bank a row
sees, how many of its tokens, where the bank lies) is data in tensors, never an argument of the
launch: a captured CUDA graph stays valid when banks move. A prefix that many rows share is never
copied. The tokens of each row are split among programs and the parts merged by their log-sum-exp
("Flash-Decoding", Dao et al. 2023). Leaves out gradients and several new tokens per row
(vise_fast/model/attending/attention.py).

Shapes: N rows, H query heads, KV key heads, D head dimension, P banks; bank p has M_p entries of
S_p tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vise_kernels.dispatch import choose, jit, tl, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 64  # tokens per step of a program, in 16 bits
TILE = 16  # rows of the smallest matrix product: the query heads of one key head are padded to it
MAX_SPLITS = 32  # programs that share a row where there are too few rows to fill the device
PROGRAMS = 264  # two per multiprocessor of a large GPU


@dataclass
class Banks:
    """keys, values: P tensors (M_p, KV, S_p, D), contiguous; owner, length int64 (P, N): the entry
    each row sees and how many of its tokens.

    table int64 (P, 3) says where the banks lie (`locate`); the Triton kernel reads it, and nothing
    else, to find them.
    """

    keys: list[Tensor]
    values: list[Tensor]
    owner: Tensor
    length: Tensor
    table: Tensor


def locate(keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The table of some banks: addresses of keys and values and the tokens per entry, int64 (P, 3),
    on the CPU. ValueError: not contiguous.
    """
    for bank in (*keys, *values):
        if not bank.is_contiguous():
            raise ValueError(
                f"decode_attention: banks must be contiguous, got {tuple(bank.shape)} with strides "
                f"{bank.stride()}"
            )
    rows = [[k.data_ptr(), v.data_ptr(), k.shape[2]] for k, v in zip(keys, values, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


def decode_attention(q: Tensor, banks: Banks, *, scale: float, path: str | None = None) -> Tensor:
    """q (N,H,D) over `banks`: (N,H,D) in q's dtype. A row that sees no token at all is zero.

    A length beyond its bank means all of it. ValueError: shapes that do not fit, and on a CPU an
    owner that is not in its bank (on a GPU looking would cost a synchronisation).
    """
    _check(q, banks)
    if choose("decode_attention", q.device, path).path == "plain":
        return plain(q, banks, scale)
    given = (x.contiguous() for x in (q, banks.owner, banks.length, banks.table))
    return _attend(*given, banks.keys[0].shape[1], scale)


def plain(q: Tensor, banks: Banks, scale: float) -> Tensor:
    """The formula in PyTorch: each row's keys copied out, one softmax over all banks, in fp32."""
    scores = []
    values = []
    every = zip(banks.keys, banks.values, banks.owner, banks.length, strict=True)
    for keys, bank, owner, length in every:
        repeat = q.shape[1] // keys.shape[1]
        k, v = (x[owner].float().repeat_interleave(repeat, 1) for x in (keys, bank))
        hidden = torch.arange(k.shape[2], device=q.device) >= length[:, None]
        score = torch.einsum("nhd,nhtd->nht", q.float(), k) * scale
        scores.append(score.masked_fill(hidden[:, None], -torch.inf))
        # what was never written may be nan
        values.append(v.masked_fill(hidden[:, None, :, None], 0))
    weights = torch.cat(scores, -1).softmax(-1).nan_to_num(0.0)
    return torch.einsum("nht,nhtd->nhd", weights, torch.cat(values, 2)).to(q.dtype)


@torch.library.custom_op("vise_kernels::decode_attention", mutates_args=())
def _attend(
    q: Tensor, owner: Tensor, length: Tensor, table: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """`plain` on Triton: part of a row's tokens per program, then one program per head over the
    parts.
    """
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (rows * kv_heads)))
    partial = q.new_empty((rows, heads, splits, dim), dtype=torch.float32)
    lse = q.new_empty((rows, heads, splits), dtype=torch.float32)
    wide = triton.next_power_of_2(dim)
    group = heads // kv_heads
    tile = max(TILE, triton.next_power_of_2(group))
    sizes = {"BANKS": len(table), "GROUP": group, "TILE": tile, "DIM": dim, "WIDE": max(wide, 16)}
    _partial_kernel[(rows, kv_heads, splits)](
        q, owner, length, table, partial, lse, scale, **sizes, **block_of(q.dtype)
    )
    sizes = {"SPLITS": splits, "LANES": triton.next_power_of_2(splits), "DIM": dim, "WIDE": wide}
    _merge_kernel[(rows * heads,)](partial, lse, out, **sizes, num_warps=1)
    return out


def block_of(dtype: torch.dtype) -> dict[str, int]:
    """Tokens a step of a program takes, its warps and stages; in float32 half as many tokens, so
    that shared memory and registers of every card suffice.
    """
    if dtype == torch.float32:
        return {"BLOCK": BLOCK // 2, "num_warps": 8, "num_stages": 2}
    return {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 3}


@_attend.register_fake
def _(
    q: Tensor, owner: Tensor, length: Tensor, table: Tensor, kv_heads: int, scale: float
) -> Tensor:
    return torch.empty_like(q)


@jit
def _partial_kernel(
    q,
    owner,
    length,
    table,
    partial,
    lse,
    scale,
    BANKS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax-weighted values and log-sum-exp over one part of a row's tokens, for the query heads
    of one key head; grid (N, KV, splits).
    """
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.num_programs(0)
    kv_heads = tl.num_programs(1)
    splits = tl.num_programs(2)
    member = tl.arange(0, TILE)
    lane = tl.arange(0, WIDE)
    token = tl.arange(0, BLOCK)
    head = (row * kv_heads + kv) * GROUP + member
    mine = (member < GROUP)[:, None] & (lane < DIM)[None]
    asked = tl.load(q + head[:, None] * DIM + lane[None], mask=mine, other=0.0)
    top = tl.full([TILE], -1e30, tl.float32)  # finite: a part without tokens stays free of nan
    total = tl.zeros([TILE], tl.float32)
    found = tl.zeros([TILE, WIDE], tl.float32)
    for bank in tl.static_range(BANKS):
        entry = tl.load(owner + bank * rows + row)
        room = tl.load(table + bank * 3 + 2)
        count = tl.minimum(tl.load(length + bank * rows + row), room)
        start = (entry * kv_heads + kv) * room * DIM
        keys = tl.load(table + bank * 3).to(tl.pointer_type(q.dtype.element_ty)) + start
        values = tl.load(table + bank * 3 + 1).to(tl.pointer_type(q.dtype.element_ty)) + start
        span = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
        for first in range(split * span, tl.minimum((split + 1) * span, count), BLOCK):
            there = first + token
            inside = (there < count)[:, None] & (lane < DIM)[None]
            place = there[:, None] * DIM + lane[None]
            k = tl.load(keys + place, mask=inside, other=0.0)
            score = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
            score = tl.where((there < count)[None], score, -float("inf"))
            highest = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp(score - highest[:, None])
            shrink = tl.exp(top - highest)
            total = total * shrink + tl.sum(weight, 1)
            v = tl.load(values + place, mask=inside, other=0.0)
            found = found * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            top = highest
    some = total > 0
    out = head * splits + split
    tl.store(
        partial + out[:, None] * DIM + lane[None],
        found / tl.where(some, total, 1.0)[:, None],
        mask=mine,
    )
    tl.store(
        lse + out,
        tl.where(some, top + tl.log(tl.where(some, total, 1.0)), -1e30),
        mask=member < GROUP,
    )


@jit
def _merge_kernel(
    partial,
    lse,
    out,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The parts of one row's head, weighted by the share of the softmax mass each holds; grid (N *
    H,).
    """
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, LANES)
    lane = tl.arange(0, WIDE)
    mass = tl.load(lse + head * SPLITS + part, mask=part < SPLITS, other=-1e30)
    share = tl.where(mass > -1e29, tl.exp(mass - tl.max(mass, 0)), 0.0)
    place = (head * SPLITS + part)[:, None] * DIM + lane[None]
    values = tl.load(partial + place, mask=(part < SPLITS)[:, None] & (lane < DIM)[None], other=0.0)
    merged = tl.sum(values * share[:, None], 0) / tl.maximum(tl.sum(share, 0), 1e-30)
    tl.store(out + head * DIM + lane, merged.to(out.dtype.element_ty), mask=lane < DIM)


def _check(q: Tensor, banks: Banks) -> None:
    if q.dim() != 3 or q.dtype not in DTYPES:
        raise ValueError(
            f"decode_attention: q must be a float tensor (N,H,D), got {q.dtype} {tuple(q.shape)}"
        )
    if not banks.keys:
        raise ValueError("decode_attention: needs at least one bank")
    for name, width in (("owner", len(q)), ("length", len(q)), ("table", 3)):
        _check_numbers(name, getattr(banks, name), (len(banks.keys), width))
    for keys, values in zip(banks.keys, banks.values, strict=True):
        if not _fits(q, keys, values, banks.keys[0]):
            raise ValueError(
                f"decode_attention: keys {tuple(keys.shape)} {keys.dtype} and values "
                f"{tuple(values.shape)} do not fit q {tuple(q.shape)} {q.dtype}"
            )
    if q.device.type == "cpu":
        _check_owners(banks)


def _check_numbers(name: str, numbers: Tensor, want: tuple[int, int]) -> None:
    if numbers.shape != want or numbers.dtype != torch.int64:
        raise ValueError(
            f"decode_attention: {name} must be int64 {want}, got {numbers.dtype} "
            f"{tuple(numbers.shape)}"
        )


def _fits(q: Tensor, keys: Tensor, values: Tensor, first: Tensor) -> bool:
    """One bank beside q and the first bank's key heads, of which there is at least one."""
    if keys.dim() != 4 or keys.shape != values.shape or keys.dtype != q.dtype:
        return False
    heads = keys.shape[1]
    if heads < 1 or q.shape[1] % heads or first.shape[1:2] != keys.shape[1:2]:
        return False
    return keys.shape[3] == q.shape[2]


def _check_owners(banks: Banks) -> None:
    for bank, keys in enumerate(banks.keys):
        owner = banks.owner[bank]
        outside = (owner < 0) | (owner >= len(keys))
        if bool((outside & (banks.length[bank] > 0)).any()):
            raise ValueError(
                f"decode_attention: owner of bank {bank} must lie in 0..{len(keys) - 1}"
            )
