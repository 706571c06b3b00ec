"""What follows a projection with LoRA, in one launch: the low-rank term is raised, and the next
cheap step is done in passing.

A frozen weight and the LoRA down factors below it are one matrix, so one product gives
`wide` (n, outs + k·r): the frozen outputs and, behind them, the low-rank inputs of the k modules.

    u = wide[:, :outs] + wide[:, outs:] · upᵀ    up (outs, k·r), block-diagonal; None: no LoRA

    raised_norm      y = x + u, z = rms_norm(y) · weight          (attention's or MLP's way out)
    raised_swiglu    z = silu(gate) · up of u = [gate, up]        (MLP's way in)
    raised_heads     q, k normed and rotated, v                   (attention's way in; see heads.py)

u and everything after it is computed in float32 and rounded once. Left out: gradients (under
autograd the layers take separate steps).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vise_kernels.dispatch import jit, launch, tl, triton, without_gradients
from vise_kernels.heads import Parts, Turn
from vise_kernels.heads import plain as plain_heads

ROWS = 16  # of a Triton program: the least that a matrix product takes
COLUMNS = 128  # at a time
NORM_COLUMNS = 512  # at a time, where a program goes through whole rows
ALONE_COLUMNS = 1024  # at a time, where it has one row
FEW = 512  # rows up to which each has a program of its own


class Normed(NamedTuple):
    """The sum y (n, E) and its norm z (n, E)."""

    sum: Tensor
    norm: Tensor


def raised_norm(
    x: Tensor,
    wide: Tensor,
    up: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    path: str | None = None,
) -> Normed:
    """x (n, E), wide (n, E + r), up (E, r), weight (E,).

    Plain where gradients are wanted or for dtypes the fast path does not take; ValueError: shapes
    that do not fit, a forced `path` that cannot run.
    """
    _check("raised_norm", wide, up, x.shape[1], 1)
    if x.shape[0] != wide.shape[0] or weight.shape != x.shape[1:]:
        raise ValueError(
            f"raised_norm: x {tuple(x.shape)}, wide {tuple(wide.shape)} and weight "
            f"{tuple(weight.shape)} do not fit"
        )
    chosen = without_gradients("raised_norm", path, x, wide, up, weight)
    if chosen == "plain":
        total = x + _raised(wide, up, x.shape[1])
        return Normed(total, F.rms_norm(total, weight.shape, weight, eps))
    x = x.contiguous()
    found = Normed(torch.empty_like(x), torch.empty_like(x))
    if x.numel():
        given = (x, _rows(wide), up, weight.contiguous(), *found)
        _launch_norm(given, _strides(wide, up), eps, _constants(wide, up))
    return found


def _launch_norm(
    given: tuple, strides: tuple[int, int], eps: float, constants: dict[str, int | bool]
) -> None:
    """A program a row where there are few: else they would wait for one another on few cores."""
    rows, width = given[0].shape
    few = rows <= FEW
    most = ALONE_COLUMNS if few else NORM_COLUMNS
    enough = max(COLUMNS, triton.next_power_of_2(width))  # a matrix product takes 16 at least
    constants |= {"BLOCK": min(most, enough), "num_warps": 8}
    if not few:
        grid = (triton.cdiv(rows, ROWS),)
        launch(_norm_kernel, grid, *given, rows, width, *strides, eps, **constants)
        return
    del constants["ROWS"], constants["EXACT"]
    launch(_alone_norm_kernel, (rows,), *given, width, *strides, eps, **constants)


def raised_swiglu(
    wide: Tensor, up: Tensor | None, width: int, *, path: str | None = None
) -> Tensor:
    """wide (n, 2 w + 2 r), up (2 w, 2 r); `width` is w; (n, w). Paths, errors as `raised_norm`."""
    _check("raised_swiglu", wide, up, 2 * width, 2)
    chosen = without_gradients("raised_swiglu", path, wide, up)
    if chosen == "plain":
        gate, linear = _raised(wide, up, 2 * width).chunk(2, -1)
        return F.silu(gate) * linear
    z = wide.new_empty(len(wide), width)
    if z.numel():
        grid = (triton.cdiv(len(wide), ROWS), triton.cdiv(width, COLUMNS))
        given = (_rows(wide), up, z, len(wide), width, *_strides(wide, up))
        launch(_swiglu_kernel, grid, *given, **_constants(wide, up, 2))
    return z


def raised_heads(
    wide: Tensor, up: Tensor | None, turn: Turn, queries: int, *, path: str | None = None
) -> Parts:
    """wide (n, (H + 2 KV) D + 3 r), up ((H + 2 KV) D, 3 r); `queries` is H. All three parts have
    memory of their own. Paths and errors as `raised_norm`.
    """
    outs = wide.shape[1] - (0 if up is None else up.shape[1])
    _check("raised_heads", wide, up, outs, 3)
    dim = turn.q_weight.shape[0]
    total = outs // dim
    keys = (total - queries) // 2
    if outs != (queries + 2 * keys) * dim or dim % 2 or turn.cos.shape != (len(wide), dim // 2):
        raise ValueError(f"raised_heads: wide {tuple(wide.shape)} and the turn do not fit")
    tables = (turn.cos, turn.sin)
    chosen = without_gradients("raised_heads", path, wide, up, *turn[:2], tables=tables)
    if chosen == "plain":
        parts = plain_heads(_raised(wide, up, outs), turn, queries)
        return Parts(*(part.contiguous() for part in parts))
    found = Parts(*(wide.new_empty(len(wide), count, dim) for count in (queries, keys, keys)))
    if wide.numel():
        grid = (triton.cdiv(len(wide), ROWS), total)
        angles = [t.contiguous() for t in turn[:4]]
        given = (_rows(wide), up, *found, *angles, len(wide), queries, keys)
        halves = {"HALF": dim // 2, "LANES": max(16, triton.next_power_of_2(dim // 2))}
        constants = _constants(wide, up, 3) | halves
        del constants["BLOCK"]
        launch(_heads_kernel, grid, *given, *_strides(wide, up), turn.eps, **constants)
    return found


def _raised(wide: Tensor, up: Tensor | None, outs: int) -> Tensor:
    """u (n, outs), in wide's dtype."""
    if up is None:
        return wide[:, :outs]
    return torch.addmm(wide[:, :outs], wide[:, outs:], up.T)


