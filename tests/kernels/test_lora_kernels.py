"""The gradients of LoRA's up factors and the taking over of masters: every path on ugly shapes."""

import pytest
import torch
from excess import assert_close
from trying import draw, runs
from vise_kernels import Recast, dispatch, up_gradient
from vise_kernels import recast as recast_module

PATHS = ("plain", "triton")
GROUPS = {
    "one": (1, [1], 1),
    "qkv": (70, [64, 32, 32], 16),
    "odd": (37, [5, 130, 3], 10),
    "pair": (129, [100, 64], 40),
    "four": (9, [3, 4, 5, 6], 2),
    "none": (0, [8, 8], 4),
}
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_up_gradients_are_the_products(path, dtype, group):
    runs("up_gradient", path)
    rows, widths, rank = GROUPS[group]
    grad = draw(rows, sum(widths)).to(dtype)
    high = draw(rows, rank * len(widths), seed=1).to(dtype)
    scales = [0.5 + j for j in range(len(widths))]
    found = up_gradient(grad, high, widths, scales, torch.float32, path=path)
    pieces = zip(grad.double().split(widths, 1), high.double().split(rank, 1), scales, strict=True)
    for result, (piece, raised, scale) in zip(found, pieces, strict=True):
        assert result.dtype == torch.float32
        bound = DTYPES[dtype] * (1 + rows**0.5) * scale
        assert_close(result, scale * piece.T @ raised, absolute=bound, relative=DTYPES[dtype])


def test_up_gradients_of_views_and_other_masters():
    grad = draw(12, 9).T
    high = draw(4, 9, seed=1).T
    wanted = up_gradient(grad.contiguous(), high.contiguous(), [12], [2.0], torch.float32)[0]
    runs("up_gradient", "triton")
    found = up_gradient(grad, high, [12], [2.0], torch.float32, path="triton")[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert up_gradient(grad, high, [12], [2.0], torch.float64)[0].dtype == torch.float64


@pytest.mark.parametrize(
    "grad, high, widths, scales",
    [
        (draw(3, 8), draw(4, 2), [8], [1.0]),
        (draw(3, 8), draw(3, 2), [7], [1.0]),
        (draw(3, 8), draw(3, 3), [4, 4], [1.0, 1.0]),
        (draw(3, 8), draw(3, 2), [4, 4], [1.0]),
    ],
)
def test_up_gradients_that_do_not_fit_are_refused(grad, high, widths, scales):
    with pytest.raises(ValueError, match="do not fit"):
        up_gradient(grad, high, widths, scales, torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masters_are_taken_over_and_nothing_else_is_touched(path, dtype):
    runs("recast", path)
    sources = [draw(3, 5), draw(1, 1), draw(40, 70, seed=1), draw(7, 2, seed=2)]
    scales = [1.0, 2.0, 0.37, -1.5]
    block = torch.full((60, 90), 7.0, dtype=dtype)
    targets = [torch.empty(3, 5, dtype=dtype), torch.empty(1, 1, dtype=dtype)]
    targets += [block[10:50, 4:74], block[50:57, 80:82]]
    recast = Recast(sources, targets, scales, path=path)
    for factor in (1.0, -3.0):
        for source in sources:
            source.mul_(factor)
        recast()
        for source, target, scale in zip(sources, targets, scales, strict=True):
            assert torch.equal(target, (source * scale).to(dtype))
    outside = torch.ones(60, 90, dtype=torch.bool)
    outside[10:50, 4:74] = False
    outside[50:57, 80:82] = False
    assert bool((block[outside] == 7).all())


def test_masters_that_moved_are_found():
    runs("recast", "triton")
    holder = torch.nn.Parameter(draw(4, 6), requires_grad=False)
    target = torch.empty(4, 6)
    recast = Recast([holder], [target], [2.0], path="triton")
    holder.data = draw(4, 6, seed=5)
    recast()
    assert torch.equal(target, holder * 2)


def test_masters_follow_when_the_kernel_is_switched_off_later(monkeypatch):
    """The fast paths prove themselves after the model was loaded, and this was made."""
    runs("recast", "triton")
    gpu = dispatch.Choice("triton", "as on a GPU")
    off = dispatch.Choice("plain", "switched off")
    monkeypatch.setattr(recast_module, "choose", lambda *asked: gpu)
    source = draw(4, 6)
    target = torch.empty(4, 6)
    recast = Recast([source], [target], [2.0])
    monkeypatch.setattr(recast_module, "choose", lambda *asked: off)
    monkeypatch.setattr(recast_module, "launch", lambda *given, **options: None)
    recast()
    assert torch.equal(target, source * 2)


@pytest.mark.parametrize(
    "sources, targets, scales",
    [
        ([], [], []),
        ([draw(2, 3)], [draw(2, 3)], []),
        ([draw(2, 3)], [draw(3, 2)], [1.0]),
        ([draw(3, 2).T], [draw(2, 3)], [1.0]),
        ([draw(2, 3)], [draw(3, 2).T], [1.0]),
        ([draw(2, 3), draw(2, 3)], [draw(2, 3), draw(2, 3).half()], [1.0, 1.0]),
    ],
)
def test_recasts_that_do_not_fit_are_refused(sources, targets, scales):
    with pytest.raises(ValueError, match="recast"):
        Recast(sources, targets, scales)
