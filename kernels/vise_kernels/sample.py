"""Draw one id per row of logits by the Gumbel-max rule, with randomness that belongs to (seed,
position, id) alone.

    id = argmax_v  z_v / T + g_v
    g_v = -log(-log(1 - u_v)),    u_v = uniform from Philox(seed, position, v)

so a row's draw depends on nothing but its own logits, seed and position: not on the batch, the
row's place in it, the path or the device (two paths may differ where the best two scores agree to
float32 rounding, about 1 draw in a million). The counter-based generator is Philox2x32-7 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, whose table 2 lists seven rounds as
passing BigCrush). Leaves out top-k and top-p: the update assumes samples of the policy itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vise_kernels.dispatch import choose, compiled, jit, tl

MASK32 = 0xFFFFFFFF
MULTIPLIER = 0xD256D193  # Philox2x32's multiplier and key increment, from the paper
WEYL = 0x9E3779B9
ROUNDS = 7
# float32 rounds the topmost bits up to 1, whose noise would be minus infinity
LARGEST_U = 1 - 2.0**-24
# of u: under it -log(1 - u) by series, above it by log; float32 loses 2^-24/u the latter way
SERIES_BELOW = 0.125
BLOCK = 1024  # logits per step of a Triton program
MAX_SPLITS = 64  # programs that share a row where there are too few rows to fill the device
LOGITS_PER_THREAD = 2**17  # starting a thread takes as long as this many logits
PROGRAMS = 1024  # about eight per multiprocessor of a large GPU


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float,
    banned: Tensor | None = None,
    seed: Tensor,
    position: Tensor | int,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample `logits` (N,V): (ids (N,) int64, logprob (N,) float32 of the id in nat).

    temperature: (N,) or a number >= 0; 0 takes the largest logit, the lowest id among equals.
    banned: bool (V,), ids that are never drawn. seed: (N,) int64. position: (N,) int64 or an int,
    its low 32 bits count. The log-prob is that of softmax(logits) without the banned ids at
    temperature 1, whatever the temperature. ValueError: shapes that do not fit.
    """
    _check(logits, banned, seed)
    temperature = _per_row(temperature, seed, torch.float32)
    position = _per_row(position, seed, torch.int64)
    draws: dict[str, Callable] = {"triton": _draw, "native": _draw_native, "plain": plain}
    draw = draws[_path(logits.device, logits.dtype, path)]
    return draw(logits.detach(), temperature, banned, seed, position)


@torch.no_grad()
def plain(
    logits: Tensor, temperature: Tensor, banned: Tensor | None, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, with (N,V) temporaries; temperature and position are (N,) here."""
    z = logits.float()
    if banned is not None:
        z = z.masked_fill(banned, -torch.inf)
    noisy = temperature > 0
    inverse = 1 / torch.where(noisy, temperature, 1.0)
    noise = gumbel(uniform_bits(seed, position, z.shape[1]))
    score = z * inverse[:, None] + noise * noisy[:, None]
    ids = score.argmax(-1)
    return ids, z.gather(1, ids[:, None])[:, 0] - z.logsumexp(-1)


def uniform_bits(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """32 random bits for each (row, id), as int64 (N, vocabulary) in 0..2^32-1."""
    low, high = _philox(seed & MASK32, (seed >> 32) & MASK32, position & MASK32)
    ids = torch.arange(vocabulary, device=seed.device)
    return _philox(ids[None], high[:, None], low[:, None])[0]


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel float32 from 32 uniform bits; precise in the upper tail, which decides the
    arg-max.
    """
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=LARGEST_U)
    series = u * (
        1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7))))))
    )
    return -torch.where(u < SERIES_BELOW, series, -torch.log(1 - u)).log()


def _philox(left: Tensor, right: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox2x32-7 on int64 tensors that hold 32-bit words; products wrap modulo 2^64, which keeps
    both halves exact.
    """
    for _ in range(ROUNDS):
        product = left * MULTIPLIER
        left = ((product >> 32) ^ key ^ right) & MASK32
        right = product & MASK32
        key = (key + WEYL) & MASK32
    return left, right


@torch.no_grad()
def _draw_native(
    logits: Tensor, temperature: Tensor, banned: Tensor | None, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """`plain` in C++: exact noise only for the ids that can win."""
    z = logits.float() if banned is None else logits.float().masked_fill(banned, -torch.inf)
    z = z.contiguous()
    ids = z.new_empty(len(z), dtype=torch.int64)
    results = z.new_empty(3, len(z))
    threads = min(torch.get_num_threads(), 1 + z.numel() // LOGITS_PER_THREAD)
    per_row = (temperature.contiguous(), seed.contiguous(), position.contiguous())
    compiled().sample(z, *per_row, ids, *results, threads)
    return ids, results[0]


@torch.library.custom_op("vise_kernels::sample", mutates_args=())
def _draw(
    logits: Tensor, temperature: Tensor, banned: Tensor | None, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """`plain` on Triton: part of a row per program, then one program per row over the parts."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    ids = torch.empty_like(seed)
    logprob = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return ids, logprob
    splits = min(MAX_SPLITS, -(-PROGRAMS // rows), -(-columns // BLOCK))
    partials = logits.new_empty((3, rows, splits), dtype=torch.float32)
    best_ids = ids.new_empty((rows, splits), dtype=torch.int32)
    given = (logits, None if banned is None else banned.contiguous().view(torch.uint8))
    per_row = (temperature.contiguous(), seed.contiguous(), position.contiguous())
    sizes = (logits.stride(0), splits)
    _partial_kernel[(rows, splits)](
        *given, *per_row, partials, best_ids, columns, *sizes, BLOCK=BLOCK, num_warps=4
    )
    _merge_kernel[(rows,)](
        partials, best_ids, *given, ids, logprob, *sizes, SPLITS=MAX_SPLITS, num_warps=1
    )
    return ids, logprob


@_draw.register_fake
def _(
    logits: Tensor, temperature: Tensor, banned: Tensor | None, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(seed), logits.new_empty(len(logits), dtype=torch.float32)


@jit
def _philox_kernel(left, right, key):
    """`_philox` in unsigned 32-bit words."""
    for _ in tl.static_range(7):
        product = left.to(tl.uint64) * 0xD256D193
        left = (product >> 32).to(tl.uint32) ^ key ^ right
        right = product.to(tl.uint32)
        key = (key.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
    return left, right


@jit
def _gumbel_kernel(bits):
    """`gumbel` of unsigned 32-bit words."""
    u = tl.minimum(
        (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375
    )  # 2^-32, 1 - 2^-24
    series = u * (
        1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7))))))
    )
    return -tl.log(tl.where(u < 0.125, series, -tl.log(1 - u)))


