"""Log-probability of chosen ids, and the exact KL against a reference, straight from hidden rows
and a frozen LM head.

    z = h W^T,    logprob = z_id - lse(z)
    KL(p || q) = sum_v p_v d_v - lse(z) + lse(z'),    d = z - z',    z' = h' W^T

The (N,V) logits never exist: the head is walked in chunks of ids, and every sum is kept relative to
a running maximum. The gradients are gathered in the same walk, because both are softmax averages of
head rows times one number per row:

    dlogprob/dh = W_id - E                     E = sum_v p_v W_v
    dKL/dh      = F - (sum_v p_v d_v) E        F = sum_v p_v d_v W_v

so forward and backward together cost two products of size (N,H,V) (four with the KL) where
recomputing the logits in the backward pass costs three (five), and the backward pass itself is a
scaling of rows. The products are PyTorch's own (cuBLAS, float32 accumulation); what Triton adds is
the step between them, which turns a chunk of logits into weights, sums and maxima in one launch. A
kernel that also did the products (tl.dot) would save the trip of one chunk through the cache and
lose more than that against cuBLAS. Policy and reference rows share each product, so a chunk of the
head is read once.

Extra memory at (8192, 2048, 151936) in bfloat16, besides the gradient: 96 MB (logprob), 112 MB
(with the KL), of which 32 MB per gradient are kept until the backward pass. Leaves out gradients of
the head and of the reference, and ready logits (`token_logprob.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from vise_kernels.dispatch import (
    announce,
    choose,
    jit,
    launch,
    stands_for_a_gpu,
    tl,
    triton,
)

CHUNK_LOGITS = 2**23  # logits in flight: 32 MB in float32
# hidden rows per walk over the head (policy and reference together): enough to keep a product
# compute-bound
BLOCK_ROWS = 2048
# ids per chunk at most: few rows must not make one program walk the whole vocabulary
MAX_CHUNK = 2**15
FLOOR = -1e30  # the running maximum before the first id: finite, so that differences never are nan
BLOCK = 2048  # elements per step of a Triton program


class LogprobKL(NamedTuple):
    """Log-probs of the chosen ids under policy and reference, and the exact KL(policy ||
    reference), in nat, each (N,).
    """

    logprob: Tensor
    reference_logprob: Tensor
    kl: Tensor


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    *,
    banned: Tensor | None = None,
    chunk: int | None = None,
    path: str | None = None,
) -> Tensor:
    """Log-prob (N,) of `ids` (N,) int64 under softmax(`hidden` (N,H) `head` (V,H)^T), in nat;
    differentiable in hidden only.

    hidden and head share one float dtype; the result is float32 (float64 for float64). banned: bool
    (V,), ids left out of the distribution (their log-prob is minus infinity). chunk: ids per step
    of the walk, taken within 128..32768 (default: from N). `path` forces "plain" or "triton".
    ValueError: shapes that do not fit, or a head that asks for a gradient.
    """
    _check("linear_logprob", hidden, head, ids, banned)
    walked = Head(head, banned, chunk, _path("linear_logprob", hidden, path))
    return _LinearLogprob.apply(hidden, None, ids, walked, _wants_gradient(hidden))[0]


def linear_logprob_kl(
    hidden: Tensor,
    reference_hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    *,
    banned: Tensor | None = None,
    chunk: int | None = None,
    path: str | None = None,
) -> LogprobKL:
    """As `linear_logprob`, for policy and reference rows (N,H) in one walk over the head.

    kl is over the ids that are not banned. logprob and kl are differentiable in `hidden`; the
    reference is a constant.
    """
    _check("linear_logprob_kl", hidden, head, ids, banned)
    if reference_hidden.shape != hidden.shape or reference_hidden.dtype != hidden.dtype:
        raise ValueError(
            f"linear_logprob_kl: reference_hidden {_describe(reference_hidden)} must match hidden "
            f"{_describe(hidden)}"
        )
    walked = Head(head, banned, chunk, _path("linear_logprob_kl", hidden, path))
    wants = _wants_gradient(hidden)
    return LogprobKL(*_LinearLogprob.apply(hidden, reference_hidden, ids, walked, wants))


def full_softmax(
    hidden: Tensor,
    reference_hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    banned: Tensor | None = None,
) -> LogprobKL:
    """`linear_logprob_kl` by its definition, with (N,V) tensors: the truth of the tests and the
    baseline of the bench.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.stack([hidden, reference_hidden]) @ head.T
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    policy, reference = logits.to(dtype).log_softmax(-1)
    difference = policy - reference
    if banned is not None:
        difference = torch.where(banned, 0, difference)
    kl = (policy.exp() * difference).sum(-1)
    own, others = (rows.gather(1, ids[:, None])[:, 0] for rows in (policy, reference))
    return LogprobKL(own, others, kl)