@jit
def _low(wide, row, inside, at, wide_stride, RANK: tl.constexpr, LANES: tl.constexpr):
    """Low-rank inputs (ROWS, LANES) of one module, from column `at` on."""
    lane = tl.arange(0, LANES)
    mask = inside[:, None] & (lane < RANK)[None, :]
    return tl.load(wide + row[:, None] * wide_stride + at + lane[None, :], mask=mask, other=0.0)


@jit
def _lift(
    low,
    up,
    column,
    there,
    at,
    up_stride,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """low (ROWS, LANES) · upᵀ for some columns, of the module whose factors begin at `at`."""
    lane = tl.arange(0, LANES)
    mask = there[None, :] & (lane < RANK)[:, None]
    factor = tl.load(up + column[None, :] * up_stride + at + lane[:, None], mask=mask, other=0.0)
    if EXACT:
        return tl.dot(low, factor, input_precision="ieee")
    return tl.dot(low, factor)


@jit
def _norm_kernel(
    x,
    wide,
    up,
    weight,
    y,
    z,
    rows,
    width,
    wide_stride,
    up_stride,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (blocks of n,): whole rows, the sum first, read again from the cache to be normed."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    squares = tl.zeros([ROWS], tl.float32)
    if RANK > 0:
        low = _low(wide, row, inside, width, wide_stride, RANK, RANKS)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < width
        mask = inside[:, None] & there[None, :]
        place = row[:, None] * width + column[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        beside = wide + row[:, None] * wide_stride + column[None, :]
        value += tl.load(beside, mask=mask, other=0.0).to(tl.float32)
        if RANK > 0:
            value += _lift(low, up, column, there, 0, up_stride, RANK, RANKS, EXACT)
        rounded = value.to(y.dtype.element_ty)
        tl.store(y + place, rounded, mask=mask)
        wide_again = rounded.to(tl.float32)
        squares += tl.sum(wide_again * wide_again, 1)
    tl.debug_barrier()
    inverse = 1 / tl.sqrt(squares / width + eps)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < width
        mask = inside[:, None] & there[None, :]
        place = row[:, None] * width + column[None, :]
        value = tl.load(y + place, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        value *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
        tl.store(z + place, value.to(z.dtype.element_ty), mask=mask)


@jit
def _alone_norm_kernel(
    x,
    wide,
    up,
    weight,
    y,
    z,
    width,
    wide_stride,
    up_stride,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (n,): the same for a row alone, without a matrix product, which takes 16 rows."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, RANKS)
    squares = tl.zeros([BLOCK], tl.float32)
    if RANK > 0:
        place = wide + row * wide_stride + width + lane
        low = tl.load(place, mask=lane < RANK, other=0.0).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < width
        value = tl.load(x + row * width + column, mask=there, other=0.0).to(tl.float32)
        value += tl.load(wide + row * wide_stride + column, mask=there, other=0.0).to(tl.float32)
        if RANK > 0:
            mask = there[:, None] & (lane < RANK)[None, :]
            factor = up + column[:, None] * up_stride + lane[None, :]
            factor = tl.load(factor, mask=mask, other=0.0).to(tl.float32)
            value += tl.sum(factor * low[None, :], 1)
        rounded = value.to(y.dtype.element_ty)
        tl.store(y + row * width + column, rounded, mask=there)
        squares += rounded.to(tl.float32) * rounded.to(tl.float32)
    tl.debug_barrier()
    inverse = 1 / tl.sqrt(tl.sum(squares, 0) / width + eps)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < width
        value = tl.load(y + row * width + column, mask=there, other=0.0).to(tl.float32) * inverse
        value *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        tl.store(z + row * width + column, value.to(z.dtype.element_ty), mask=there)


@jit
def _swiglu_kernel(
    wide,
    up,
    z,
    rows,
    width,
    wide_stride,
    up_stride,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (blocks of n, blocks of w)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    there = column < width
    mask = inside[:, None] & there[None, :]
    place = wide + row[:, None] * wide_stride + column[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    linear = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        low = _low(wide, row, inside, 2 * width, wide_stride, RANK, RANKS)
        gate += _lift(low, up, column, there, 0, up_stride, RANK, RANKS, EXACT)
        low = _low(wide, row, inside, 2 * width + RANK, wide_stride, RANK, RANKS)
        linear += _lift(low, up, column + width, there, RANK, up_stride, RANK, RANKS, EXACT)
    value = gate * tl.sigmoid(gate) * linear
    to = z + row[:, None] * width + column[None, :]
    tl.store(to, value.to(z.dtype.element_ty), mask=mask)


@jit
def _heads_kernel(
    wide,
    up,
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    rows,
    queries,
    keys,
    wide_stride,
    up_stride,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (blocks of n, H + 2 KV): one head of some rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1)
    inside = row < rows
    lane = tl.arange(0, LANES)
    there = lane < HALF
    mask = inside[:, None] & there[None, :]
    first = head * (2 * HALF) + lane
    place = wide + row[:, None] * wide_stride + first[None, :]
    low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    module = tl.where(head < queries, 0, tl.where(head < queries + keys, 1, 2))
    if RANK > 0:
        outs = (queries + 2 * keys) * (2 * HALF)
        inner = _low(wide, row, inside, outs + module * RANK, wide_stride, RANK, RANKS)
        at = module * RANK
        low += _lift(inner, up, first, there, at, up_stride, RANK, RANKS, EXACT)
        high += _lift(inner, up, first + HALF, there, at, up_stride, RANK, RANKS, EXACT)
    if module < 2:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        inverse = (1 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
        weight = q_weight
        if module == 1:
            weight = k_weight
        low *= inverse * tl.load(weight + lane, mask=there, other=0.0).to(tl.float32)[None, :]
        high *= (
            inverse * tl.load(weight + HALF + lane, mask=there, other=0.0).to(tl.float32)[None, :]
        )
        angle = row[:, None] * HALF + lane[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    to = q + (row[:, None] * queries + head) * (2 * HALF) + lane[None, :]
    if module == 1:
        to = k + (row[:, None] * keys + head - queries) * (2 * HALF) + lane[None, :]
    if module == 2:
        to = v + (row[:, None] * keys + head - queries - keys) * (2 * HALF) + lane[None, :]
    tl.store(to, low.to(q.dtype.element_ty), mask=mask)
    tl.store(to + HALF, high.to(q.dtype.element_ty), mask=mask)


def _rows(wide: Tensor) -> Tensor:
    """With columns side by side; rows may lie apart."""
    return wide if wide.stride(1) == 1 else wide.contiguous()


def _strides(wide: Tensor, up: Tensor | None) -> tuple[int, int]:
    return _rows(wide).stride(0), 0 if up is None else up.stride(0)


def _constants(wide: Tensor, up: Tensor | None, modules: int = 1) -> dict[str, int | bool]:
    rank = 0 if up is None else up.shape[1] // modules
    return {
        "RANK": rank,
        "RANKS": max(16, triton.next_power_of_2(max(rank, 1))),
        "ROWS": ROWS,
        "BLOCK": COLUMNS,
        "EXACT": wide.dtype == torch.float32,
        "num_warps": 4,
    }


def _check(op: str, wide: Tensor, up: Tensor | None, outs: int, modules: int) -> None:
    """wide has the outs and every module's low-rank inputs, up fits."""
    behind = wide.shape[1] - outs
    ranks = 0 if up is None else up.shape[1]
    if behind != ranks or ranks % modules or (up is not None and len(up) != outs):
        raise ValueError(
            f"{op}: wide {tuple(wide.shape)} and up {None if up is None else tuple(up.shape)} do "
            f"not fit {outs} outputs of {modules} module(s)"
        )
    if up is not None and up.stride(1) != 1:
        raise ValueError(f"{op}: the columns of up must lie side by side, strides {up.stride()}")
