"""token_logprob on every path that runs here: against the float64 formula, with ugly shapes and
ugly logits.
"""

import itertools

import pytest
import torch
from excess import assert_close, largest_allocation
from vise_kernels.dispatch import choose
from vise_kernels.token_logprob import plain, token_logprob

SHAPES = [(1, 1), (1, 16), (7, 13), (13, 507), (5, 4096), (3, 10007)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["plain", "native", "triton"]
NAMES = ["logprob", "logsumexp", "entropy"]


def runs(path, dtype=torch.float32, device="cpu"):
    """Skip what this machine has not, or the path does not take."""
    try:
        choose("token_logprob", torch.device(device), path)
    except ValueError as obstacle:
        pytest.skip(str(obstacle))
    if path == "native" and dtype == torch.float16:
        pytest.skip("float16 takes the plain path on a CPU")
    if path == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("bfloat16 is judged on a GPU")


def drawn(rows, columns, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    logits = (4 * torch.randn(rows, columns, generator=generator)).to(dtype)
    return logits.to(device), torch.randint(columns, (rows,), generator=generator).to(device)


def check_values(logits, ids, path):
    truths = plain(logits.double(), ids)
    results = token_logprob(logits, ids, path=path)
    for name, actual, truth in zip(NAMES, results, truths, strict=True):
        assert actual.dtype == torch.float32
        what = f"{name} {tuple(logits.shape)} {logits.dtype} {path}"
        assert_close(actual, truth, absolute=3e-6, relative=3e-7, what=what)


def check_gradient(logits, ids, path, weights):
    """Of a weighted sum of all three results, to what rounding to the dtype of logits leaves."""
    dtype = logits.dtype
    actual = gradient(logits.clone(), ids, path, weights)
    truth = gradient(logits.double(), ids, path if dtype == torch.float64 else "plain", weights)
    tiny = 1e-7 if dtype == torch.float16 else 0  # float16 turns subnormal
    assert actual.dtype == dtype
    what = f"gradient {tuple(logits.shape)} {dtype} {path}"
    rounding = torch.finfo(dtype).eps
    assert_close(actual, truth, absolute=2e-6 + tiny, relative=rounding, what=what)


def gradient(logits, ids, path, weights):
    results = token_logprob(logits.requires_grad_(), ids, path=path)
    total = sum((w * r).sum() for w, r in zip(weights, results, strict=True))
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient_against_float64(shape, dtype, path):
    runs(path, dtype)
    logits, ids = drawn(*shape, dtype)
    check_values(logits, ids, path)
    check_gradient(
        logits, ids, path, torch.randn(3, shape[0], generator=torch.Generator().manual_seed(1))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 151_936)])
def test_values_and_gradient_on_a_gpu(shape, dtype):
    logits, ids = drawn(*shape, dtype, device="cuda")
    check_values(logits, ids, "triton")
    check_gradient(logits, ids, "triton", torch.randn(3, shape[0], device="cuda"))


def test_gradcheck_of_plain():
    logits, ids = drawn(4, 11)
    assert torch.autograd.gradcheck(lambda z: plain(z, ids), (logits.double().requires_grad_(),))


def test_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).log1p()  # probabilities 1/6, 2/6, 3/6
    logprob, logsumexp, entropy = token_logprob(logits, torch.tensor([2]))
    expected = (
        torch.tensor([0.5]).log(),
        torch.tensor([6.0]).log(),
        -(torch.tensor([[1, 2, 3]]) / 6 * (torch.tensor([[1, 2, 3]]) / 6).log()).sum(-1),
    )
    results = (logprob, logsumexp, entropy)
    for name, actual, truth in zip(NAMES, results, expected, strict=True):
        assert_close(actual, truth, absolute=1e-6, what=name)