@dataclass(frozen=True)
class Head:
    """The LM head and how it is walked."""

    weight: Tensor  # (V,H)
    banned: Tensor | None  # bool (V,)
    chunk: int | None  # ids per step; None: from the number of rows
    path: str

    def pieces(self, kinds: int, rows: int) -> list[slice]:
        """The ids of each step, for so many rows of so many distributions."""
        wanted = self.chunk or CHUNK_LOGITS // (kinds * kinds * rows)
        return _blocks(len(self.weight), _chunk_size(wanted, len(self.weight)))


@dataclass
class Sums:
    """What the walk keeps of the ids seen so far, for R rows of K = 1 (policy) or 2 (policy,
    reference) distributions.
    """

    top: Tensor  # (K,R) what the sums are relative to: a maximum, or close below it
    total: Tensor  # (K,R) sum_v exp(z_v - top)
    target: Tensor  # (K,R) z of the row's own id; nan until it has been seen
    drift: Tensor  # (R,) sum_v exp(z_v - top) d_v of the policy

    @classmethod
    def start(cls, kinds: int, rows: int, like: Tensor) -> Sums:
        """Before the first id, on the device of `like`."""
        zeros = torch.zeros((kinds, rows), device=like.device, dtype=_wide(like.dtype))
        unseen = torch.full_like(zeros, torch.nan)
        return cls(torch.full_like(zeros, FLOOR), zeros, unseen, torch.zeros_like(zeros[0]))

    def results(self) -> Tensor:
        """(3,R): logprob, reference logprob, KL; the last two are 0 for K = 1."""
        logsumexp = self.top + self.total.log()
        logprob = self.target - logsumexp
        if len(logprob) == 1:
            return torch.cat([logprob, torch.zeros_like(logprob), torch.zeros_like(logprob)])
        kl = self.drift / self.total[0] - logsumexp[0] + logsumexp[1]
        return torch.cat([logprob, kl[None]])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, reference, ids, head, wants_gradient):
        kinds = 1 if reference is None else 2
        ids = ids.contiguous()
        slopes = hidden.new_empty((kinds, *hidden.shape)) if wants_gradient else None
        results = hidden.new_empty((3, len(hidden)), dtype=_wide(hidden.dtype))
        for block in _blocks(len(hidden), BLOCK_ROWS // kinds):
            states = hidden[block][None]
            if reference is not None:
                states = torch.stack([hidden[block], reference[block]])
            slope = None if slopes is None else slopes[:, block]
            results[:, block] = _walk(states, ids[block], head, slope)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        logprob, reference_logprob, kl = (result.clone() for result in results)
        ctx.mark_non_differentiable(reference_logprob)
        return logprob, reference_logprob, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, _grad_reference, grad_kl):
        (slopes,) = ctx.saved_tensors
        gradient = torch.empty_like(slopes[0])
        # in blocks: the float32 products stay small
        for block in _blocks(len(gradient), BLOCK_ROWS):
            rows = grad_logprob[block, None] * slopes[0, block]
            if len(slopes) == 2:
                rows += grad_kl[block, None] * slopes[1, block]
            gradient[block] = rows
        return gradient, None, None, None, None


