"""Executed FLOPs: torch's counter, with formulas for the operators it does not know.

Counting slows the code down, so times and counts are taken in separate runs (bench/rollout.py
does). Left out: what a step must cost (minimal.py), seconds and peak memory (system/clock.py), host
syncs (host_syncs.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import vise_kernels.attention  # noqa: F401  defines its operator
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _pairs(query, key, causal: bool) -> int:
    """(query, key) pairs of one head; the causal kernel skips what lies above the diagonal."""
    queries = query.shape[2]
    keys = key.shape[2]
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + max(0, queries - keys) * keys if causal else queries * keys


def _flash(query, key, value, dropout_p=0.0, is_causal=False, *args, out_val=None, **kwargs) -> int:
    return 4 * query.shape[0] * query.shape[1] * query.shape[3] * _pairs(query, key, is_causal)


def _flash_backward(
    grad, query, key, value, out, logsumexp, dropout_p, is_causal, *args, out_val=None, **kwargs
) -> int:
    """Five products: the scores again, then the gradients of weights, values, queries and keys."""
    return 10 * query.shape[0] * query.shape[1] * query.shape[3] * _pairs(query, key, is_causal)


def _gpu_flash_backward(
    grad,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *args,
    out_val=None,
    **kwargs,
) -> int:
    return _flash_backward(grad, query, key, value, out, logsumexp, dropout_p, is_causal)


def _efficient(
    query,
    key,
    value,
    bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    *args,
    out_val=None,
    **kwargs,
) -> int:
    return _flash(query, key, value, dropout_p, is_causal)


def _efficient_backward(
    grad,
    query,
    key,
    value,
    bias,
    out,
    logsumexp,
    seed,
    offset,
    dropout_p,
    wanted,
    is_causal=False,
    *args,
    out_val=None,
    **kwargs,
) -> int:
    return _flash_backward(grad, query, key, value, out, logsumexp, dropout_p, is_causal)


def _banks(q, keys, values, owners, lengths, causal, *args, out_val=None, **kwargs) -> int:
    """vise_kernels' attention over several banks, of which the last may be causal."""
    rows, tokens, heads, dim = q.shape
    seen = [tokens * bank.shape[2] for bank in keys]
    if causal:
        seen[-1] = tokens * (tokens + 1) // 2
    return 4 * rows * heads * dim * sum(seen)


def _added(y, left, right, *args, out_val=None, **kwargs) -> int:
    """y += left · right, which torch's counter knows out of place only."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


FORMULAS = {
    aten.addmm_: _added,
    torch.ops.vise_kernels.attention: _banks,
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_flash_attention_backward: _gpu_flash_backward,
    aten._scaled_dot_product_efficient_attention: _efficient,
    aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
}
for formula in FORMULAS.values():
    formula._get_raw = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def executed_flops() -> Iterator[FlopCounterMode]:
    """torch's counter of matrix products, attention and their backward passes; read
    `.get_total_flops()` afterwards.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        yield counter
