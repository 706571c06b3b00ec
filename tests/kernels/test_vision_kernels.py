"""What the vision tower does between products: every path against fp64 on ugly shapes."""

import itertools
import platform

import pytest
import torch
from excess import assert_close
from torch.nn import functional as F
from trying import draw, runs
from vise_kernels import add_layer_norm, rotate
from vise_kernels.add_layer_norm import Affine

PATHS = ("plain", "triton")
DTYPES = {torch.float32: 4e-6, torch.float16: 4e-3}
BOUNDS = {**DTYPES, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 130), (37, 640), (2, 1031), (0, 8)])
def test_sum_and_norm(path, dtype, shape):
    runs("add_layer_norm", path)
    x = draw(*shape).to(dtype)
    b = (2 + draw(*shape, seed=1)).to(dtype)
    weight = (1 + 0.3 * draw(shape[1], seed=2)).to(dtype)
    bias = draw(shape[1], seed=3).to(dtype)
    found = add_layer_norm(x, b, Affine(weight, bias, 1e-6), path=path)
    bound = DTYPES[dtype]
    assert_close(found.sum, x.double() + b.double(), absolute=bound, relative=bound)
    # of the sum as it was rounded: a row of two nearly equal numbers shows every rounding
    wanted = F.layer_norm(found.sum.double(), shape[1:], weight.double(), bias.double(), 1e-6)
    assert_close(found.norm, wanted, absolute=2 * bound, relative=bound)


@pytest.mark.parametrize(
    "path, dtype",
    [
        *itertools.product(PATHS, DTYPES),
        ("native", torch.float32),
        ("native", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 2), (9, 3, 16), (4, 32, 64), (37, 11, 10), (0, 2, 8)])
def test_rotation(path, dtype, shape):
    runs("rotate", path)
    n, heads, dim = shape
    x = draw(n, 3 * heads, dim).to(dtype)[:, :heads]
    angle = 3 * draw(n, dim // 2, seed=1)
    found = rotate(x, angle.cos(), angle.sin(), path=path)
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1))
    turned = turned * torch.polar(torch.ones_like(angle).double(), angle.double())[:, None]
    wanted = torch.cat([turned.real, turned.imag], -1)
    assert_close(found, wanted, absolute=BOUNDS[dtype], relative=BOUNDS[dtype])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="which products are fused is x86's")
@pytest.mark.parametrize("shape", [(9, 3, 16), (37, 11, 10), (130, 16, 72), (2049, 8, 32)])
def test_rotation_rounds_as_the_plain_one_does(shape):
    """Not a last bit differs, on any number of threads: a run is the same with and without."""
    runs("rotate", "native")
    x = draw(shape[0], 3 * shape[1], shape[2])[:, ::2][:, : shape[1]]
    angle = 3 * draw(shape[0], shape[2] // 2, seed=1)
    wanted = rotate(x, angle.cos(), angle.sin(), path="plain")
    assert torch.equal(rotate(x, angle.cos(), angle.sin(), path="native"), wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rotate(draw(3, 4), draw(3, 2), draw(3, 2)),
        lambda: rotate(draw(3, 4, 5), draw(3, 2), draw(3, 2)),
        lambda: rotate(draw(3, 4, 6), draw(2, 3), draw(2, 3)),
        lambda: rotate(draw(3, 4, 6), draw(3, 3), draw(3, 2)),
        lambda: add_layer_norm(draw(3, 4), draw(3, 5), Affine(draw(4), draw(4), 1e-6)),
        lambda: add_layer_norm(draw(3, 4), draw(3, 4), Affine(draw(5), draw(4), 1e-6)),
        lambda: add_layer_norm(draw(3, 4), draw(3, 4), Affine(draw(4), draw(5), 1e-6)),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match="do not fit"):
        call()