@pytest.mark.parametrize("path", PATHS)
def test_banned_logits_have_no_weight_and_no_gradient(path):
    runs(path)
    logits, ids = drawn(7, 5000)
    logits[:, ::3] = -torch.inf
    logits[0] = -torch.inf
    logits[0, 4999] = 2.0  # one id left, at the far end
    logits[:, :4097][1:3] = -torch.inf
    ids = torch.tensor(
        [4999, 4999, 4100, 1, 2, 4, 3]
    )  # the last one is banned: log-prob minus infinity
    check_values(logits, ids, path)
    z = logits.clone().requires_grad_()
    logprob, logsumexp, entropy = token_logprob(z, ids, path=path)
    assert logprob[6] == -torch.inf and abs(entropy[0]) < 1e-30
    (logprob[:6].sum() + logsumexp[:6].sum() + entropy[:6].sum()).backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad[:6][logits[:6] == -torch.inf] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_row_without_a_distribution_is_nan_and_harms_no_other(path):
    runs(path)
    logits, ids = drawn(4, 300)
    logits[1] = -torch.inf
    logits[2, 70] = torch.nan
    results = torch.stack(token_logprob(logits, ids, path=path))
    assert results[0, 1].isnan() and results[2, 1].isnan() and results[1, 1] == -torch.inf
    assert results[:, 2].isnan().all()
    assert torch.isfinite(results[:, [0, 3]]).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("low, high", [(0, 9000), (-9000, 0), (9000, -9000)])
def test_the_maximum_may_move_all_the_way(low, high, path):
    runs(path)
    logits = torch.linspace(low, high, 9001)[None].repeat(2, 1)
    check_values(logits, torch.tensor([0, 9000]), path)


@pytest.mark.parametrize("path", PATHS)
def test_rows_and_columns_may_be_strided(path):
    runs(path)
    logits, _ = drawn(12, 64)
    ids = torch.arange(12)[::2]
    for view in (
        logits[::2, 3:50],
        logits.T[:12:2].contiguous().T.T,
        logits[:1].expand(6, 64),
        logits[::2, ::2],
    ):
        check_values(view, ids[: len(view)] % view.shape[1], path)
        check_gradient(view, ids[: len(view)] % view.shape[1], path, torch.randn(3, len(view)))


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path):
    runs(path)
    z = torch.empty(0, 9, requires_grad=True)
    results = token_logprob(z, torch.empty(0, dtype=torch.int64), path=path)
    assert all(result.shape == (0,) for result in results)
    sum(result.sum() for result in results).backward()
    assert z.grad.shape == (0, 9)


def test_ids_outside_the_vocabulary():
    logits, ids = drawn(5, 33)
    for path, bad in itertools.product(PATHS, (-1, 33)):
        ids[2] = bad
        try:
            choose("token_logprob", logits.device, path)
        except ValueError:
            continue
        if path == "triton":
            results = torch.stack(token_logprob(logits, ids, path=path))
            assert results[0].isnan().tolist() == [False, False, True, False, False]
            continue
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            token_logprob(logits, ids, path=path)


def test_what_does_not_fit_is_refused():
    logits, ids = drawn(5, 33)
    for bad in ((logits[0], ids), (logits, ids[:4]), (logits, ids.int()), (logits.long(), ids)):
        with pytest.raises(ValueError, match="token_logprob"):
            token_logprob(*bad)
    runs("native")
    with pytest.raises(ValueError, match="float64"):
        token_logprob(logits.double(), ids, path="native")


def test_float64_stays_float64():
    logits, ids = drawn(5, 33)
    assert token_logprob(logits.double(), ids)[0].dtype == torch.float64


def test_native_forward_allocates_and_keeps_no_more_than_rows():
    runs("native")
    logits, ids = drawn(64, 20_000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        largest, _ = largest_allocation(
            lambda: token_logprob(logits.requires_grad_(), ids, path="native")
        )
    assert largest <= 64 * 3 * 4 + 64, f"{largest} bytes for 64 rows"
    mine = {logits.untyped_storage().data_ptr(), ids.untyped_storage().data_ptr()}
    assert all(t.untyped_storage().data_ptr() in mine or t.numel() <= 3 * 64 for t in kept)


@pytest.mark.parametrize("path", ["native", "triton"])
def test_the_op_is_registered_as_torch_wants_it_and_traces_whole(path):
    runs(path)
    logits, ids = drawn(5, 33)
    torch.library.opcheck(
        torch.ops.vise_kernels.token_logprob.default, (logits.requires_grad_(), ids, path)
    )
    traced = torch.compile(
        lambda z: token_logprob(2 * z, ids, path=path)[0].sum(), fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(plain(2 * logits, ids)[0].sum(), logits)[0]
    assert_close(
        torch.autograd.grad(traced(logits), logits)[0],
        expected,
        absolute=4e-6,
        what="traced gradient",
    )
