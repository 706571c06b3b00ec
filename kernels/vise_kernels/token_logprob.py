"""Log-probability of chosen ids from ready logits, with the log-sum-exp and the entropy of each
row.

    logsumexp = log sum_v exp(z_v)     logprob = z_id - logsumexp     entropy = -sum_v p_v log p_v

Logits of minus infinity (banned ids) have probability zero and add nothing to the entropy. The fast
paths read the logits once, keep sums relative to a running maximum `top`, and allocate O(N):

    total = sum_v exp(z_v - top)       moment = sum_v exp(z_v - top) (z_v - top)
    entropy = log total - moment / total

Their backward pass reads the logits once more and writes the gradient. Leaves out the product with
the LM head (`linear_logprob.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.dispatch import choose, compiled, jit, tl, triton

DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
BLOCK = 4096  # logits per step of a Triton program
MAX_SPLITS = 64  # programs that share a row where there are too few rows to fill the device
PROGRAMS = 1024  # about eight per multiprocessor of a large GPU


class Logprob(NamedTuple):
    """What a row's softmax says, in nat, each (N,)."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor


def token_logprob(logits: Tensor, ids: Tensor, *, path: str | None = None) -> Logprob:
    """Log-prob of `ids` (N,) int64 under softmax(`logits` (N,V), any float dtype), with
    log-sum-exp and entropy.

    Each is (N,) float32 (float64 for float64 logits), accumulated in that dtype; all three are
    differentiable in the logits. `path` forces "plain", "native" or "triton". ValueError: shapes
    that do not fit, or a path that cannot run. Ids outside 0..V-1 are refused on a CPU (ValueError;
    plain: PyTorch's own error) and give nan on Triton, where looking would cost a synchronisation.
    """
    _check(logits, ids)
    chosen = _path(logits.device, logits.dtype, path)
    if chosen == "plain":
        return plain(logits, ids)
    return Logprob(*_forward(logits, ids, chosen).unbind())


def plain(logits: Tensor, ids: Tensor) -> Logprob:
    """The formula in PyTorch: a few (N,V) temporaries, any number of derivatives."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_share = z.log_softmax(-1)
    entropy = -(log_share.exp() * log_share.masked_fill(log_share == -torch.inf, 0)).sum(-1)
    return Logprob(log_share.gather(1, ids[:, None])[:, 0], z.logsumexp(-1), entropy)


@torch.library.custom_op("vise_kernels::token_logprob", mutates_args=())
def _forward(logits: Tensor, ids: Tensor, path: str) -> Tensor:
    """(3,N) float32: logprob, logsumexp, entropy."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    results = logits.new_empty((3, len(logits)), dtype=torch.float32)
    if results.numel() == 0:
        return results
    run = _forward_native if path == "native" else _forward_triton
    run(logits, ids.contiguous(), results)
    return results


@_forward.register_fake
def _(logits: Tensor, ids: Tensor, path: str) -> Tensor:
    return logits.new_empty((3, len(logits)), dtype=torch.float32)


@torch.library.custom_op("vise_kernels::token_logprob_backward", mutates_args=())
def _backward(logits: Tensor, ids: Tensor, results: Tensor, grads: Tensor, path: str) -> Tensor:
    """Gradient (N,V), in the dtype of the logits, from `grads` (3,N) of `results` (3,N)."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad
    run = _backward_native if path == "native" else _backward_triton
    run(logits, ids.contiguous(), results, grads.contiguous(), grad)
    return grad


@_backward.register_fake
def _(logits: Tensor, ids: Tensor, results: Tensor, grads: Tensor, path: str) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    logits, ids, ctx.path = inputs
    ctx.save_for_backward(logits, ids, output)


def _apply_backward(ctx, grads: Tensor):
    return _backward(*ctx.saved_tensors, grads, ctx.path), None, None


_forward.register_autograd(_apply_backward, setup_context=_save)


def _forward_native(logits: Tensor, ids: Tensor, results: Tensor) -> None:
    compiled().token_logprob_forward(logits.detach(), ids, *results, torch.get_num_threads())


def _backward_native(
    logits: Tensor, ids: Tensor, results: Tensor, grads: Tensor, grad: Tensor
) -> None:
    _, logsumexp, entropy = results
    compiled().token_logprob_backward(
        logits.detach(), ids, logsumexp, entropy, *grads, grad, torch.get_num_threads()
    )


@jit(do_not_specialize=["splits"])
def _partial_kernel(logits, partials, columns, stride, splits, BLOCK: tl.constexpr):
    """(top, total, moment) of one of a row's `splits` parts; grid (N, splits), partials (3, N,
    splits).
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    span = tl.cdiv(tl.cdiv(columns, BLOCK), splits) * BLOCK
    top = -1e30  # finite: a part of nothing but minus infinities stays free of nan
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, columns), BLOCK):
        column = first + lanes
        z = tl.load(logits + row * stride + column, mask=column < columns, other=-float("inf")).to(
            tl.float32
        )
        highest = tl.maximum(top, tl.max(z, 0))
        share = tl.exp(z - highest)
        factor = tl.exp(top - highest)
        moment = factor * (moment + (top - highest) * total) + tl.where(
            z == -float("inf"), 0.0, share * (z - highest)
        )
        total = factor * total + share
        top = highest
    out = partials + row * splits + split
    plane = tl.num_programs(0).to(tl.int64) * splits
    tl.store(out, top)
    tl.store(out + plane, tl.sum(total, 0))
    tl.store(out + 2 * plane, tl.sum(moment, 0))