@dataclass
class _Gathered:
    """What becomes the gradients: weights of a chunk, flat; averages (K,R,H) of the head."""

    weights: Tensor
    averages: Tensor


@dataclass
class _Walk:
    """One walk over the head for K distributions of R rows."""

    states: Tensor  # (K,R,H)
    ids: Tensor  # (R,)
    head: Head
    sums: Sums
    logits: Tensor  # of a chunk, flat
    gathered: _Gathered | None

    def step(self, piece: slice) -> None:
        """The ids of one piece."""
        weight = self.head.weight[piece].to(self.states.dtype)
        kinds, rows, _ = self.states.shape
        z = self.logits[: kinds * rows * len(weight)].view(kinds, rows, -1)
        _product(self.states.flatten(0, 1), weight.T, z.flatten(0, 1), add=False)
        skip = None if self.head.banned is None else self.head.banned[piece]
        if self.gathered is None:
            self._merge(z, skip, piece.start, None, None)
            return
        w = self.gathered.weights[: z.numel()].view_as(z)
        averages = self.gathered.averages
        self._merge(z, skip, piece.start, w, averages if piece.start else None)
        _product(w.flatten(0, 1), weight, averages.flatten(0, 1), add=piece.start > 0)

    def _merge(
        self,
        z: Tensor,
        skip: Tensor | None,
        first: int,
        weights: Tensor | None,
        averages: Tensor | None,
    ) -> None:
        """`merge_plain` of the chunk whose ids begin with `first`."""
        if self.head.path == "triton":
            _merge_triton(z, self.ids, skip, self.sums, weights, averages, first=first)
        else:
            merge_plain(z, self.ids - first, skip, self.sums, weights, averages)


def _walk(states: Tensor, ids: Tensor, head: Head, slope: Tensor | None) -> Tensor:
    """One walk over the head for `states` (K,R,H) and `ids` (R,): the (3,R) of `Sums.results`;
    fills `slope` (K,R,H) unless it is None.
    """
    kinds, rows, _ = states.shape
    sums = Sums.start(kinds, rows, states)
    states = states if head.path == "triton" else states.to(sums.top.dtype)
    pieces = head.pieces(kinds, rows)
    size = kinds * rows * (pieces[0].stop - pieces[0].start)
    gathered = None
    if slope is not None:
        averages = torch.empty_like(states, dtype=sums.top.dtype)
        gathered = _Gathered(states.new_empty(size), averages)
    walk = _Walk(states, ids, head, sums, sums.top.new_empty(size), gathered)
    for piece in pieces:
        walk.step(piece)
    if slope is not None and gathered is not None:
        finish = _finish_triton if head.path == "triton" else _finish_plain
        finish(sums, gathered.averages, head.weight, ids, head.banned, slope)
    return sums.results()


