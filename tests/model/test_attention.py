"""Merged attention over shared parts against the written-out formula: outputs and every gradient,
on ugly shapes.
"""

import pytest
import torch
from vise_kernels.dispatch import native

from vise_fast.model.attending.attention import _in_one, attend, attend_plain
from vise_fast.model.tree import Grid, Part


def bank(entries, kv, keys, dim, dtype=torch.float64):
    return [torch.randn(entries, kv, keys, dim, dtype=dtype, requires_grad=True) for _ in range(2)]


def build(kv=2, rep=3, dim=8, tokens=5, owner=(0, 0, 1, 2, 2, 2, 1), dtype=torch.float64):
    torch.manual_seed(0)
    rows = len(owner)
    q = torch.randn(rows, tokens, kv * rep, dim, dtype=dtype, requires_grad=True)
    grid = Grid(list(owner), 3)
    short = torch.tensor([4, 2, 1, 4, 3, 1, 2])[:rows]
    parts = [
        Part(*bank(3, kv, 11, dim, dtype), lengths=torch.tensor([11, 1, 7]), grid=grid),
        Part(*bank(rows, kv, 4, dim, dtype), lengths=short),
        Part(*bank(rows, kv, tokens, dim, dtype), causal=True),
    ]
    return q, parts


def leaves_of(q, parts):
    leaves = [q]
    for part in parts:
        leaves += [part.keys, part.values]
    return leaves


def with_gradients(path, q, parts, leaves):
    """The output of one path and the gradients of the leaves."""
    out = path(q, parts, q.shape[3] ** -0.5)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize(
    "kv,rep,dim,tokens", [(2, 3, 8, 5), (1, 1, 16, 1), (3, 2, 4, 13), (2, 1, 32, 2)]
)
def test_outputs_and_gradients_equal_the_plain_formula(kv, rep, dim, tokens):
    q, parts = build(kv, rep, dim, tokens)
    leaves = leaves_of(q, parts)
    fast, fast_grads = with_gradients(attend, q, parts, leaves)
    plain, plain_grads = with_gradients(attend_plain, q, parts, leaves)
    assert (fast - plain).abs().max() < 1e-6  # the plain path scores in fp32
    for a, b in zip(fast_grads, plain_grads, strict=True):
        assert (a - b).abs().max() < 2e-6, f"worst {(a - b).abs().max()}"


@pytest.mark.skipif(
    native() is None, reason="the native module was not built (python -m vise_kernels.build)"
)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("owner", [(0, 0, 1, 2, 2, 2, 1), (0, 1, 2)])
def test_one_kernel_over_all_parts_gives_what_fp64_gives(dim, owner):
    q, parts = build(2, 3, dim, 9, owner, torch.float32)
    assert _in_one(q, parts)
    wide = [Part(p.keys.double(), p.values.double(), p.lengths, p.grid, p.causal) for p in parts]
    leaves = leaves_of(q, parts)
    fast, fast_grads = with_gradients(attend, q, parts, leaves)
    plain, plain_grads = with_gradients(attend_plain, q.double(), wide, leaves)
    assert (fast - plain).abs().max() < 3e-6
    for a, b in zip(fast_grads, plain_grads, strict=True):
        assert (a - b).abs().max() < 2e-6 * max(1.0, b.abs().max().item())
    with torch.no_grad():
        assert torch.equal(attend(q, parts, dim**-0.5), fast)


def test_no_grad_path_equals_grad_path():
    q, parts = build()
    with torch.no_grad():
        quick = attend(q, parts, 0.3)
    assert torch.equal(quick, attend(q, parts, 0.3))