@jit(do_not_specialize=["splits"])
def _merge_kernel(partials, logits, ids, results, columns, stride, splits, SPLITS: tl.constexpr):
    """Results (3, N) from the partials (3, N, splits); grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    lanes = tl.arange(0, SPLITS)
    inside = lanes < splits
    plane = rows * splits
    tops = tl.load(partials + row * splits + lanes, mask=inside, other=-1e30)
    totals = tl.load(partials + plane + row * splits + lanes, mask=inside, other=0.0)
    moments = tl.load(partials + 2 * plane + row * splits + lanes, mask=inside, other=0.0)
    top = tl.max(tops, 0)
    factors = tl.exp(tops - top)
    total = tl.sum(factors * totals, 0)
    moment = tl.sum(factors * (moments + (tops - top) * totals), 0)
    id = tl.load(ids + row)
    known = (id >= 0) & (id < columns)
    z = tl.load(logits + row * stride + id, mask=known, other=float("nan")).to(tl.float32)
    log_total = tl.log(total)
    tl.store(results + row, z - top - log_total)
    tl.store(results + rows + row, top + log_total)
    tl.store(results + 2 * rows + row, log_total - moment / total)


@jit
def _backward_kernel(logits, ids, results, grads, grad, columns, stride, BLOCK: tl.constexpr):
    """grad (N, columns); grid (N, blocks of columns).

    d logprob = [v = id] - p, d logsumexp = p, d entropy = -p (log p + entropy).
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + column, mask=column < columns, other=-float("inf")).to(
        tl.float32
    )
    log_share = z - tl.load(results + rows + row)
    entropy = tl.load(results + 2 * rows + row)
    of_logprob = tl.load(grads + row)
    of_logsumexp = tl.load(grads + rows + row)
    of_entropy = tl.load(grads + 2 * rows + row)
    slope = tl.exp(log_share) * (of_logsumexp - of_logprob - of_entropy * (log_share + entropy))
    slope = tl.where(z == -float("inf"), 0.0, slope) + tl.where(
        column == tl.load(ids + row), of_logprob, 0.0
    )
    tl.store(grad + row * columns + column, slope.to(grad.dtype.element_ty), mask=column < columns)


def _forward_triton(logits: Tensor, ids: Tensor, results: Tensor) -> None:
    rows, columns = logits.shape
    splits = min(MAX_SPLITS, -(-PROGRAMS // rows), -(-columns // BLOCK))
    partials = results.new_empty((3, rows, splits))
    sizes = (columns, logits.stride(0), splits)
    _partial_kernel[(rows, splits)](logits, partials, *sizes, BLOCK=BLOCK, num_warps=8)
    _merge_kernel[(rows,)](partials, logits, ids, results, *sizes, SPLITS=MAX_SPLITS, num_warps=1)


def _backward_triton(
    logits: Tensor, ids: Tensor, results: Tensor, grads: Tensor, grad: Tensor
) -> None:
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, BLOCK))
    _backward_kernel[grid](
        logits, ids, results, grads, grad, columns, logits.stride(0), BLOCK=BLOCK, num_warps=8
    )


@torch.compiler.assume_constant_result
def _path(device: torch.device, dtype: torch.dtype, path: str | None) -> str:
    """The path for such logits: an automatic choice falls back to plain for dtypes its kernel does
    not take.
    """
    chosen = choose("token_logprob", device, path).path
    if chosen == "plain" or dtype in DTYPES[chosen]:
        return chosen
    if path is None:
        return "plain"
    raise ValueError(f"token_logprob: path {path!r} does not take {dtype}")


def _check(logits: Tensor, ids: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"token_logprob: logits must be a float tensor (N,V), got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if len(logits) and logits.shape[1] == 0:
        raise ValueError("token_logprob: logits (N,V) of no ids")
    if ids.shape != logits.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(
            f"token_logprob: ids must be int64 ({len(logits)},), got {ids.dtype} {tuple(ids.shape)}"
        )
    if ids.device != logits.device:
        raise ValueError(f"token_logprob: ids are on {ids.device}, logits on {logits.device}")
