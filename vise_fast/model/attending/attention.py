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
from torch.autograd.function import once_differentiable
from vise_kernels import attention, merge_attention
from vise_kernels.attention import DIM_STEP, Bank
from vise_kernels.dispatch import choose as choose_kernel

from vise_fast.model.attending import flash_library
from vise_fast.model.attending.flash import (
    Gradients,
    Inputs,
    Result,
    Rows,
    choose,
    kernel,
    packed_backward,
    packed_forward,
    takes_packed,
)
from vise_fast.model.tree import Part, Ragged


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
    table = _grouped(part, x, tokens).flatten(3, 4)
    return part.grid.gather(table) if part.grid else table[:, 0]


def _grouped(part: Part, x: Tensor, tokens: int) -> Tensor:
    """A view (M, F, T, KV, rep[, D]) of outputs or log-sum-exps of a part that is not causal."""
    fan = part.grid.fan if part.grid else 1
    table = x.unflatten(2, (fan, tokens, -1))
    return table.permute((0, 2, 3, 1, 4) + ((5,) if table.dim() == 6 else ()))


def _banks(part: Part, q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the folded queries have, or as the kernel wants."""
    repeat = q.shape[2] // part.keys.shape[1] if part.causal else 1
    if repeat == 1 or kernel(q, bias).shares_heads:
        return part.keys, part.values
    return part.keys.repeat_interleave(repeat, 1), part.values.repeat_interleave(repeat, 1)


def _inputs(part: Part, q: Tensor, scale: float) -> Inputs:
    """What a kernel takes for one part."""
    bias = part.key_bias()
    return Inputs(_fold(part, q), *_banks(part, q, bias), bias, part.causal, scale)


def _part_forward(part: Part, q: Tensor, scale: float) -> Result:
    """Output (N, T, H, D) and fp32 log-sum-exp (N, T, H) of one part, or in groups as
    `merge_attention` takes them.
    """
    out, lse = _folded_forward(part, q, scale)
    in_order = part.grid is None or part.grid.uniform
    if in_order and not part.causal and q.device.type != "cpu":  # merged without a copy
        return Result(_grouped(part, out, q.shape[1]), _grouped(part, lse, q.shape[1]))
    return Result(_unfold(part, out, q.shape[1]), _unfold(part, lse, q.shape[1]))


def _part_output(part: Part, q: Tensor, scale: float) -> Tensor:
    """The output alone: while decoding, a log-sum-exp's views are a twentieth of the calls."""
    return _unfold(part, _folded_forward(part, q, scale).output, q.shape[1])


def _folded_forward(part: Part, q: Tensor, scale: float) -> Result:
    inputs = _inputs(part, q, scale)
    return kernel(inputs.q, inputs.bias).forward(inputs)


def _part_backward(part: Part, grad: Tensor, q: Tensor, merged: Result, scale: float) -> Gradients:
    """Gradients of q (N, T, H, D), keys and values of one part; `merged`: over all parts."""
    inputs = _inputs(part, q, scale)
    lse = _fold(part, merged.lse[..., None])[..., 0]
    result = Result(_fold(part, merged.output), lse)
    run = kernel(inputs.q, inputs.bias).backward
    dq, dk, dv = run(_fold(part, grad), inputs, result)
    kv = part.keys.shape[1]
    if dk.shape[1] != kv:
        dk = dk.unflatten(1, (kv, -1)).sum(2)
        dv = dv.unflatten(1, (kv, -1)).sum(2)
    return Gradients(_unfold(part, dq, q.shape[1]), dk, dv)


def _merge(results: list[Result]) -> Result:
    """Outputs of the parts, weighted by the share of the softmax mass each holds."""
    outputs = [result.output for result in results]
    return Result(*merge_attention(outputs, [result.lse for result in results]))


def _in_one(q: Tensor, parts: list[Part]) -> bool:
    """Whether one kernel takes all parts: several new tokens, no bias.

    For one token a row torch's is the quicker one.
    """
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return False
    if q.shape[1] == 1 or q.shape[3] % DIM_STEP:
        return False
    if any(part.bias is not None for part in parts) or any(part.causal for part in parts[:-1]):
        return False
    return choose_kernel("attention", q.device).path == "native"


def _bank(part: Part) -> Bank:
    owner = None if part.grid is None else part.grid.owner
    return Bank(part.keys, part.values, owner, part.lengths)


def _forward(q: Tensor, parts: list[Part], scale: float) -> Result:
    """Output (N, T, H, D) and log-sum-exp (N, T, H) over all parts; without gradients."""
    if _in_one(q, parts):
        banks = [_bank(part) for part in parts]
        causal = parts[-1].causal
        return Result(*attention(q, banks, scale=scale, causal=causal, path="native"))
    return _merge([_part_forward(part, q, scale) for part in parts])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, scale: float, parts: list[Part], *banks: Tensor) -> Tensor:
        out, lse = _forward(q, parts, scale)
        ctx.save_for_backward(q, out, lse, *banks)
        ctx.scale = scale
        ctx.shapes = [(p.lengths, p.grid, p.causal, p.bias) for p in parts]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *banks = ctx.saved_tensors
        merged = Result(out, lse)
        dq = None
        dbanks: list[Tensor] = []
        for i, shape in enumerate(ctx.shapes):
            part = Part(banks[2 * i], banks[2 * i + 1], *shape)
            found = _part_backward(part, grad, q, merged, ctx.scale)
            dq = found.q if dq is None else dq + found.q
            dbanks += [found.keys, found.values]
        return dq, None, None, *dbanks