@jit(do_not_specialize=["splits"])
def _partial_kernel(
    logits,
    banned,
    temperature,
    seed,
    position,
    partials,
    best_ids,
    columns,
    stride,
    splits,
    BLOCK: tl.constexpr,
):
    """Best score and id, and (top, total) of the softmax, of one of a row's `splits` parts; grid
    (N, splits).
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    heat = tl.load(temperature + row)
    inverse = tl.div_rn(1.0, tl.where(heat > 0, heat, 1.0))
    word = tl.load(seed + row)
    low, high = _philox_kernel(
        word.to(tl.uint32), (word >> 32).to(tl.uint32), tl.load(position + row).to(tl.uint32)
    )
    span = tl.cdiv(tl.cdiv(columns, BLOCK), splits) * BLOCK
    top = -1e30  # finite: a part of nothing but banned ids stays free of nan
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    for first in range(split * span, tl.minimum((split + 1) * span, columns), BLOCK):
        column = first + lanes
        z = tl.load(logits + row * stride + column, mask=column < columns, other=-float("inf")).to(
            tl.float32
        )
        if banned is not None:
            z = tl.where(
                tl.load(banned + column, mask=column < columns, other=1) != 0, -float("inf"), z
            )
        highest = tl.maximum(top, tl.max(z, 0))
        total = tl.exp(top - highest) * total + tl.exp(z - highest)
        top = highest
        bits, _ = _philox_kernel(
            column.to(tl.uint32),
            tl.zeros([BLOCK], tl.uint32) + high,
            tl.zeros([BLOCK], tl.uint32) + low,
        )
        score = z * inverse + tl.where(heat > 0, _gumbel_kernel(bits), 0.0)
        better = score > best  # strictly: the lowest id wins a tie
        best = tl.where(better, score, best)
        best_id = tl.where(better, column, best_id)
    out = row * splits + split
    plane = tl.num_programs(0).to(tl.int64) * splits
    winner = tl.max(best, 0)
    tl.store(partials + out, winner)
    tl.store(partials + plane + out, top)
    tl.store(partials + 2 * plane + out, tl.sum(total, 0))
    tl.store(best_ids + out, tl.min(tl.where(best == winner, best_id, 2147483647), 0))


@jit(do_not_specialize=["splits"])
def _merge_kernel(
    partials, best_ids, logits, banned, ids, logprob, stride, splits, SPLITS: tl.constexpr
):
    """The best of a row's parts and its log-prob; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SPLITS)
    inside = lanes < splits
    part = row * splits + lanes
    plane = tl.num_programs(0).to(tl.int64) * splits
    best = tl.load(partials + part, mask=inside, other=-float("inf"))
    tops = tl.load(partials + plane + part, mask=inside, other=-1e30)
    totals = tl.load(partials + 2 * plane + part, mask=inside, other=0.0)
    candidates = tl.load(best_ids + part, mask=inside, other=2147483647)
    id = tl.min(tl.where(best == tl.max(best, 0), candidates, 2147483647), 0)
    top = tl.max(tops, 0)
    z = tl.load(logits + row * stride + id).to(tl.float32)
    if banned is not None:
        z = tl.where(tl.load(banned + id) != 0, -float("inf"), z)
    tl.store(ids + row, id.to(tl.int64))
    tl.store(logprob + row, z - top - tl.log(tl.sum(tl.exp(tops - top) * totals, 0)))


@torch.compiler.assume_constant_result
def _path(device: torch.device, dtype: torch.dtype, path: str | None) -> str:
    """The path for such logits: an automatic choice falls back to plain for float64."""
    chosen = choose("sample", device, path).path
    return "plain" if path is None and dtype == torch.float64 else chosen


def _per_row(value: Tensor | float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full_like(seed, value, dtype=dtype)
    if value.shape != seed.shape:
        raise ValueError(
            f"sample: temperature and position must be numbers or {tuple(seed.shape)}, got "
            f"{tuple(value.shape)}"
        )
    return value.to(dtype)


def _check(logits: Tensor, banned: Tensor | None, seed: Tensor) -> None:
    if logits.dim() == 2 and logits.shape[1] == 0:
        raise ValueError("sample: no ids to draw from")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"sample: logits must be a float tensor (N,V), got {logits.dtype} {tuple(logits.shape)}"
        )
    if seed.shape != logits.shape[:1] or seed.dtype != torch.int64:
        raise ValueError(
            f"sample: seed must be int64 ({len(logits)},), got {seed.dtype} {tuple(seed.shape)}"
        )
    if banned is not None and (banned.shape != logits.shape[1:] or banned.dtype != torch.bool):
        raise ValueError(
            f"sample: banned must be bool ({logits.shape[1]},), got {banned.dtype} "
            f"{tuple(banned.shape)}"
        )