def merge_plain(
    logits: Tensor,
    ids: Tensor,
    banned: Tensor | None,
    sums: Sums,
    weights: Tensor | None,
    averages: Tensor | None,
) -> None:
    """Add a chunk of `logits` (K,R,C) to `sums`; `ids` (R,) count from the chunk's first id.

    Fills `weights` (K,R,C) with exp(z - top) and, for K = 2, exp(z - top) d of the policy; scales
    `averages` (K,R,H), what earlier chunks' weights gave, to the new top. The logits are
    overwritten.
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
    sums.top = top
    sums.total = sums.total * factor + share.sum(-1)
    moved = difference.mul_(share[0])
    sums.drift = sums.drift * factor[0] + moved.sum(-1)
    if weights is not None:
        weights[0] = share[0]
        weights[1:] = moved
    if averages is not None:
        averages.mul_(factor[0][:, None])


def _finish_plain(
    sums: Sums, averages: Tensor, head: Tensor, ids: Tensor, banned: Tensor | None, slope: Tensor
) -> None:
    """`slope` (K,R,H), dlogprob/dh and for K = 2 dKL/dh, from the unnormalised averages (K,R,H)."""
    averages = averages / sums.total[0][:, None]
    own = head[ids].to(averages.dtype)
    if banned is not None:
        own.masked_fill_(banned[ids][:, None], 0)
    slope[0] = own - averages[0]
    slope[1:] = averages[1:] - (sums.drift / sums.total[0])[:, None] * averages[0]


@jit
def _kept(banned, column, inside):
    """Which of the columns exist and are not banned."""
    if banned is not None:
        inside = inside & (tl.load(banned + column, mask=inside, other=1) == 0)
    return inside


@jit(do_not_specialize=["first"])
def _merge_kernel(
    logits,
    weights,
    ids,
    first,
    banned,
    top,
    total,
    target,
    drift,
    factor,
    width,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`merge_plain` of one row of one distribution; grid (R, K), logits and weights (K, R, width);
    writes the row's `factor`.

    `top` moves only when the maximum exceeds it by 4: sums relative to a point below the maximum
    are as exact, and most rows then never need their averages rescaled after the first chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mine = kind * rows + row
    z_row = logits + mine * width
    highest = -1e30
    for at in range(0, width, BLOCK):
        kept = _kept(banned, at + lanes, at + lanes < width)
        highest = tl.maximum(
            highest, tl.max(tl.load(z_row + at + lanes, mask=kept, other=-1e30), 0)
        )
    before = tl.load(top + mine)
    now = tl.where(highest > before + 4, highest, before)
    share_sum = tl.zeros([BLOCK], tl.float32)
    moved_sum = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        inside = at + lanes < width
        z = tl.load(z_row + at + lanes, mask=inside, other=0.0)
        share = tl.where(_kept(banned, at + lanes, inside), tl.exp(z - now), 0.0)
        share_sum += share
        if kind == 0:
            if weights is not None:
                tl.store(
                    weights + row * width + at + lanes,
                    share.to(weights.dtype.element_ty),
                    mask=inside,
                )
            if PAIRED:
                moved = share * (
                    z - tl.load(logits + (rows + row) * width + at + lanes, mask=inside, other=0.0)
                )
                moved_sum += moved
                if weights is not None:
                    tl.store(
                        weights + (rows + row) * width + at + lanes,
                        moved.to(weights.dtype.element_ty),
                        mask=inside,
                    )
    scale = tl.exp(before - now)
    tl.store(top + mine, now)
    tl.store(total + mine, tl.load(total + mine) * scale + tl.sum(share_sum, 0))
    if kind == 0:
        tl.store(drift + row, tl.load(drift + row) * scale + tl.sum(moved_sum, 0))
        tl.store(factor + row, scale)
    id = tl.load(ids + row) - first
    here = (id >= 0) & (id < width)
    own = tl.load(z_row + id, mask=here, other=0.0)
    tl.store(target + mine, tl.where(_kept(banned, id, here), own, -float("inf")), mask=here)


@jit
def _rescale_kernel(averages, factor, rows, width, BLOCK: tl.constexpr):
    """averages (K * rows, width) times the factor of their row, where it is not 1; grid (K * rows,
    blocks of width).
    """
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(factor + row % rows)
    if scale != 1:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = averages + row * width + column
        tl.store(at, tl.load(at, mask=column < width) * scale, mask=column < width)


@jit
def _finish_kernel(
    averages,
    total,
    drift,
    head,
    ids,
    banned,
    slope,
    plane,
    vocabulary,
    width,
    head_stride,
    head_step,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_finish_plain` of a piece of one row; grid (R, blocks of width), `plane` elements between
    the slopes of a row.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    id = tl.load(ids + row)
    known = tl.where(_kept(banned, id, (id >= 0) & (id < vocabulary)), width, 0)
    own = tl.load(head + id * head_stride + column * head_step, mask=column < known, other=0.0).to(
        tl.float32
    )
    norm = tl.load(total + row)
    average = tl.load(averages + row * width + column, mask=inside, other=0.0) / norm
    tl.store(slope + row * width + column, (own - average).to(slope.dtype.element_ty), mask=inside)
    if PAIRED:
        moved = tl.load(averages + (rows + row) * width + column, mask=inside, other=0.0) / norm
        moved -= tl.load(drift + row) / norm * average
        tl.store(
            slope + plane + row * width + column, moved.to(slope.dtype.element_ty), mask=inside
        )


def _merge_triton(
    logits: Tensor,
    ids: Tensor,
    banned: Tensor | None,
    sums: Sums,
    weights: Tensor | None,
    averages: Tensor | None,
    *,
    first: int,
) -> None:
    kinds, rows, width = logits.shape
    factor = torch.empty_like(sums.drift)
    state = (sums.top, sums.total, sums.target, sums.drift, factor)
    given = (logits, weights, ids, first, _bytes(banned))
    options = {"BLOCK": BLOCK, "num_warps": 8}
    launch(_merge_kernel, (rows, kinds), *given, *state, width, PAIRED=kinds == 2, **options)
    if averages is not None:
        width = averages.shape[2]
        grid = (kinds * rows, triton.cdiv(width, BLOCK))
        launch(_rescale_kernel, grid, averages, factor, rows, width, **options)


def _finish_triton(
    sums: Sums, averages: Tensor, head: Tensor, ids: Tensor, banned: Tensor | None, slope: Tensor
) -> None:
    kinds, rows, width = averages.shape
    grid = (rows, triton.cdiv(width, BLOCK))
    tensors = averages, sums.total, sums.drift, head, ids, _bytes(banned), slope
    sizes = slope.stride(0), len(head), width, *head.stride()
    options = {"PAIRED": kinds == 2, "BLOCK": BLOCK, "num_warps": 8}
    launch(_finish_kernel, grid, *tensors, *sizes, **options)


def _bytes(banned: Tensor | None) -> Tensor | None:
    """As the kernels read it: side by side."""
    return None if banned is None else banned.contiguous().view(torch.uint8)


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """out = left right, or out += left right; 16-bit factors with a float32 result are multiplied
    as they are on a GPU.
    """
    if stands_for_a_gpu(left.device):
        work = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        size = sum(t.numel() * t.dtype.itemsize for t in (left, right, out))
        announce("mm", flops=work, moved=size)
        return
    if left.dtype != out.dtype and left.device.type != "cuda":
        left = left.to(out.dtype)
        right = right.to(out.dtype)
    if left.dtype != out.dtype:
        if add:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, rows, size)]


def _chunk_size(wanted: int, vocabulary: int) -> int:
    """`wanted` ids within 128..MAX_CHUNK, in whole 128s, no larger than the vocabulary."""
    return min(vocabulary, MAX_CHUNK, -(-max(wanted, 1) // 128) * 128)


def _path(op: str, hidden: Tensor, path: str | None) -> str:
    """An automatic choice falls back to plain for float64, which the Triton kernels do not keep."""
    chosen = choose(op, hidden.device, path).path
    if chosen != "triton" or hidden.dtype != torch.float64:
        return chosen
    if path is None:
        return "plain"
    raise ValueError(f"{op}: path {path!r} does not take {hidden.dtype}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wants_gradient(hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and hidden.requires_grad


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _check(op: str, hidden: Tensor, head: Tensor, ids: Tensor, banned: Tensor | None) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{op}: hidden (N,H) and head (V,H) do not fit: {_describe(hidden)}, {_describe(head)}"
        )
    if len(head) == 0:
        raise ValueError(f"{op}: the head {_describe(head)} has no ids")
    if not hidden.is_floating_point() or hidden.dtype != head.dtype:
        raise ValueError(
            f"{op}: hidden and head must share one float dtype, got {hidden.dtype} and {head.dtype}"
        )
    if ids.shape != hidden.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"{op}: ids must be int64 ({len(hidden)},), got {_describe(ids)}")
    if banned is not None and (banned.shape != head.shape[:1] or banned.dtype != torch.bool):
        raise ValueError(f"{op}: banned must be bool ({len(head)},), got {_describe(banned)}")
    if torch.is_grad_enabled() and head.requires_grad:
        raise ValueError(
            f"{op}: the head must be frozen (requires_grad=False): this op gives it no gradient"
        )
