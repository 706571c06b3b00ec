"""RMS norm, SwiGLU and the parting of heads: every path and its gradient against fp64 autograd on
ugly shapes; strides, refusals, sizes without data.
"""

import pytest
import torch
from excess import assert_close
from torch.nn import functional as F
from trying import draw, runs
from vise_kernels import heads, heads_backward, rms_norm, rms_norm_backward, swiglu, swiglu_backward
from vise_kernels.dispatch import native
from vise_kernels.heads import Parts, Turn

EPS = 1e-6
SHAPES = [(1, 1), (1, 16), (3, 7), (5, 130), (37, 640), (2, 1031), (90, 65), (0, 8)]
HEADS = {
    "one": (1, 1, 1, 2),
    "nano": (9, 3, 1, 16),
    "2B": (4, 16, 8, 128),
    "odd": (37, 5, 3, 10),
    "many": (2, 40, 1, 64),
    "long": (70, 6, 2, 24),
    "none": (0, 2, 1, 8),
}
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


PATHS = ("plain", "native", "triton")


def by_autograd(function, x, grads):
    """dL/dx in fp64."""
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, [g.double() for g in grads])[0]


def turned(shape, dtype=torch.float32, device="cpu"):
    n, h, kv, d = HEADS[shape]
    angle = draw(n, d // 2, seed=1)
    weights = [(1 + 0.3 * draw(d, seed=s)).to(device, dtype) for s in (2, 3)]
    return (
        draw(n, (h + 2 * kv) * d).to(device, dtype),
        Turn(*weights, angle.cos().to(device), angle.sin().to(device), EPS),
        h,
    )


def written_out(qkv, turn, queries):
    """Norm, rotation of halves and the parting, in the input's dtype, head by head."""
    d = turn.q_weight.shape[0]
    every = qkv.split(d, 1)
    keys = (len(every) - queries) // 2
    out = []
    for index, x in enumerate(every[: queries + keys]):
        weight = turn.q_weight if index < queries else turn.k_weight
        u = F.rms_norm(x, (d,), weight.to(x.dtype), turn.eps)
        cos, sin = (torch.cat([t, t], 1).to(x.dtype) for t in (turn.cos, turn.sin))
        out.append(u * cos + torch.cat([-u[:, d // 2 :], u[:, : d // 2]], 1) * sin)
    parts = (out[:queries], out[queries:], every[queries + keys :])
    return tuple(torch.stack(part, 1) for part in parts)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_its_gradient(path, shape, dtype):
    runs("rms_norm", path)
    if path == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not know it")
    x = draw(*shape).to(dtype)
    weight = (1 + 0.3 * draw(shape[1], seed=1)).to(dtype)
    dz = draw(*shape, seed=2).to(dtype)
    bound = DTYPES[dtype] / 2

    def norm(x):
        return F.rms_norm(x, shape[1:], weight.double(), EPS)

    found = rms_norm(x, weight, EPS, path=path)
    assert_close(found, norm(x.double()), absolute=bound, relative=bound)
    found = rms_norm_backward(x, weight, dz, EPS, path=path)
    scale = 1.0
    if x.numel():
        size = x.double().square().mean(1, keepdim=True).sqrt()
        scale = dz.abs().max(1, keepdim=True)[0].double() / size
    assert_close(found, by_autograd(norm, x, [dz]), absolute=2 * bound * scale)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_its_gradient(path, shape, dtype):
    runs("swiglu", path)
    if path == "native" and dtype == torch.float16 or path == "triton" and dtype == torch.bfloat16:
        pytest.skip("another path's dtype, or one that the interpreter does not know")
    rows, width = shape
    bound = DTYPES[dtype]
    x = (3 * draw(rows, 2 * width)).to(dtype)
    dz = draw(rows, width, seed=2).to(dtype)

    def function(x):
        return F.silu(x[:, :width]) * x[:, width:]

    assert_close(swiglu(x, path=path), function(x.double()), absolute=bound, relative=bound)
    found = swiglu_backward(x, dz, path=path)
    assert_close(found, by_autograd(function, x, [dz]), absolute=bound, relative=bound)


@pytest.mark.parametrize("path", ["native", "triton"])
def test_swiglu_of_large_gates_is_finite(path):
    runs("swiglu", path)
    below = [-1e30, -200.0, -90.0, -86.0, -50.0, -20.0, -5.0, -1e-30]
    above = [0.0, 1e-30, 5.0, 87.0, 200.0, 1e30]
    gates = torch.tensor([below + above])
    x = torch.cat([gates, torch.ones_like(gates)], 1)
    assert_close(swiglu(x, path=path), F.silu(gates.double()), absolute=1e-36, relative=5e-6)
    wanted = by_autograd(F.silu, gates, [torch.ones_like(gates)])
    slopes = swiglu_backward(x, torch.ones_like(gates), path=path)[:, : gates.shape[1]]
    assert_close(slopes[:, 1:], wanted[:, 1:], absolute=2e-36, relative=5e-6)
    x[0, 3] = torch.nan
    assert swiglu(x, path=path).isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_heads_are_parted_normed_and_turned_and_back(path, shape, dtype):
    runs("heads", path)
    if path == "native" and dtype == torch.float16 or path == "triton" and dtype == torch.bfloat16:
        pytest.skip("another path's dtype, or one that the interpreter does not know")
    qkv, turn, queries = turned(shape, dtype)
    bound = DTYPES[dtype]
    found = heads(qkv, turn, queries, path=path)
    truth = written_out(qkv.double(), turn, queries)
    grads = Parts(*(draw(*part.shape, seed=7).to(dtype) for part in found))
    assert torch.equal(found.v.double(), truth[2])
    assert found.v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    for part, name, true in zip(found, Parts._fields, truth, strict=True):
        assert part.dtype == dtype
        assert_close(part, true, absolute=2 * bound, relative=bound, what=name)
    wanted = by_autograd(lambda x: written_out(x, turn, queries), qkv, grads)
    dim = turn.q_weight.shape[0]
    size = qkv.double().unflatten(1, (-1, dim)).square().mean(-1).rsqrt().clamp(min=1)
    room = 3 * bound * size[..., None].expand(-1, -1, dim).flatten(1)
    found = heads_backward(qkv, turn, grads, path=path)
    assert_close(found, wanted, absolute=room, what="gradient")


@pytest.mark.parametrize("path", ["native", "triton"])
def test_strided_operands_give_what_their_copies_give(path):
    runs("heads", path)
    qkv, turn, queries = turned("odd")
    across = turn._replace(cos=turn.cos.T.contiguous().T, sin=turn.sin.T.contiguous().T)
    found = heads(qkv, turn, queries, path=path)
    others = heads(qkv.T.contiguous().T, across, queries, path=path)
    for part, other in zip(found, others, strict=True):
        assert torch.equal(part, other)
    lying = Parts(*(part.transpose(0, 1).contiguous().transpose(0, 1) for part in found))
    alike = (heads_backward(qkv, turn, grads, path=path) for grads in (found, lying))
    assert torch.equal(*alike)
    x = draw(6, 20)
    assert torch.equal(swiglu(x.T.contiguous().T, path=path), swiglu(x, path=path))


@pytest.mark.skipif(
    native() is None, reason="the native module was not built (python -m vise_kernels.build)"
)
def test_threads_change_nothing():
    threads = torch.get_num_threads()
    x = draw(1500, 700)
    weight = draw(700)
    qkv = draw(3000, 40 * 8)
    turn = Turn(draw(8), draw(8), draw(3000, 4), draw(3000, 4), EPS)
    calls = [
        lambda: swiglu(x),
        lambda: rms_norm(x, weight, EPS),
        lambda: heads(qkv, turn, 20).k,
        lambda: heads_backward(qkv, turn, heads(qkv, turn, 20)),
    ]
    try:
        torch.set_num_threads(1)
        alone = [call() for call in calls]
        torch.set_num_threads(3)
        assert all(torch.equal(one, call()) for one, call in zip(alone, calls, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_mixed_types_take_the_plain_path():
    qkv, turn, queries = turned("odd")
    assert heads(qkv.bfloat16(), turn, queries).q.dtype == torch.bfloat16
    assert rms_norm(draw(3, 4).bfloat16(), draw(4), EPS).shape == (3, 4)
    wide = Turn(*(t.double() for t in turn[:4]), EPS)
    assert_close(heads(qkv, wide, queries).k, heads(qkv.double(), wide, queries).k, absolute=1e-5)


def test_gradients_flow_where_no_path_is_forced():
    x = draw(5, 12).requires_grad_()
    qkv, turn, queries = turned("odd")
    qkv.requires_grad_()
    parts = heads(qkv, turn, queries)
    results = (swiglu(x), rms_norm(x, draw(12), EPS), *parts)
    sum(result.sum() for result in results).backward()
    assert x.grad.abs().sum() > 0
    ones = [torch.ones_like(part) for part in parts]
    wanted = by_autograd(lambda x: written_out(x, turn, queries), qkv, ones)
    assert torch.allclose(qkv.grad, wanted.float(), atol=1e-4)


def small_turn(rows):
    return Turn(draw(2), draw(2), draw(rows, 1), draw(rows, 1), EPS)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: swiglu(draw(3, 4).requires_grad_(), path="native"), "gradients"),
        (lambda: swiglu(draw(3, 4).double(), path="native"), "float32"),
        (lambda: swiglu_backward(draw(3, 4), draw(3, 2).bfloat16(), path="native"), "float32"),
        (lambda: rms_norm(draw(3, 4), draw(4).bfloat16(), EPS, path="native"), "float32"),
        (lambda: heads(draw(3, 8).bfloat16(), small_turn(3), 2, path="native"), "float32"),
        (lambda: swiglu(draw(3, 5), path="native"), "do not fit"),
        (lambda: swiglu_backward(draw(3, 4), draw(3, 3), path="native"), "do not fit"),
        (lambda: rms_norm(draw(3, 4), draw(5), EPS, path="native"), "do not fit"),
        (lambda: rms_norm(draw(3, 4).double(), draw(4), EPS, path="triton"), "float32"),
        (lambda: heads(draw(3, 8), small_turn(3), 3, path="native"), "do not fit"),
        (lambda: heads(draw(3, 8), small_turn(3)._replace(cos=draw(2, 1)), 2), "do not fit"),
        (lambda: swiglu(draw(3, 3)), "do not fit"),
        (lambda: rms_norm(draw(3, 4), draw(5), EPS), "do not fit"),
    ],
)
def test_what_a_path_cannot_take_is_refused(call, words):
    if native() is None and "triton" not in words:
        pytest.skip("the native module was not built (python -m vise_kernels.build)")
    with pytest.raises(ValueError, match=words):
        call()


def test_without_data_the_sizes_are_those_of_a_gpu():
    """Planning: only the results are allocated, as the Triton kernels do."""
    qkv, turn, queries = turned("2B", torch.bfloat16, "meta")
    parts = heads(qkv, turn, queries)
    assert [tuple(p.shape) for p in parts] == [(4, 16, 128), (4, 8, 128), (4, 8, 128)]
    assert parts.q.dtype == torch.bfloat16
    assert heads_backward(qkv, turn, parts).shape == qkv.shape
    assert swiglu(qkv).shape == (4, 16 * 128)
    assert swiglu(qkv.requires_grad_()).requires_grad, "what is to be differentiated is not cut off"


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_on_a_gpu_they_are_what_fp64_says(shape, dtype):
    qkv, turn, queries = turned(shape, dtype, "cuda")
    bound = DTYPES[dtype]
    found = heads(qkv, turn, queries, path="triton")
    for part, true in zip(found, written_out(qkv.double(), turn, queries), strict=True):
        assert_close(part, true, absolute=2 * bound, relative=bound)
    grads = Parts(*(draw(*part.shape, seed=7).to("cuda", dtype) for part in found))
    wide_turn = Turn(*(t.double() for t in turn[:4]), EPS)
    wide_grads = Parts(*(g.double() for g in grads))
    plain = heads_backward(qkv.double(), wide_turn, wide_grads, path="plain")
    excess = (heads_backward(qkv, turn, grads, path="triton").double() - plain).abs()
    assert qkv.numel() == 0 or (excess.max() <= 10 * bound * plain.abs().max())
    if qkv.shape[1] % 2 == 0 and qkv.numel():
        dz = draw(len(qkv), qkv.shape[1] // 2, seed=9).to("cuda", dtype)
        truth = swiglu(qkv.double(), path="plain")
        assert_close(swiglu(qkv, path="triton"), truth, absolute=bound, relative=bound)
        slopes = swiglu_backward(qkv, dz, path="triton")
        truth = swiglu_backward(qkv.double(), dz.double(), path="plain")
        assert_close(slopes, truth, absolute=bound, relative=bound)