def attend(q: Tensor, parts: list[Part], scale: float) -> Tensor:
    """Attention of q (N, T, H, D) over all parts together; differentiable in q and in every part's
    keys and values.
    """
    if choose(q.device, q.dtype).path == "plain":
        return attend_plain(q, parts, scale)
    if torch.is_grad_enabled():
        banks: list[Tensor] = []
        for part in parts:
            banks += [part.keys, part.values]
        return _Attend.apply(q, scale, parts, *banks)
    if len(parts) == 1 and q.shape[1] == 1:
        return _part_output(parts[0], q, scale)
    return _forward(q, parts, scale).output


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
        found = packed_forward(q, k, v, rows, scale)
        ctx.save_for_backward(q, k, v, *found)
        ctx.rows = rows
        ctx.scale = scale
        return found.output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *x, out, lse = ctx.saved_tensors
        found = packed_backward(grad, tuple(x), Result(out, lse), ctx.rows, ctx.scale)
        return *found, None, None


def attend_packed(q: Tensor, k: Tensor, v: Tensor, rag: Ragged, scale: float) -> Tensor:
    """Causal attention of rows that lie side by side, each over itself: q (n, H, D), k and v
    (n, KV, D) to (n, H, D); differentiable. Where no kernel takes them so, they are padded.
    """
    if takes_packed(q):
        package = flash_library.of(q.device).function
        rows = Rows(rag.ends, rag.longest)
        if package is not None:
            return flash_library.attend(package, (q, k, v.contiguous()), rows, scale)
        return _Packed.apply(q, k, v.contiguous(), rows, scale)
    keys, values = (rag.pad(t).transpose(1, 2) for t in (k, v))
    return rag.pack(attend(rag.pad(q), [Part(keys, values, causal=True)], scale))


def attend_plain(q: Tensor, parts: list[Part], scale: float) -> Tensor:
    """The same with each row's keys copied out, scores in full and one softmax over all parts (fp32
    scores).
    """
    scores = []
    values = []
    for part in parts:
        scores.append(_scores(part, q, scale))
        repeat = q.shape[2] // part.values.shape[1]
        values.append(_of_rows(part, part.values).repeat_interleave(repeat, 1))
    weights = torch.cat(scores, -1).softmax(-1)
    return torch.einsum("nhts,nhsd->nthd", weights.to(q.dtype), torch.cat(values, 2))


def _scores(part: Part, q: Tensor, scale: float) -> Tensor:
    """fp32 (N, H, T, S): the scores of one part, written out."""
    keys = _of_rows(part, part.keys).repeat_interleave(q.shape[2] // part.keys.shape[1], 1)
    scores = torch.einsum("nthd,nhsd->nhts", q.float(), keys.float()) * scale
    if part.causal:
        square = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(square.triu(1), -torch.inf)
    bias = part.key_bias()
    return scores if bias is None else scores + _of_rows(part, bias)[:, None, None]


def _of_rows(part: Part, x: Tensor) -> Tensor:
    """(M, ...) of the entries as (N, ...), a copy for each row."""
    return x if part.grid is None else x[part.grid.owner]
