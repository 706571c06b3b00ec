"""Executed FLOPs: torch's counter, with formulas for the operators it does not know.

Counting slows the code down, so times and counts are taken in separate runs (bench/rollout.py
does). Left out: what a step must cost (minimal.py), seconds and peak memory
(system/machine/clock.py), host syncs (host_syncs.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import vise_kernels  # noqa: F401  defines its operators
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _pairs(query: torch.Tensor, key: torch.Tensor, causal: bool) -> int:
    """(query, key) pairs of one head; the causal kernel skips what lies above the diagonal."""
    queries = query.shape[2]
    keys = key.shape[2]
    if not causal:
        return queries * keys
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + max(0, queries - keys) * keys


def _fused(operator: Any, products: int) -> Callable[..., int]:
    """The formula of one of torch's attention operators, made of so many products of queries and
    keys (B, H, L, D). What it reads is found by name: each operator has an order of its own.
    """
    names = [argument.name for argument in operator.default._schema.arguments]

    def formula(*args, out_val=None, **kwargs) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        query = given["query"]
        batch, heads, _, dim = query.shape
        pairs = _pairs(query, given["key"], given.get("is_causal", False))
        return 2 * products * batch * heads * dim * pairs

    return formula


def _banks(q, keys, values, owners, lengths, causal, *args, **kwargs) -> int:
    """vise_kernels' attention over several banks, of which the last may be causal."""
    rows, tokens, heads, dim = q.shape
    seen = [tokens * bank.shape[2] for bank in keys]
    if causal:
        seen[-1] = tokens * (tokens + 1) // 2
    return 4 * rows * heads * dim * sum(seen)


def _packed(operator: Any, products: int) -> Callable[..., int]:
    """The formula of FlashAttention over rows side by side: tokens (n, H, D), ends of rows. Where
    these have no data, every row is as long as the longest.
    """
    names = [argument.name for argument in operator.default._schema.arguments]

    def formula(*args, out_val=None, **kwargs) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        _, heads, dim = given["query"].shape
        ends = given["cum_seq_q"]
        unknown = [given["max_q"]] * (len(ends) - 1)
        lengths = unknown if ends.is_meta else ends.diff().tolist()
        pairs = sum(n * (n + 1) // 2 if given["is_causal"] else n * n for n in lengths)
        return 2 * products * heads * dim * pairs

    return formula


def _added(y, left, right, *args, **kwargs) -> int:
    """y += left · right, which torch's counter knows out of place only."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


FORWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
)
"""Two products: scores and weighted values."""
BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
)
"""Five products: the scores again, then the gradients of weights, values, queries and keys."""


def _formulas() -> dict[Any, Any]:
    """By operator. Each takes the operator's arguments themselves, not their shapes."""
    formulas: dict[Any, Any] = {aten.addmm_: _added, torch.ops.vise_kernels.attention: _banks}
    formulas |= {operator: _fused(operator, 2) for operator in FORWARD}
    formulas |= {operator: _fused(operator, 5) for operator in BACKWARD}
    formulas[aten._flash_attention_forward] = _packed(aten._flash_attention_forward, 2)
    formulas[aten._flash_attention_backward] = _packed(aten._flash_attention_backward, 5)
    for formula in formulas.values():
        formula._get_raw = True
    return formulas


FORMULAS = _formulas()


@contextlib.contextmanager
def executed_flops() -> Iterator[FlopCounterMode]:
    """torch's counter of matrix products, attention and their backward passes; read
    `.get_total_flops()` afterwards.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        yield counter
