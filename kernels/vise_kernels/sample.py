"""Draw one id per row of logits by the Gumbel-max rule, with randomness that belongs to (seed, position, id) alone.

    id = argmax_v  z_v / T + g_v,    g_v = -log(-log(1 - u_v)),    u_v = uniform from Philox(seed, position, v)

so a row's draw depends on nothing but its own logits, seed and position: not on the batch, the row's place in it, the
path or the device (two paths may differ where the best two scores agree to float32 rounding, about 1 draw in a million).
The counter-based generator is Philox2x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, whose
table 2 lists seven rounds as passing BigCrush). Leaves out top-k and top-p: the update assumes samples of the policy itself.
"""

import torch
from torch import Tensor

from vise_kernels.dispatch import choose

MASK32 = 0xFFFFFFFF
MULTIPLIER = 0xD256D193  # Philox2x32's multiplier and key increment, from the paper
WEYL = 0x9E3779B9
ROUNDS = 7
LARGEST_U = 1 - 2.0**-24  # float32 rounds the topmost bits up to 1, whose noise would be minus infinity
SERIES_BELOW = 0.125  # of u: under it -log(1 - u) by series, above it by log; float32 loses 2^-24/u the latter way


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

    temperature: (N,) or a number >= 0; 0 takes the largest logit, the lowest id among equals. banned: bool (V,), ids that
    are never drawn. seed: (N,) int64. position: (N,) int64 or an int, its low 32 bits count. The log-prob is that of
    softmax(logits) without the banned ids at temperature 1, whatever the temperature. ValueError: shapes that do not fit.
    """
    _check(logits, banned, seed)
    choose("sample", logits.device, path)
    temperature = _per_row(temperature, seed, torch.float32)
    position = _per_row(position, seed, torch.int64)
    return plain(logits, temperature, banned, seed, position)


@torch.no_grad()
def plain(logits: Tensor, temperature: Tensor, banned: Tensor | None, seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
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
    """Standard Gumbel float32 from 32 uniform bits; precise in the upper tail, which decides the arg-max."""
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=LARGEST_U)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7)))))))
    return -torch.where(u < SERIES_BELOW, series, -torch.log(1 - u)).log()


def _philox(left: Tensor, right: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox2x32-7 on int64 tensors that hold 32-bit words; products wrap modulo 2^64, which keeps both halves exact."""
    for _ in range(ROUNDS):
        product = left * MULTIPLIER
        left, right = ((product >> 32) ^ key ^ right) & MASK32, product & MASK32
        key = (key + WEYL) & MASK32
    return left, right


def _per_row(value: Tensor | float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full_like(seed, value, dtype=dtype)
    if value.shape != seed.shape:
        raise ValueError(f"sample: temperature and position must be numbers or {tuple(seed.shape)}, got {tuple(value.shape)}")
    return value.to(dtype)


def _check(logits: Tensor, banned: Tensor | None, seed: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"sample: logits must be a float tensor (N,V), got {logits.dtype} {tuple(logits.shape)}")
    if seed.shape != logits.shape[:1] or seed.dtype != torch.int64:
        raise ValueError(f"sample: seed must be int64 ({len(logits)},), got {seed.dtype} {tuple(seed.shape)}")
    if banned is not None and (banned.shape != logits.shape[1:] or banned.dtype != torch.bool):
        raise ValueError(f"sample: banned must be bool ({logits.shape[1]},), got {banned.dtype} {tuple(banned.shape)}")
