"""Log-probability of chosen ids, and the exact KL against a reference, straight from hidden rows and a frozen LM head.

    z = h W^T    logprob = z_id - lse(z)    KL(p || q) = sum_v p_v d_v - lse(z) + lse(z'),   d = z - z', z' = h' W^T

The (N,V) logits never exist: the head is walked in chunks of ids and every sum is kept relative to a running maximum. The
gradients are gathered in the same walk, because both are a softmax average of head rows times one number per row:

    dlogprob/dh = W_id - E        E = sum_v p_v W_v
    dKL/dh      = F - (sum_v p_v d_v) E        F = sum_v p_v d_v W_v

so forward and backward together cost two products of size (N,H,V) (four with the KL) where recomputing the logits in the
backward pass costs three (five), and the backward pass itself is a row-wise scaling. Extra memory: one chunk of logits and
one (N,H) tensor per gradient, in the dtype of hidden. Leaves out gradients of the head and of the reference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vise_kernels.dispatch import choose

CHUNK_LOGITS = 2**23  # logits in flight: 32 MB in float32
BLOCK_ROWS = 2048  # hidden rows per walk over the head (policy and reference together): enough to keep a product compute-bound
FLOOR = -1e30  # the running maximum before the first id: finite, so that differences never are nan


def linear_logprob(
    hidden: Tensor, head: Tensor, ids: Tensor, *, banned: Tensor | None = None, chunk: int | None = None, path: str | None = None
) -> Tensor:
    """Log-prob (N,) of `ids` (N,) int64 under softmax(`hidden` (N,H) `head` (V,H)^T), in nat; differentiable in hidden only.

    hidden and head share one float dtype; the result is float32 (float64 for float64). banned: bool (V,), ids left out of
    the distribution (their log-prob is minus infinity). chunk: ids per step of the walk (default: from N). `path` forces
    "plain" or "triton". ValueError: shapes that do not fit, or a head that asks for a gradient.
    """
    _check("linear_logprob", hidden, head, ids, banned)
    path = choose("linear_logprob", hidden.device, path).path
    return _LinearLogprob.apply(hidden, None, head, ids, banned, chunk, path, _wants_gradient(hidden))[0]


def linear_logprob_kl(
    hidden: Tensor,
    reference_hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    *,
    banned: Tensor | None = None,
    chunk: int | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_logprob`, for policy and reference rows (N,H) in one walk over the head: (logprob, reference_logprob, kl).

    Each is (N,) in nat; kl is the exact KL(policy || reference) over the ids that are not banned. logprob and kl are
    differentiable in `hidden`; the reference is a constant.
    """
    _check("linear_logprob_kl", hidden, head, ids, banned)
    if reference_hidden.shape != hidden.shape or reference_hidden.dtype != hidden.dtype:
        raise ValueError(f"linear_logprob_kl: reference_hidden {_describe(reference_hidden)} must match hidden {_describe(hidden)}")
    path = choose("linear_logprob_kl", hidden.device, path).path
    return _LinearLogprob.apply(hidden, reference_hidden, head, ids, banned, chunk, path, _wants_gradient(hidden))


