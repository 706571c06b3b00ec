"""Few rows times a large weight: the native path against float64 on ugly shapes, when it is taken,
what it refuses.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from vise_kernels import few_rows
from vise_kernels.dispatch import native
from vise_kernels.few_rows import LARGE, gains

NATIVE = pytest.mark.skipif(
    native() is None, reason="the native module was not built (python -m vise_kernels.build)"
)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 33, 49, 64, 65, 131)
WEIGHTS = ((640, 411), (1, 1), (15, 6), (17, 7), (257, 12), (96, 5), (31, 641))  # width, outs
SHAPES = [(rows, *weight) for rows, weight in itertools.product(ROWS, WEIGHTS)]


def operands(rows, width, outs):
    generator = torch.Generator().manual_seed(rows * 7919 + width)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(rows, width), draw(outs, width) / width**0.5, draw(outs)


def within_rounding(found, x, weight, bias=None, low=None, up=None):
    """Eight units in the last place of the sum of magnitudes: a sum of n products may be off by n
    of them.
    """
    operands = [None if t is None else t.double() for t in (x, weight, bias, low, up)]
    truth = few_rows(*operands, path="plain")
    magnitude = few_rows(*[None if t is None else t.abs() for t in operands], path="plain")
    assert found.shape == truth.shape and found.dtype == torch.float32
    return bool(((found - truth).abs() <= 8 * 2**-24 * magnitude).all())


@NATIVE
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_the_plain_product(shape, biased):
    x, weight, bias = operands(*shape)
    bias = bias if biased else None
    for path in ("native", "plain"):
        assert within_rounding(few_rows(x, weight, bias, path=path), x, weight, bias)


@NATIVE
@pytest.mark.parametrize("rank", [1, 16, 19, 48])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_low_rank_term_is_added(shape, rank):
    x, weight, bias = operands(*shape)
    low, up, _ = operands(shape[0], rank, shape[2])
    for path in ("native", "plain"):
        assert within_rounding(
            few_rows(x, weight, bias, low, up, path=path), x, weight, bias, low, up
        )


def shelf(t):
    """A tensor's numbers between nans."""
    margin = torch.full((64,), torch.nan)
    return torch.cat([margin, t.flatten(), margin])


@NATIVE
@pytest.mark.parametrize("rows", [3, 6, 13, 17, 33, 64])
@pytest.mark.parametrize("width, outs, rank", [(37, 23, 0), (37, 23, 19), (16, 12, 5), (1, 1, 1)])
def test_nothing_is_written_beyond_the_result_and_nothing_read_beyond_the_operands(
    rows, width, outs, rank
):
    """Each operand lies between nans: a sum that read one would be nan.

    The result lies between marks.
    """
    x, weight, bias = operands(rows, width, outs)
    low, up, _ = operands(rows, rank, outs) if rank else (x[:, :0], weight[:, :0], None)
    y = torch.full((rows * outs + 128,), 7.0)
    held = [shelf(t) for t in (x, weight, bias, low, up)]
    at_x, at_weight, at_bias, at_low, at_up, at_y = (t.data_ptr() + 4 * 64 for t in (*held, y))
    low_rank = (at_low, rank, at_up)
    native().few_rows(at_x, rows, width, at_weight, outs, at_bias, *low_rank, at_y)
    assert (y[:64] == 7).all() and (y[-64:] == 7).all()
    given = (low, up) if rank else (None, None)
    assert within_rounding(y[64:-64].view(rows, outs), x, weight, bias, *given)


@NATIVE
def test_strided_operands_and_empty_ones():
    x, weight, bias = operands(8, 130, 66)
    truth = F.linear(x, weight, bias)
    assert torch.allclose(
        few_rows(x.T.contiguous().T, weight.T.contiguous().T, bias, path="native"), truth, atol=1e-5
    )
    wide = torch.cat([x, x], 1)[:, :130]
    strided = bias[:, None].expand(-1, 2)[:, 0]
    assert torch.allclose(few_rows(wide, weight, strided, path="native"), truth, atol=1e-5)
    assert few_rows(x[:0], weight, path="native").shape == (0, 66)
    assert few_rows(x, weight[:0], path="native").shape == (8, 0)
    assert torch.equal(few_rows(x[:, :0], weight[:, :0], bias, path="native"), bias.expand(8, -1))


@NATIVE
def test_rows_do_not_depend_on_their_neighbours():
    x, weight, _ = operands(13, 640, 411)
    whole = few_rows(x, weight, path="native")
    for rows in (slice(0, 4), slice(4, 7), slice(12, 13)):
        assert torch.allclose(few_rows(x[rows], weight, path="native"), whole[rows], atol=2e-6)


@NATIVE
def test_not_finite_numbers_stay_in_their_row():
    x, weight, _ = operands(5, 64, 30)
    x[2, 63] = torch.inf
    x[3, 0] = torch.nan
    found = few_rows(x, weight, path="native")
    assert found[3].isnan().all()
    assert not found[2].isfinite().any()
    assert found[[0, 1, 4]].isfinite().all()


@NATIVE
def test_it_is_taken_on_one_thread_for_few_rows_and_a_large_weight():
    threads = torch.get_num_threads()
    large = torch.zeros(LARGE // 64, 64)
    small = torch.zeros(16, 64)
    try:
        torch.set_num_threads(1)
        assert gains(torch.zeros(8, 64), large)
        assert not gains(torch.zeros(8, 64), small)
        assert not gains(torch.zeros(500, 64), large)
        assert not gains(torch.zeros(1, 64), large)
        assert gains(torch.zeros(16, 1920), torch.zeros(640, 1920))
        assert not gains(torch.zeros(64, 4096), torch.zeros(640, 4096))
        assert not gains(torch.zeros(8, 64, dtype=torch.float64), large.double())
        assert not gains(torch.zeros(8, 64, requires_grad=True), large)
        torch.set_num_threads(2)
        assert not gains(torch.zeros(8, 64), large)
    finally:
        torch.set_num_threads(threads)


def test_gradients_flow_by_itself():
    x, weight, bias = operands(8, 640, 512)
    x.requires_grad_()
    few_rows(x, weight, bias).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(8, -1), atol=1e-4)


@NATIVE
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda x, w, b: (x.double(), w.double(), None), "float32"),
        (lambda x, w, b: (x.requires_grad_(), w, b), "gradients"),
        (lambda x, w, b: (x, w[:, :-1], b), "do not fit"),
        (lambda x, w, b: (x, w, b[:-1]), "do not fit"),
        (lambda x, w, b: (x, w, b, x[:, :3], w[:, :4]), "do not fit"),
        (lambda x, w, b: (x, w, b, x[:-1, :4], w[:, :4]), "do not fit"),
        (lambda x, w, b: (x, w, b, x[:, :4]), "do not fit"),
    ],
)
def test_what_it_cannot_take_is_refused(spoil, words):
    with pytest.raises(ValueError, match=words):
        few_rows(*spoil(*operands(8, 64, 30)), path="native")


def test_there_is_no_triton_path():
    with pytest.raises(ValueError, match="triton"):
        few_rows(*operands(8, 64, 30), path="triton")
