"""Attention of new tokens over several stretches of keys: shared prefixes, prompts, and the new
tokens themselves.

A row (one sequence of new tokens) sees *parts*. A part is a bank of keys and values of which every
row sees exactly one entry; many rows may share an entry (all samples of one image share its
prefix), and then the entry is read once, never copied. Each part yields an output and a
log-sum-exp; the parts are merged by their log-sum-exp (Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax"), and the backward pass of each part uses the merged output and
log-sum-exp, which is exact because a part's softmax weights are exp(score - merged log-sum-exp). On
a CPU in fp32 one kernel goes forward over all parts at once instead.

Shapes: N rows, T new tokens per row, M entries, F rows per entry, S keys per entry, H query heads,
KV key heads, D head dimension. `attend` is the fast path (torch's fused kernels, see flash.py),
`attend_plain` the same formula with everything written out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vise_kernels import attention
from vise_kernels.attention import DIM_STEP, Bank
from vise_kernels.dispatch import choose as choose_kernel

from vise_fast.model.flash import choose, kernel
from vise_fast.model.tree import Part


def _fold(part: Part, q: Tensor) -> Tensor:
    """Queries (N, T, H, D) as one batch per entry: (M, KV, F*T*rep, D), or (N, H, T, D) for a
    causal part.
    """
    if part.causal:
        return q.transpose(1, 2)
    kv = part.keys.shape[1]
    table = (part.grid.spread(q) if part.grid else q[:, None]).unflatten(3, (kv, -1))
    return table.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)


def _unfold(part: Part, x: Tensor, tokens: int) -> Tensor:
    """The inverse of `_fold` for outputs (.., D) and, with D absent, log-sum-exps: to (N, T, H[,
    D]).
    """
    if part.causal:
        return x.transpose(1, 2)
    fan = part.grid.fan if part.grid else 1
    table = x.unflatten(2, (fan, tokens, -1))
    order = (0, 2, 3, 1, 4) + ((5,) if table.dim() == 6 else ())
    table = table.permute(order).flatten(3, 4)
    return part.grid.gather(table) if part.grid else table[:, 0]


def _banks(part: Part, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the folded queries have."""
    repeat = heads // part.keys.shape[1] if part.causal else 1
    if repeat == 1:
        return part.keys, part.values
    return part.keys.repeat_interleave(repeat, 1), part.values.repeat_interleave(repeat, 1)


def _part_forward(part: Part, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, T, H, D) and fp32 log-sum-exp (N, T, H) of one part."""
    out, lse = _folded_forward(part, q, scale)
    return _unfold(part, out, q.shape[1]), _unfold(part, lse, q.shape[1])


def _part_output(part: Part, q: Tensor, scale: float) -> Tensor:
    """The output alone: while decoding, the views that a log-sum-exp takes are a twentieth of the
    calls.
    """
    return _unfold(part, _folded_forward(part, q, scale)[0], q.shape[1])


def _folded_forward(part: Part, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    folded = _fold(part, q)
    bias = part.key_bias()
    return kernel(folded, bias).forward(folded, *_banks(part, q.shape[2]), bias, part.causal, scale)


def _part_backward(
    part: Part, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (N, T, H, D), keys and values of one part, given the *merged* output and
    log-sum-exp.
    """
    folded = _fold(part, q)
    bias = part.key_bias()
    banks = _banks(part, q.shape[2])
    merged = _fold(part, out), _fold(part, lse[..., None])[..., 0]
    dq, dk, dv = kernel(folded, bias).backward(
        _fold(part, grad), folded, *banks, *merged, bias, part.causal, scale
    )
    kv = part.keys.shape[1]
    if dk.shape[1] != kv:
        dk = dk.unflatten(1, (kv, -1)).sum(2)
        dv = dv.unflatten(1, (kv, -1)).sum(2)
    return _unfold(part, dq, q.shape[1]), dk, dv


def _merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs of the parts, weighted by the share of the softmax mass each holds."""
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses)
    total = stacked.logsumexp(0)
    weights = (stacked - total).exp_().to(outs[0].dtype)[..., None]
    merged = outs[0] * weights[0]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        merged = torch.addcmul(merged, out, weight)
    return merged, total


def _in_one(q: Tensor, parts: list[Part]) -> bool:
    """Whether one kernel takes all parts: several new tokens, no bias.

    For one token a row torch's is the quicker one.
    """
    fits = (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[1] > 1
        and q.shape[3] % DIM_STEP == 0
    )
    plain = any(part.bias is not None for part in parts) or any(part.causal for part in parts[:-1])
    return fits and not plain and choose_kernel("attention", q.device).path == "native"


def _forward(q: Tensor, parts: list[Part], scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, T, H, D) and log-sum-exp (N, T, H) over all parts; without gradients."""
    if _in_one(q, parts):
        banks = [
            Bank(
                part.keys, part.values, None if part.grid is None else part.grid.owner, part.lengths
            )
            for part in parts
        ]
        return attention(q, banks, scale=scale, causal=parts[-1].causal, path="native")
    results = [_part_forward(part, q, scale) for part in parts]
    return _merge([r[0] for r in results], [r[1] for r in results])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, scale: float, parts: list[Part], *banks: Tensor) -> Tensor:
        out, lse = _forward(q, parts, scale)
        ctx.save_for_backward(q, out, lse, *banks)
        ctx.scale = scale
        ctx.shapes = [(p.lengths, p.grid, p.causal, p.bias) for p in parts]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, out, lse, *banks = ctx.saved_tensors
        dq = None
        dbanks = []
        for i, shape in enumerate(ctx.shapes):
            part = Part(banks[2 * i], banks[2 * i + 1], *shape)
            dq_part, dk, dv = _part_backward(part, grad, q, out, lse, ctx.scale)
            dq = dq_part if dq is None else dq + dq_part
            dbanks += [dk, dv]
        return dq, None, None, *dbanks


def attend(q: Tensor, parts: list[Part], scale: float) -> Tensor:
    """Attention of q (N, T, H, D) over all parts together; differentiable in q and in every part's
    keys and values.
    """
    if choose(q.device, q.dtype).path == "plain":
        return attend_plain(q, parts, scale)
    if torch.is_grad_enabled():
        return _Attend.apply(
            q, scale, parts, *[bank for part in parts for bank in (part.keys, part.values)]
        )
    if len(parts) == 1 and q.shape[1] == 1:
        return _part_output(parts[0], q, scale)
    return _forward(q, parts, scale)[0]


def attend_plain(q: Tensor, parts: list[Part], scale: float) -> Tensor:
    """The same with each row's keys copied out, scores in full and one softmax over all parts (fp32
    scores).
    """
    heads = q.shape[2]
    scores = []
    values = []
    for part in parts:
        keys = part.keys
        bank = part.values
        bias = part.key_bias()
        if part.grid is not None:
            keys = keys[part.grid.owner]
            bank = bank[part.grid.owner]
            bias = bias if bias is None else bias[part.grid.owner]
        keys = keys.repeat_interleave(heads // keys.shape[1], 1)
        score = torch.einsum("nthd,nhsd->nhts", q.float(), keys.float()) * scale
        if part.causal:
            score = score.masked_fill(
                torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf
            )
        scores.append(score if bias is None else score + bias[:, None, None])
        values.append(bank.repeat_interleave(heads // bank.shape[1], 1))
    weights = torch.cat(scores, -1).softmax(-1)
    return torch.einsum("nhts,nhsd->nthd", weights.to(q.dtype), torch.cat(values, 2))
