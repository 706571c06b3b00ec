"""Merged attention over shared parts against the written-out formula: outputs and every gradient,
on ugly shapes.
"""

import pytest
import torch
from vise_kernels.dispatch import native

from vise_fast.model.attention import _in_one, attend, attend_plain
from vise_fast.model.tree import Grid, Part


def bank(entries, kv, keys, dim, dtype=torch.float64):
    return [torch.randn(entries, kv, keys, dim, dtype=dtype, requires_grad=True) for _ in range(2)]


def build(kv=2, rep=3, dim=8, tokens=5, owner=(0, 0, 1, 2, 2, 2, 1), dtype=torch.float64):
    torch.manual_seed(0)
    rows = len(owner)
    q = torch.randn(rows, tokens, kv * rep, dim, dtype=dtype, requires_grad=True)
    parts = [
        Part(
            *bank(3, kv, 11, dim, dtype),
            lengths=torch.tensor([11, 1, 7]),
            grid=Grid(list(owner), 3),
        ),
        Part(*bank(rows, kv, 4, dim, dtype), lengths=torch.tensor([4, 2, 1, 4, 3, 1, 2])[:rows]),
        Part(*bank(rows, kv, tokens, dim, dtype), causal=True),
    ]
    return q, parts


@pytest.mark.parametrize(
    "kv,rep,dim,tokens", [(2, 3, 8, 5), (1, 1, 16, 1), (3, 2, 4, 13), (2, 1, 32, 2)]
)
def test_outputs_and_gradients_equal_the_plain_formula(kv, rep, dim, tokens):
    q, parts = build(kv, rep, dim, tokens)
    leaves = [q] + [t for p in parts for t in (p.keys, p.values)]
    results = []
    for path in (attend, attend_plain):
        out = path(q, parts, dim**-0.5)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weight).sum(), leaves)))
    (fast, fast_grads), (plain, plain_grads) = results
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
    leaves, results = [q, *(t for p in parts for t in (p.keys, p.values))], []
    for path, query, seen in ((attend, q, parts), (attend_plain, q.double(), wide)):
        out = path(query, seen, dim**-0.5)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weight).sum(), leaves)))
    (fast, fast_grads), (plain, plain_grads) = results
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


@pytest.mark.parametrize(
    "owner,entries,uniform",
    [([0, 0, 1, 1], 2, True), ([0, 1, 2], 3, True), ([1, 0, 1], 2, False), ([0, 0, 1], 2, False)],
)
def test_grid_round_trip(owner, entries, uniform):
    grid = Grid(owner, entries)
    x = torch.arange(float(len(owner) * 2)).view(-1, 2)
    assert grid.uniform is uniform
    assert torch.equal(grid.gather(grid.spread(x)), x)
