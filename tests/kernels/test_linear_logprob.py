"""linear_logprob and linear_logprob_kl on every path that runs here, against the full softmax in
float64.
"""

import importlib

import pytest
import torch
from excess import assert_close, largest_allocation
from vise_kernels.dispatch import choose
from vise_kernels.linear_logprob import (
    _merge_kernel,
    full_softmax,
    linear_logprob,
    linear_logprob_kl,
)

SHAPES = [(1, 1, 1), (7, 13, 131), (11, 123, 507), (252, 123, 507), (3, 64, 1031)]  # N, H, V
LARGE = (2500, 256, 20_011)
PATHS = ["plain", "triton"]
NAMES = ["logprob", "reference logprob", "kl"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def runs(path, dtype=torch.float32, device="cpu"):
    try:
        choose("linear_logprob", torch.device(device), path)
    except ValueError as obstacle:
        pytest.skip(str(obstacle))
    if path == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("bfloat16 is judged on a GPU")


class Case:
    """Hidden rows whose logits have a spread of 3, a reference nearby, a third of ids banned."""

    def __init__(self, rows, width, vocabulary, dtype=torch.float32, device="cpu", banned=True):
        generator = torch.Generator().manual_seed(rows + width + vocabulary)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        hidden = 3 * normal(rows, width) / width**0.5
        self.hidden = hidden.to(device, dtype)
        self.reference = (hidden + 0.5 * normal(rows, width) / width**0.5).to(device, dtype)
        self.head = normal(vocabulary, width).to(device, dtype)
        self.ids = torch.randint(vocabulary, (rows,), generator=generator).to(device)
        self.banned = (
            (torch.rand(vocabulary, generator=generator) < 0.3).to(device) if banned else None
        )
        if banned:
            self.banned[self.ids] = False
        self.weights = normal(2, rows).to(device)

    def run(self, op, dtype=None, **options):
        """Results and the gradient of a weighted sum of logprob and kl."""
        given = (self.hidden, self.reference, self.head)
        hidden, *others = (t if dtype is None else t.to(dtype) for t in given)
        hidden = hidden.detach().clone().requires_grad_()
        results = op(hidden, *others, self.ids, banned=self.banned, **options)
        loss = (self.weights[0] * results[0]).sum() + (self.weights[1] * results[2]).sum()
        return results, torch.autograd.grad(loss, hidden)[0]


def check(case, path, large=False, **options):
    """float32: to rounding. 16 bits: no further from float64 than the full softmax in that dtype,
    plus an epsilon and, for the gradient, one more rounding (it is stored as two 16-bit tensors
    until the backward pass). `large`: float32 sums of so many terms are off by more than that, so
    they are held to what the full softmax in float32 is off.
    """
    truths, true_gradient = case.run(full_softmax, torch.float64)
    results, gradient = case.run(linear_logprob_kl, path=path, **options)
    dtype = case.hidden.dtype
    of_results = 3e-6
    of_gradient = 1e-5
    rounding = 1e-5
    if large or dtype != torch.float32:
        plain_results, plain_gradient = case.run(full_softmax)
        more = 1e-6 if dtype == torch.float32 else 1e-3
        of_results = worst(torch.stack(plain_results), torch.stack(truths)) + more
        of_gradient = worst(plain_gradient, true_gradient) + more
        rounding = torch.finfo(dtype).eps
    for name, actual, truth in zip(NAMES, results, truths, strict=True):
        assert actual.dtype == torch.float32
        what = f"{name} {path} {dtype}"
        assert_close(actual, truth, absolute=of_results, relative=1e-6, what=what)
    assert gradient.dtype == dtype
    what = f"gradient {path} {dtype}"
    assert_close(gradient, true_gradient, absolute=of_gradient, relative=rounding, what=what)


def worst(actual, truth):
    return float((actual.detach().double() - truth.detach().double()).abs().max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient_against_float64(shape, dtype, banned, path):
    runs(path, dtype)
    if path == "triton" and shape[0] > 100:
        pytest.skip("too slow in the interpreter")
    check(Case(*shape, dtype, banned=banned), path, chunk=128)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_values_and_gradient_on_a_gpu(shape, dtype, banned):
    case = Case(*shape, dtype, device="cuda", banned=banned)
    check(case, "triton", large=shape == LARGE)


@pytest.mark.parametrize("path", PATHS)
def test_the_small_op_agrees_with_the_large_one(path):
    runs(path)
    case = Case(7, 13, 131)
    both, _ = case.run(linear_logprob_kl, path=path)
    hidden = case.hidden.clone().requires_grad_()
    alone = linear_logprob(hidden, case.head, case.ids, banned=case.banned, path=path)
    assert_close(alone, both[0], absolute=1e-6, what="logprob")
    kept, _ = case.run(full_softmax, torch.float64)
    hidden_64 = case.hidden.double().requires_grad_()
    rows = (hidden_64, hidden_64.detach())
    truth = full_softmax(*rows, case.head.double(), case.ids, case.banned)[0]
    (gradient,) = torch.autograd.grad(alone.sum(), hidden)
    (true_gradient,) = torch.autograd.grad(truth.sum(), hidden_64)
    assert_close(alone, kept[0], absolute=3e-6, what="logprob")
    assert_close(gradient, true_gradient, absolute=1e-5, what="gradient")


def test_gradcheck_of_plain():
    case = Case(5, 6, 300)
    head = case.head.double()
    options = {"chunk": 128, "path": "plain"}

    def run(h):
        reference = case.reference.double()
        return linear_logprob_kl(h, reference, head, case.ids, banned=case.banned, **options)

    def alone(h):
        return linear_logprob(h, head, case.ids, **options)

    hidden = case.hidden.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: run(h)[0], (hidden,))
    assert torch.autograd.gradcheck(lambda h: run(h)[2], (hidden,))
    assert torch.autograd.gradcheck(alone, (hidden,))


def test_by_hand():
    head = torch.tensor([[0.0], [1.0]])
    p = 0.8
    q = 0.5
    hidden, reference = (torch.logit(torch.tensor([[share]])) for share in (p, q))
    logprob, reference_logprob, kl = linear_logprob_kl(hidden, reference, head, torch.tensor([1]))
    truth = torch.tensor([p, q, 1.0]).log()
    truth[2] = p * torch.tensor(p / q).log() + (1 - p) * torch.tensor((1 - p) / (1 - q)).log()
    assert_close(torch.cat([logprob, reference_logprob, kl]), truth, absolute=1e-6, what="by hand")


@pytest.mark.parametrize("path", PATHS)
def test_equal_rows_have_no_divergence(path):
    runs(path)
    case = Case(7, 13, 507)
    case.reference = case.hidden
    (_, _, kl), _ = case.run(linear_logprob_kl, path=path)
    assert_close(kl, torch.zeros(7), absolute=1e-6, what="kl")
    hidden = case.hidden.clone().requires_grad_()
    kl = linear_logprob_kl(hidden, case.hidden, case.head, case.ids, path=path)[2]
    assert_close(
        torch.autograd.grad(kl.sum(), hidden)[0],
        torch.zeros_like(hidden),
        absolute=1e-6,
        what="gradient of kl",
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", ["rising", "falling", "last"])
def test_the_maximum_may_move_with_every_chunk(order, path):
    """Logits from -400 to 400 along the ids; "last": nothing but one id at the far end counts."""
    runs(path)
    case = Case(3, 4, 1030, banned=False)
    steps = torch.linspace(-100, 100, 1030)
    steps = {
        "rising": steps,
        "falling": steps.flip(0),
        "last": torch.where(torch.arange(1030) == 1029, 100.0, -100.0),
    }[order]
    case.head = steps[:, None] * torch.tensor([1.0, 0, 0, 0]) + 0.1 * case.head
    case.hidden = torch.tensor([[4.0, 1, 0, 0], [1, 0, 1, 0], [0.1, 0, 0, 1]])
    case.reference = case.hidden + 0.01
    case.ids = torch.tensor([1029, 0, 513])
    truths, true_gradient = case.run(full_softmax, torch.float64)
    results, gradient = case.run(linear_logprob_kl, path=path, chunk=128)
    for name, actual, truth in zip(NAMES, results, truths, strict=True):
        assert_close(actual, truth, absolute=3e-5, relative=1e-6, what=f"{name} {order} {path}")
    assert_close(
        gradient, true_gradient, absolute=2e-4, relative=1e-5, what=f"gradient {order} {path}"
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_chunk_may_be_banned(path):
    runs(path)
    case = Case(4, 13, 507)
    case.ids = torch.tensor([200, 300, 400, 506])
    case.banned = torch.arange(507) < 200
    check(case, path, chunk=128)


@pytest.mark.parametrize("path", PATHS)
def test_a_banned_or_unknown_id_of_ones_own(path):
    runs(path)
    case = Case(4, 13, 131)
    case.banned[case.ids[1]] = True
    case.banned[case.ids[[0, 2, 3]]] = False
    with torch.no_grad():
        logprob = linear_logprob(case.hidden, case.head, case.ids, banned=case.banned, path=path)
        assert logprob[1] == -torch.inf and torch.isfinite(logprob[[0, 2, 3]]).all()
        case.ids[3] = 131
        assert linear_logprob(case.hidden, case.head, case.ids, path=path)[3].isnan()
    case.ids[3] = 5
    hidden = case.hidden.clone().requires_grad_()
    linear_logprob(hidden, case.head, case.ids, banned=case.banned, path=path)[
        [0, 2, 3]
    ].sum().backward()
    assert torch.isfinite(hidden.grad).all() and (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_blocks_of_rows_and_chunks_of_ids_do_not_show(path, monkeypatch):
    runs(path)
    case = Case(11, 13, 507)
    whole, gradient = case.run(linear_logprob_kl, path=path)
    monkeypatch.setattr(importlib.import_module("vise_kernels.linear_logprob"), "BLOCK_ROWS", 8)
    parts, gradient_of_parts = case.run(linear_logprob_kl, path=path, chunk=128)
    assert_close(torch.stack(parts), torch.stack(whole), absolute=2e-6, what="results")
    assert_close(gradient_of_parts, gradient, absolute=1e-5, what="gradient")


@pytest.mark.parametrize("path", PATHS)
def test_strided_arguments(path):
    runs(path)
    case = Case(8, 14, 262)
    case.hidden = case.hidden[::2, ::2]
    case.reference = case.reference[::2, ::2]
    case.head = case.head[::2, ::2]
    case.weights = case.weights[:, ::2]
    case.ids = case.ids[::2] // 2
    case.banned = None
    check(case, path)


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path):
    runs(path)
    case = Case(0, 13, 131)
    results, gradient = case.run(linear_logprob_kl, path=path)
    assert all(result.shape == (0,) for result in results) and gradient.shape == (0, 13)


def test_only_the_policy_gets_a_gradient():
    case = Case(5, 13, 131)
    hidden = case.hidden.clone().requires_grad_()
    reference = case.reference.clone().requires_grad_()
    logprob, reference_logprob, kl = linear_logprob_kl(hidden, reference, case.head, case.ids)
    assert logprob.requires_grad and kl.requires_grad and not reference_logprob.requires_grad
    (logprob + kl).sum().backward()
    assert reference.grad is None
    with pytest.raises(ValueError, match="frozen"):
        linear_logprob(hidden, case.head.clone().requires_grad_(), case.ids)
    with torch.no_grad():
        assert not linear_logprob(
            hidden, case.head.clone().requires_grad_(), case.ids
        ).requires_grad


def test_what_does_not_fit_is_refused():
    c = Case(5, 13, 131)
    for bad in (
        (c.hidden[:, :12], c.head, c.ids),
        (c.hidden, c.head.double(), c.ids),
        (c.hidden, c.head, c.ids[:3]),
        (c.hidden, c.head, c.ids.int()),
    ):
        with pytest.raises(ValueError, match="linear_logprob"):
            linear_logprob(*bad)
    with pytest.raises(ValueError, match="banned"):
        linear_logprob(c.hidden, c.head, c.ids, banned=c.banned[:5])
    with pytest.raises(ValueError, match="reference"):
        linear_logprob_kl(c.hidden, c.reference[:3], c.head, c.ids)
    with pytest.raises(ValueError, match="native"):
        linear_logprob(c.hidden, c.head, c.ids, path="native")


def test_the_logits_never_exist():
    """No tensor of forward or backward pass comes near (N,V); the Triton path walks alike."""
    case = Case(16, 32, 4096)
    largest, _ = largest_allocation(lambda: case.run(linear_logprob_kl, path="plain", chunk=256))
    assert largest <= 2 * 16 * 256 * 4, (
        f"{largest} bytes at once; a chunk of logits is {2 * 16 * 256 * 4}, all of them "
        f"{16 * 4096 * 4}"
    )


def test_scoring_without_a_gradient_keeps_nothing():
    case = Case(5, 13, 131)
    with torch.no_grad():
        results = linear_logprob_kl(
            case.hidden.requires_grad_(), case.reference, case.head, case.ids
        )
    assert not any(result.requires_grad for result in results)


@pytest.mark.gpu
@GPU
def test_no_compilation_per_length():
    for rows in (5, 64, 100, 1000):
        Case(rows, 64, 4096, torch.bfloat16, "cuda").run(linear_logprob_kl)
    before = len(_merge_kernel.device_caches[torch.cuda.current_device()][0])
    for rows in range(6, 99, 7):
        Case(rows, 64, 4096, torch.bfloat16, "cuda").run(linear_logprob_kl)
    assert len(_merge_kernel.device_caches[torch.cuda.current_device()][0]) == before


@pytest.mark.gpu
@GPU
def test_extra_memory_at_full_size():
    """Forward and backward at (8192, 2048, 151936) in at most 128 MB beyond arguments and
    gradient.
    """
    case = Case(8192, 2048, 151_936, torch.bfloat16, "cuda", banned=False)
    hidden = case.hidden.requires_grad_()
    linear_logprob(hidden, case.head, case.ids).sum().backward()  # cuBLAS takes its workspace
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, case.head, case.ids).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 128 * 2**20, f"{extra / 2**20:.0f} MB"
