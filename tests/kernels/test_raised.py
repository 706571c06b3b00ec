"""What follows a projection, with its low-rank term raised in passing: every path against the
formula in fp64 on ugly shapes, with and without LoRA.
"""

import pytest
import torch
from excess import assert_close
from torch.nn import functional as F
from trying import draw, runs
from vise_kernels import raised_heads, raised_norm, raised_swiglu
from vise_kernels.heads import Turn, plain

EPS = 1e-6
PATHS = ("plain", "triton")
DTYPES = {torch.float32: 1e-5, torch.float16: 8e-3}
# rows, width, rank
SHAPES = [(1, 2, 1), (3, 7, 2), (5, 130, 16), (37, 64, 5), (17, 300, 33), (1, 512, 16), (0, 8, 4)]
# on either side of FEW rows, and more columns than a program takes at a time
NORMS = [*SHAPES, (515, 70, 3), (600, 9, 2), (513, 600, 3), (2, 1100, 5)]
# rows, query heads, key heads, head dimension, rank
HEADS = [(1, 1, 1, 2, 1), (9, 3, 1, 16, 4), (4, 16, 8, 128, 16), (37, 5, 3, 10, 3), (0, 2, 1, 8, 2)]


def group(rows, widths, rank, dtype, lora):
    """wide, up (block-diagonal) and u in fp64."""
    outs = sum(widths)
    behind = rank * len(widths) * lora
    wide = draw(rows, outs + behind).to(dtype)
    if not lora:
        return wide, None, wide.double()
    ups = [0.3 * draw(width, rank, seed=j) for j, width in enumerate(widths)]
    up = torch.block_diag(*ups).to(dtype)
    return wide, up, wide[:, :outs].double() + wide[:, outs:].double() @ up.double().T


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("shape", NORMS)
def test_the_way_out(path, dtype, lora, shape):
    runs("raised_norm", path)
    rows, width, rank = shape
    wide, up, u = group(rows, [width], rank, dtype, lora)
    x = draw(rows, width, seed=7).to(dtype)
    weight = (1 + 0.3 * draw(width, seed=8)).to(dtype)
    found = raised_norm(x, wide, up, weight, EPS, path=path)
    bound = DTYPES[dtype]
    total = x.double() + u
    assert_close(found.sum, total, absolute=bound, relative=bound)
    normed = F.rms_norm(total, (width,), weight.double(), EPS)
    scale = 1.0
    if x.numel():  # the norm of a small sum shows the sum's rounding
        scale = 1 + 1 / total.square().mean(1, keepdim=True).sqrt()
    assert_close(found.norm, normed, absolute=2 * bound * scale, relative=bound)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_into_the_mlp(path, dtype, lora, shape):
    runs("raised_swiglu", path)
    rows, width, rank = shape
    wide, up, u = group(rows, [width, width], rank, dtype, lora)
    found = raised_swiglu(wide, up, width, path=path)
    gate, linear = u.chunk(2, 1)
    bound = 2 * DTYPES[dtype]
    assert_close(found, F.silu(gate) * linear, absolute=bound, relative=bound)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("shape", HEADS)
def test_the_way_into_attention(path, dtype, lora, shape):
    runs("raised_heads", path)
    rows, queries, keys, dim, rank = shape
    widths = [queries * dim, keys * dim, keys * dim]
    wide, up, u = group(rows, widths, rank, dtype, lora)
    angle = draw(rows, dim // 2, seed=1)
    weights = [(1 + 0.3 * draw(dim, seed=s)).to(dtype) for s in (2, 3)]
    turn = Turn(*weights, angle.cos(), angle.sin(), EPS)
    found = raised_heads(wide, up, turn, queries, path=path)
    wanted = plain(u, Turn(*(t.double() for t in turn[:4]), EPS), queries)
    bound = 4 * DTYPES[dtype]
    for part, truth in zip(found, wanted, strict=True):
        assert part.is_contiguous() and part.shape == truth.shape
        assert_close(part, truth, absolute=bound, relative=bound)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_lie_apart(path):
    runs("raised_swiglu", path)
    wide, up, _ = group(9, [20, 20], 3, torch.float32, True)
    apart = F.pad(wide, (0, 5))[:, : wide.shape[1]]
    wanted = raised_swiglu(wide, up, 20, path="plain")
    assert torch.allclose(raised_swiglu(apart, up, 20, path=path), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: raised_norm(draw(3, 4), draw(3, 5), None, draw(4), EPS),
        lambda: raised_norm(draw(3, 4), draw(3, 6), draw(4, 1), draw(4), EPS),
        lambda: raised_norm(draw(2, 4), draw(3, 4), None, draw(4), EPS),
        lambda: raised_norm(draw(3, 4), draw(3, 4), None, draw(5), EPS),
        lambda: raised_swiglu(draw(3, 9), draw(8, 1), 4),
        lambda: raised_swiglu(draw(3, 10), draw(2, 8).T, 4),
        lambda: raised_heads(
            draw(3, 8), None, Turn(draw(2), draw(2), draw(2, 1), draw(2, 1), EPS), 2
        ),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"raised_\w+: "):
        call()


def test_gradients_take_the_plain_path():
    wide, up, _ = group(3, [4, 4], 2, torch.float32, True)
    wide.requires_grad_()
    raised_swiglu(wide, up, 4).sum().backward()
    assert wide.grad.abs().sum() > 0