def full_softmax(hidden: Tensor, reference_hidden: Tensor, head: Tensor, ids: Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_logprob_kl` by its definition, with (N,V) tensors: the truth of the tests and the baseline of the bench."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.stack([hidden, reference_hidden]) @ head.T
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    policy, reference = logits.to(dtype).log_softmax(-1)
    difference = policy - reference
    if banned is not None:
        difference = torch.where(banned, 0, difference)
    kl = (policy.exp() * difference).sum(-1)
    return policy.gather(1, ids[:, None])[:, 0], reference.gather(1, ids[:, None])[:, 0], kl


@dataclass
class Sums:
    """What the walk keeps of the ids seen so far, for R rows of K = 1 (policy) or 2 (policy, reference) distributions."""

    top: Tensor  # (K,R) the maximum that the sums are relative to
    total: Tensor  # (K,R) sum_v exp(z_v - top)
    target: Tensor  # (K,R) z of the row's own id; minus infinity until it has been seen
    drift: Tensor  # (R,) sum_v exp(z_v - top) d_v of the policy

    @classmethod
    def start(cls, kinds: int, rows: int, like: Tensor) -> "Sums":
        low = like.new_full((kinds, rows), FLOOR)
        return cls(low, like.new_zeros(kinds, rows), like.new_full((kinds, rows), -torch.inf), like.new_zeros(rows))


def merge(logits: Tensor, ids: Tensor, banned: Tensor | None, sums: Sums, weights: Tensor | None) -> Tensor:
    """Add a chunk of `logits` (K,R,C) to `sums` in place; `ids` (R,) count from the chunk's first id.

    Fills `weights` (K,R,C) with exp(z - top) and, for K = 2, exp(z - top) d of the policy. Returns (R,): the factor that
    takes the policy's earlier sums to the new maximum. The logits are overwritten.
    """
    difference = logits[0] - logits[-1]
    if banned is not None:
        logits.masked_fill_(banned, -torch.inf)
    inside = (ids >= 0) & (ids < logits.shape[-1])
    column = torch.where(inside, ids, 0).expand(logits.shape[:2])[..., None]
    sums.target = torch.where(inside, logits.gather(-1, column)[..., 0], sums.target)
    top = torch.maximum(sums.top, logits.amax(-1))
    factor = (sums.top - top).exp()
    share = logits.sub_(top[..., None]).exp_()
    sums.top, sums.total = top, sums.total * factor + share.sum(-1)
    moved = difference.mul_(share[0])
    sums.drift = sums.drift * factor[0] + moved.sum(-1)
    if weights is not None:
        weights[0] = share[0]
        weights[1:] = moved
    return factor[0]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, reference, head, ids, banned, chunk, path, wants_gradient):
        slopes = hidden.new_empty((1 if reference is None else 2, *hidden.shape)) if wants_gradient else None
        results = _walk_rows(hidden, reference, head, ids, banned, chunk, path, slopes)
        ctx.slopes = slopes
        ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, _grad_reference, grad_kl):
        gradient = torch.empty_like(ctx.slopes[0])
        for block in _blocks(len(gradient), BLOCK_ROWS):
            rows = grad_logprob[block, None] * ctx.slopes[0, block]
            if len(ctx.slopes) == 2:
                rows += grad_kl[block, None] * ctx.slopes[1, block]
            gradient[block] = rows
        return (gradient, *[None] * 7)


def _walk_rows(hidden, reference, head, ids, banned, chunk, path, slopes) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, reference logprob, kl) of all rows, block by block; fills `slopes` (1 or 2,N,H) unless it is None."""
    kinds = 1 if reference is None else 2
    results = hidden.new_zeros((3, len(hidden)), dtype=_wide(hidden.dtype))
    for block in _blocks(len(hidden), BLOCK_ROWS // kinds):
        states = [hidden[block]] if reference is None else [hidden[block], reference[block]]
        slope = None if slopes is None else slopes[:, block]
        results[:, block] = _walk_head(states, head, ids[block], banned, chunk, path, slope)
    return results.unbind()


def _walk_head(states: list[Tensor], head: Tensor, ids: Tensor, banned: Tensor | None, chunk: int | None, path: str, slope: Tensor | None) -> Tensor:
    """One walk over the head for a block of R rows: (3,R) as in `_walk_rows`."""
    kinds, (rows, width) = len(states), states[0].shape
    states = [state.to(_wide(state.dtype)) for state in states]
    sums = Sums.start(kinds, rows, states[0])
    averages = None if slope is None else states[0].new_zeros(kinds, rows, width)
    for first, piece in _chunks(head, chunk or CHUNK_LOGITS // (kinds * rows)):
        piece = piece.to(states[0].dtype)
        logits = torch.stack([state @ piece.T for state in states])
        weights = None if slope is None else torch.empty_like(logits)
        skip = None if banned is None else banned[first : first + len(piece)]
        factor = merge(logits, ids - first, skip, sums, weights)
        if slope is not None:
            averages.mul_(factor[:, None])
            averages.view(-1, width).addmm_(weights.flatten(0, 1), piece)
    if slope is not None:
        slope.copy_(_slopes(sums, averages, head, ids, banned))
    return _finish(sums)


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, rows, size)]


def _chunks(head: Tensor, size: int):
    """(first id, rows of the head) in chunks of `size` ids, rounded up to 128."""
    size = -(-max(size, 1) // 128) * 128
    return ((first, head[first : first + size]) for first in range(0, len(head), size))


def _finish(sums: Sums) -> Tensor:
    logsumexp = sums.top + sums.total.log()
    logprob = sums.target - logsumexp
    if len(logprob) == 1:
        return torch.stack([logprob[0], torch.zeros_like(logprob[0]), torch.zeros_like(logprob[0])])
    kl = sums.drift / sums.total[0] - logsumexp[0] + logsumexp[1]
    return torch.stack([logprob[0], logprob[1], kl])


def _slopes(sums: Sums, averages: Tensor, head: Tensor, ids: Tensor, banned: Tensor | None) -> Tensor:
    """dlogprob/dh and, for K = 2, dKL/dh, from the unnormalised averages (K,R,H), in place."""
    averages /= sums.total[0][:, None]
    if len(averages) == 2:
        averages[1] -= (sums.drift / sums.total[0])[:, None] * averages[0]
    own = head[ids].to(averages.dtype)
    if banned is not None:
        own.masked_fill_(banned[ids][:, None], 0)
    averages[0].sub_(own).neg_()
    return averages


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wants_gradient(hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and hidden.requires_grad


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _check(op: str, hidden: Tensor, head: Tensor, ids: Tensor, banned: Tensor | None) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"{op}: hidden (N,H) and head (V,H) do not fit: {_describe(hidden)}, {_describe(head)}")
    if not hidden.is_floating_point() or hidden.dtype != head.dtype:
        raise ValueError(f"{op}: hidden and head must share one float dtype, got {hidden.dtype} and {head.dtype}")
    if ids.shape != hidden.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"{op}: ids must be int64 ({len(hidden)},), got {_describe(ids)}")
    if banned is not None and (banned.shape != head.shape[:1] or banned.dtype != torch.bool):
        raise ValueError(f"{op}: banned must be bool ({len(head)},), got {_describe(banned)}")
    if torch.is_grad_enabled() and head.requires_grad:
        raise ValueError(f"{op}: the head must be frozen (requires_grad=False): this op gives it no gradient")
