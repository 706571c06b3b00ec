"""The kernels behind `attend`: which one is chosen and why, and that the GPU operators are called
as they are made.

Without a GPU their place is taken by stand-ins in float64, which read memory by the strides the
operators assume and refuse what they refuse; torch's own shape rules (meta tensors) and schemas are
asked too. `pytest -m gpu` compares the real ones with the written-out formula.
"""

import types

import pytest
import torch
from small_engines import ROWS, SIZES, engine_of
from tiny import SHAPES as SMALL_MODELS
from tiny import images

from vise_fast.engine.rollout import Answered
from vise_fast.model import attention, flash
from vise_fast.model.attention import attend, attend_plain
from vise_fast.model.load import Policy
from vise_fast.model.tree import Grid, Part

GPU = torch.cuda.is_available()
CUDA = torch.device("cuda")
SHAPES = [
    (2, 3, 8, 5),
    (1, 1, 16, 1),
    (3, 2, 5, 13),
    (2, 1, 32, 33),
    (2, 2, 24, 32),
    (1, 4, 20, 8),
]  # KV heads, queries per KV head, D, T


def scores(q, k, bias, causal, scale):
    found = q @ k.mT * scale
    found = found if bias is None else found + bias
    return (
        found.masked_fill(torch.ones(found.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if causal
        else found
    )


def gradients(grad, q, k, v, out, lse, bias, causal, scale):
    weights = (scores(q, k, bias, causal, scale) - lse[..., None]).exp()
    share = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return share @ k * scale, share.mT @ q * scale, weights.mT @ grad


def check_operands(causal, *tensors):
    q, k = tensors[:2]
    assert all(x.shape[3] % 8 == 0 and x.stride(3) == 1 for x in tensors), "head dimension"
    assert not any(stride % 8 for x in tensors for stride in x.stride()[:3]), (
        "rows that do not start at 16 bytes"
    )
    assert len({x.shape[1] for x in tensors}) == 1, "heads"
    assert not causal or q.shape[2] == k.shape[2], (
        "the two operators align a causal rectangle differently"
    )


def flash_forward(q, k, v, dropout, causal, debug_mask, *, scale):
    check_operands(causal, q, k, v)
    found = scores(q, k, None, causal, scale)
    return (
        found.softmax(-1) @ v,
        found.logsumexp(-1),
        None,
        None,
        q.shape[2],
        k.shape[2],
        None,
        None,
        None,
    )


def flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, most_q, most_k, dropout, causal, seed, offset, *, scale
):
    check_operands(causal, q, k, v, out, grad)
    assert cum_q is None and cum_k is None and (most_q, most_k) == (q.shape[2], k.shape[2])
    assert lse.shape == q.shape[:3] and lse.is_contiguous()  # its address alone is handed on
    return gradients(grad, q, k, v, out, lse, None, causal, scale)


def check_bias(bias, q, k):
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
        assert bias.stride(3) == 1 and not any(stride % 16 for stride in bias.stride()[:3])


def efficient_forward(q, k, v, bias, compute_log_sumexp, dropout, causal, *, scale):
    check_operands(causal, q, k, v), check_bias(bias, q, k)
    assert compute_log_sumexp
    found = scores(q, k, bias, causal, scale)
    lse = q.new_full((*q.shape[:2], -(-q.shape[2] // 32) * 32), torch.inf)
    lse[:, :, : q.shape[2]] = found.logsumexp(-1)
    return found.softmax(-1) @ v, lse, None, None


def efficient_backward(
    grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
):
    check_operands(causal, q, k, v, out, grad), check_bias(bias, q, k)
    (batch, heads, queries, dim), rows = q.shape, -(-q.shape[2] // 32) * 32
    assert lse.shape == (batch, heads, rows) and (lse[:, :, queries:] == torch.inf).all()
    out = out.as_strided(
        out.shape, (out.stride(0), out.stride(1), heads * dim, 1)
    )  # as the kernel does, whatever the strides are
    lse = lse.as_strided((batch, heads, queries), (lse.stride(0), lse.stride(1), 1))
    assert wanted == [True, True, True, False]
    return *gradients(grad, q, k, v, out, lse, bias, causal, scale), None


STANDINS = types.SimpleNamespace(
    _scaled_dot_product_flash_attention=flash_forward,
    _scaled_dot_product_flash_attention_backward=flash_backward,
    _scaled_dot_product_efficient_attention=efficient_forward,
    _scaled_dot_product_efficient_attention_backward=efficient_backward,
)


def build(kv, rep, dim, tokens, dtype=torch.float64, device="cpu", scale_by=1.0):
    """Queries of seven rows and three parts: a shared ragged bank, a bank per row without padding,
    the rows' own tokens.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (
        (scale_by * torch.randn(*shape, generator=generator, dtype=torch.float64))
        .to(dtype)
        .to(device)
        .requires_grad_()
    )
    owner = [0, 0, 1, 2, 2, 2, 1]
    bank = lambda entries, keys: (draw(entries, kv, keys, dim), draw(entries, kv, keys, dim))
    parts = [
        Part(
            *bank(3, 11),
            lengths=torch.tensor([11, 1, 7], device=device),
            grid=Grid(owner, 3, device),
        ),
        Part(*bank(7, 16)),
        Part(*bank(7, tokens), causal=True),
    ]
    return draw(7, tokens, kv * rep, dim), parts


def with_gradients(path, q, parts, weight=None):
    out = path(q, parts, q.shape[3] ** -0.5)
    weight = (
        torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        if weight is None
        else weight
    )
    return [
        out.detach(),
        *torch.autograd.grad(
            (out * weight).sum(),
            [q] + [bank for part in parts for bank in (part.keys, part.values)],
        ),
    ]


def with_standins(monkeypatch, best):
    """From here on attention takes the stand-ins, as a GPU with this best kernel would; returns the
    names of the kernels used.
    """
    used = []

    def kernel(q, bias):
        chosen = flash.FLASH if best == "flash" and bias is None else flash.EFFICIENT
        used.append(chosen.name)
        return chosen

    monkeypatch.setattr(flash, "aten", STANDINS)
    monkeypatch.setattr(attention, "kernel", kernel)
    return used


@pytest.mark.parametrize("best", ["flash", "efficient"])
@pytest.mark.parametrize("kv, rep, dim, tokens", SHAPES)
def test_gpu_kernels_are_called_as_they_are_made(monkeypatch, best, kv, rep, dim, tokens):
    used = with_standins(monkeypatch, best)
    q, parts = build(kv, rep, dim, tokens)
    for found, truth in zip(
        with_gradients(attend, q, parts), with_gradients(attend_plain, q, parts), strict=True
    ):
        assert (found - truth).abs().max() < 2e-6, (
            f"worst {(found - truth).abs().max()}"
        )  # the plain path scores in fp32
    assert set(used) == {best, "efficient"}


@pytest.mark.parametrize("shape", SMALL_MODELS)
def test_an_engine_gives_gpu_kernels_what_they_assume(monkeypatch, shape):
    """Prefixes, forks, ragged rows, a fan of answers and their update, once on the CPU's kernel and
    once on the stand-ins.
    """
    model, engine = engine_of(shape)
    engine.joins = False  # as on a GPU
    ids, hidden, grads = played(model, engine)
    used = with_standins(monkeypatch, "flash")
    found_ids, found_hidden, found_grads = played(model, engine)
    assert set(used) == {"flash", "efficient"} and torch.equal(found_ids, ids)
    assert (found_hidden - hidden).abs().max() <= 1e-5 * hidden.abs().max()
    for found, truth in zip(found_grads, grads, strict=True):
        assert (found - truth).abs().max() <= 1e-5 * max(truth.abs().max(), 1e-3)


def played(model, engine):
    """Greedy ids, scored hidden states and the adapters' gradients of two answers to each of four
    questions.
    """
    features = engine.encode(images(SIZES))
    prompts = engine.prompt(engine.prefill(features, True), [0, 1, 2, 3], ROWS)
    answers = engine.generate(prompts, [2] * 4, 4, list(range(8)), temperature=0.0)
    hidden = engine.score(features, Answered(ROWS, answers, [0, 0, 1, 1, 2, 2, 3, 3]), True)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    found = torch.autograd.grad((hidden * weight).sum(), leaves, allow_unused=True)
    return (
        answers.ids,
        hidden.detach(),
        [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(found, leaves, strict=True)],
    )


@pytest.mark.parametrize(
    "kernel, dtype",
    [
        ("FLASH", torch.bfloat16),
        ("FLASH", torch.float16),
        ("EFFICIENT", torch.bfloat16),
        ("EFFICIENT", torch.float32),
    ],
)
@pytest.mark.parametrize("dim", [20, 32, 64, 128])
@pytest.mark.parametrize("queries, keys, causal", [(5, 7, False), (33, 33, True), (1, 40, False)])
def test_shapes_by_torch_s_own_rules(kernel, dtype, dim, queries, keys, causal):
    kernel = getattr(flash, kernel)
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")
    q, k, bias = (
        make(2, 3, queries, dim),
        make(2, 3, keys, dim),
        None if kernel is flash.FLASH or causal else make(2, keys),
    )
    out, lse = kernel.forward(q, k, k, bias, causal, 0.3)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = kernel.backward(q, q, k, k, out, lse, bias, causal, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape] and all(
        g.dtype == dtype for g in grads
    )


T, N, B = "Tensor", "number", "bool"
ARGUMENTS = {
    "_scaled_dot_product_flash_attention": [T, T, T, "float", B, B, "Optional[float]"],
    "_scaled_dot_product_flash_attention_backward": [T] * 8
    + ["int", "int", "float", B, T, T, "Optional[float]"],
    "_scaled_dot_product_efficient_attention": [
        T,
        T,
        T,
        "Optional[Tensor]",
        B,
        "float",
        B,
        "Optional[float]",
    ],
    "_scaled_dot_product_efficient_attention_backward": [T] * 9
    + ["float", "List[bool]", B, "Optional[float]"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_operators_take_what_they_are_given(name):
    schema = getattr(torch.ops.aten, name).default._schema
    assert [str(argument.type) for argument in schema.arguments] == ARGUMENTS[name]
    assert schema.arguments[-1].name == "scale" and schema.arguments[-1].kwarg_only


@pytest.mark.parametrize("kernel", [flash.FLASH, flash.EFFICIENT])
def test_a_causal_rectangle_is_refused(kernel):
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="3 queries over 4 keys"):
        kernel.forward(q, k, k, None, True, 1.0)


@pytest.mark.parametrize(
    "device, capability, dtype, path, words",
    [
        ("cpu", None, torch.float64, "flash", "CPU"),
        ("meta", None, torch.bfloat16, "flash", "CPU"),
        ("mps", None, torch.float16, "plain", "mps"),
        ("cuda", (9, 0), torch.bfloat16, "flash", "FlashAttention"),
        ("cuda", (8, 0), torch.float16, "flash", "FlashAttention"),
        ("cuda", (9, 0), torch.float32, "efficient", "16 bits"),
        ("cuda", (7, 5), torch.float16, "efficient", "7.5"),
        ("cuda", (7, 5), torch.bfloat16, "plain", "7.5"),
        ("cuda", (9, 0), torch.float64, "plain", "float64"),
    ],
)
def test_the_choice_and_its_reason(monkeypatch, device, capability, dtype, path, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    choice = flash.look(torch.device(device), dtype)
    assert choice.path == path and words in choice.reason


def test_a_torch_without_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert flash.look(CUDA, torch.bfloat16).path == "efficient"


@pytest.mark.parametrize(
    "best, dim, ragged, name",
    [
        ("flash", 128, False, "flash"),
        ("flash", 128, True, "efficient"),
        ("flash", 264, False, "efficient"),
        ("efficient", 64, False, "efficient"),
    ],
)
def test_the_kernel_of_a_part_on_a_gpu(monkeypatch, best, dim, ragged, name):
    monkeypatch.setattr(flash, "choose", lambda device, dtype: types.SimpleNamespace(path=best))
    q = types.SimpleNamespace(device=CUDA, dtype=torch.bfloat16, shape=(1, 1, 1, dim))
    assert flash.kernel(q, torch.zeros(1, 1) if ragged else None).name == name


def test_where_no_kernel_runs_the_formula_does(monkeypatch):
    monkeypatch.setattr(
        attention, "choose", lambda device, dtype: types.SimpleNamespace(path="plain")
    )
    q, parts = build(2, 2, 8, 3)
    assert torch.equal(attend(q, parts, 0.3), attend_plain(q, parts, 0.3))


@pytest.mark.parametrize(
    "attended, path, words", [(attend, "flash", "CPU"), (attend_plain, "plain", "model.attention")]
)
def test_a_policy_says_how_it_attends(attended, path, words):
    policy = Policy(
        None,
        None,
        types.SimpleNamespace(attend=attended, dtype=torch.float32, device=torch.device("cpu")),
        "nano",
    )
    assert policy.attention.path == path and words in policy.attention.reason


gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
GPU_SHAPES = [(2, 3, 32, 5), (8, 2, 128, 1), (3, 2, 64, 33), (1, 4, 20, 130)]


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=gpu), pytest.param(torch.float16, marks=gpu)]
)
@pytest.mark.parametrize("kv, rep, dim, tokens", GPU_SHAPES)
def test_16_bits_on_a_gpu_lose_no_more_than_plain(dtype, kv, rep, dim, tokens):
    q, parts = build(kv, rep, dim, tokens, dtype, CUDA)
    weight = torch.linspace(-1, 1, q.numel(), device=CUDA).view_as(q).to(dtype)
    wide = lambda x: x.detach().float().requires_grad_()
    truth = with_gradients(
        attend_plain,
        wide(q),
        [Part(wide(p.keys), wide(p.values), p.lengths, p.grid, p.causal) for p in parts],
        weight.float(),
    )
    for fast, plain, exact in zip(
        with_gradients(attend, q, parts, weight),
        with_gradients(attend_plain, q, parts, weight),
        truth,
        strict=True,
    ):
        allowed = (
            1.5 * (plain.float() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        )
        assert (fast.float() - exact).abs().max() <= allowed, (
            f"worst {(fast.float() - exact).abs().max()}, allowed {allowed}"
        )


@pytest.mark.parametrize(
    "kv, rep, dim, tokens", [pytest.param(*shape, marks=gpu) for shape in GPU_SHAPES]
)
def test_float32_on_a_gpu_equals_the_formula(kv, rep, dim, tokens):
    q, parts = build(kv, rep, dim, tokens, torch.float32, CUDA)
    assert flash.choose(q.device, q.dtype).path == "efficient"
    for fast, plain in zip(
        with_gradients(attend, q, parts), with_gradients(attend_plain, q, parts), strict=True
    ):
        assert (fast - plain).abs().max() <= 1e-4 * plain.abs().max(), (
            f"worst {(fast - plain).abs().max() / plain.abs().max()} of the largest"
        )


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=gpu), pytest.param(torch.float32, marks=gpu)]
)
def test_nothing_waits_for_the_gpu(dtype):
    q, parts = build(2, 3, 64, 5, dtype, CUDA)
    with_gradients(attend, q, parts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(attend, q, parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
