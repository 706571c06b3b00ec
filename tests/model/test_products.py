"""Products through oneDNN against F.linear and F.gelu: values, FLOPs counted, and when they step
aside.
"""

import pytest
import torch
from torch.nn import functional as F

from vise_fast.model import products
from vise_fast.profile.flops import executed_flops

SHAPES = [
    (3, 640, 411),
    (8, 512, 512),
    (64, 257, 1031),
    (1, 640, 640),
    (2, 640, 640),
    (65, 640, 640),
    (8, 37, 5),
]


def operands(rows, width, out, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(out, width, dtype=dtype) / width**0.5
    return x, weight, torch.randn(out, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_values_are_those_of_the_plain_versions(shape, biased):
    x, weight, bias = operands(*shape)
    bias = bias if biased else None
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (products.linear(x, weight, bias) - truth).abs().max() < 5e-6
    bent = F.gelu(truth, approximate="tanh")
    assert (products.linear_gelu_tanh(x, weight, bias) - bent).abs().max() < 5e-6


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_product_is_counted(shape):
    x, weight, bias = operands(*shape)
    with executed_flops() as counter:
        products.linear(x, weight, bias)
        products.linear_gelu_tanh(x, weight, bias)
    assert counter.get_total_flops() == 2 * 2 * shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_the_low_rank_term_is_added_and_counted(shape, threads):
    rows, width, out = shape
    x, weight, bias = operands(*shape)
    down = torch.randn(16, width) / width**0.5
    up = torch.randn(out, 16)
    truth = x.double() @ (weight.double() + up.double() @ down.double()).T + bias
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with executed_flops() as counter:
            found = products.adapted(x, weight, bias, down, up)
    finally:
        torch.set_num_threads(before)
    assert (found - truth).abs().max() < 2e-5
    assert counter.get_total_flops() == 2 * rows * (width * out + 16 * width + 16 * out)


def test_gradients_flow():
    x, weight, bias = operands(8, 640, 640)
    x.requires_grad_()
    F.gelu(products.linear(x, weight, bias), approximate="tanh").sum().backward()
    wanted = x.grad.clone()
    x.grad = None
    products.linear_gelu_tanh(x, weight, bias).sum().backward()
    assert torch.allclose(x.grad, wanted)


@torch.no_grad()
def test_other_dtypes_take_the_plain_version():
    x, weight, bias = operands(8, 640, 640, torch.float64)
    assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
    bent = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert torch.equal(products.linear_gelu_tanh(x, weight, bias), bent)
