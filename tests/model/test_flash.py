"""The kernels behind `attend`: which one is chosen and why, and that the GPU operators are called
as they are made.

Without a GPU their place is taken by stand-ins in float64, which read memory by the strides the
operators assume and refuse what they refuse; torch's own shape rules (meta tensors) and schemas are
asked too. `pytest -m gpu` compares the real ones with the written-out formula.
"""

import types
from functools import partial

import pytest
import torch
from small_engines import ROWS, SIZES, engine_of
from tiny import SHAPES as SMALL_MODELS
from tiny import images

from vise_fast.engine.rollout import Answered, owners
from vise_fast.model.attending import attention, flash
from vise_fast.model.attending.attention import attend, attend_plain
from vise_fast.model.load import Policy
from vise_fast.model.tree import Grid, Part

GPU = torch.cuda.is_available()
CUDA = torch.device("cuda")
# KV heads, queries per KV head, D, T
SHAPES = [
    (2, 3, 8, 5),
    (1, 1, 16, 1),
    (3, 2, 5, 13),
    (2, 1, 32, 33),
    (2, 2, 24, 32),
    (1, 4, 20, 8),
]


def scores(x):
    """Of `flash.Inputs`, written out."""
    found = x.q @ x.keys.mT * x.scale
    found = found if x.bias is None else found + x.bias
    if not x.causal:
        return found
    square = torch.ones(found.shape[-2:], dtype=torch.bool)
    return found.masked_fill(square.triu(1), -torch.inf)


def gradients(grad, x, out, lse):
    weights = (scores(x) - lse[..., None]).exp()
    share = weights * (grad @ x.values.mT - (grad * out).sum(-1, keepdim=True))
    return share @ x.keys * x.scale, share.mT @ x.q * x.scale, weights.mT @ grad


def check_operands(causal, *tensors):
    q, k = tensors[:2]
    for x in tensors:
        assert x.shape[3] % 8 == 0 and x.stride(3) == 1, "head dimension"
        assert not any(stride % 8 for stride in x.stride()[:3]), "rows not at 16 bytes"
    assert not causal or q.shape[2] == k.shape[2], (
        "the two operators align a causal rectangle differently"
    )


def equal_heads(*tensors):
    assert len({x.shape[1] for x in tensors}) == 1, "heads"


def for_each_query(q, *banks):
    """Keys and values as FlashAttention shares them: those of head h // (H / KV) for query head h
    ("the number of heads in key/value must divide the number of heads in query").
    """
    assert q.shape[1] % banks[0].shape[1] == 0, "heads"
    return [bank.repeat_interleave(q.shape[1] // bank.shape[1], 1) for bank in banks]


def shared(k, *grads):
    """The gradients of shared keys and values: sums over the query heads."""
    return [grad.unflatten(1, (k.shape[1], -1)).sum(2) for grad in grads]


def flash_forward(q, k, v, dropout, causal, debug_mask, *, scale):
    check_operands(causal, q, k, v)
    k, v = for_each_query(q, k, v)
    found = scores(flash.Inputs(q, k, v, None, causal, scale))
    lengths = (None, None, q.shape[2], k.shape[2])
    return found.softmax(-1) @ v, found.logsumexp(-1), *lengths, None, None, None


def flash_backward(grad, q, k, v, out, *rest, scale):
    lse, cum_q, cum_k, most_q, most_k, _, causal, _, _ = rest
    check_operands(causal, q, k, v, out, grad)
    assert cum_q is None and cum_k is None
    assert (most_q, most_k) == (q.shape[2], k.shape[2])
    assert lse.shape == q.shape[:3] and lse.is_contiguous()  # its address alone is handed on
    inputs = flash.Inputs(q, *for_each_query(q, k, v), None, causal, scale)
    dq, *others = gradients(grad, inputs, out, lse)
    return dq, *shared(k, *others)


def rows_of(ends, longest, *tensors):
    """The rows (1, H, L, D) of packed tensors (n, H, D)."""
    assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == len(tensors[0])
    assert int(ends.diff().max()) == longest
    for x in tensors:
        assert x.shape[2] % 8 == 0 and x.stride(2) == 1, "head dimension"
    pieces = [x.split(ends.diff().tolist()) for x in tensors]
    return [[t.transpose(0, 1)[None] for t in row] for row in zip(*pieces, strict=True)]


def packed_forward(q, k, v, ends, same, longest, most, dropout, causal, debug_mask, *, scale):
    assert causal and same is ends and most == longest
    outs = []
    tops = []
    for row in rows_of(ends, longest, q, k, v):
        inputs = flash.Inputs(row[0], *for_each_query(*row), None, causal, scale)
        found = scores(inputs)
        outs.append((found.softmax(-1) @ inputs.values)[0].transpose(0, 1))
        tops.append(found.logsumexp(-1)[0])
    return torch.cat(outs), torch.cat(tops, 1), None, None, None


def packed_backward(grad, q, k, v, out, lse, ends, same, longest, most, *rest, scale):
    assert same is ends and most == longest and grad.is_contiguous()
    assert lse.shape == (q.shape[1], len(q))
    found = []
    rows = rows_of(ends, longest, grad, q, k, v, out)
    for row, top in zip(rows, lse.split(ends.diff().tolist(), 1), strict=True):
        dz, *operands, result = row
        inputs = flash.Inputs(operands[0], *for_each_query(*operands), None, True, scale)
        dq, *others = gradients(dz, inputs, result, top[None])
        found.append([x[0].transpose(0, 1) for x in (dq, *shared(operands[1], *others))])
    return [torch.cat(column) for column in zip(*found, strict=True)]


def check_bias(bias, q, k):
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
        assert bias.stride(3) == 1 and not any(stride % 16 for stride in bias.stride()[:3])


def efficient_forward(q, k, v, bias, compute_log_sumexp, *rest, scale):
    _, causal = rest
    check_operands(causal, q, k, v)
    equal_heads(q, k, v)
    check_bias(bias, q, k)
    assert compute_log_sumexp
    found = scores(flash.Inputs(q, k, v, bias, causal, scale))
    lse = q.new_full((*q.shape[:2], -(-q.shape[2] // 32) * 32), torch.inf)
    lse[:, :, : q.shape[2]] = found.logsumexp(-1)
    return found.softmax(-1) @ v, lse, None, None


def efficient_backward(grad, q, k, v, bias, out, *rest, scale):
    lse, _, _, _, wanted, causal = rest
    check_operands(causal, q, k, v, out, grad)
    equal_heads(q, k, v, out, grad)
    check_bias(bias, q, k)
    batch, heads, queries, dim = q.shape
    rows = -(-queries // 32) * 32
    assert lse.shape == (batch, heads, rows) and (lse[:, :, queries:] == torch.inf).all()
    # as the kernel does, whatever the strides are
    out = out.as_strided(out.shape, (out.stride(0), out.stride(1), heads * dim, 1))
    lse = lse.as_strided((batch, heads, queries), (lse.stride(0), lse.stride(1), 1))
    assert wanted == [True, True, True, False]
    return *gradients(grad, flash.Inputs(q, k, v, bias, causal, scale), out, lse), None


STANDINS = types.SimpleNamespace(
    _flash_attention_forward=packed_forward,
    _flash_attention_backward=packed_backward,
    _scaled_dot_product_flash_attention=flash_forward,
    _scaled_dot_product_flash_attention_backward=flash_backward,
    _scaled_dot_product_efficient_attention=efficient_forward,
    _scaled_dot_product_efficient_attention_backward=efficient_backward,
)


def build(kv, rep, dim, tokens, dtype=torch.float64, device="cpu"):
    """Queries of seven rows and three parts: a shared ragged bank, a bank per row without padding,
    the rows' own tokens.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(device).requires_grad_()

    def bank(entries, keys):
        return draw(entries, kv, keys, dim), draw(entries, kv, keys, dim)

    lengths = torch.tensor([11, 1, 7], device=device)
    grid = Grid([0, 0, 1, 2, 2, 2, 1], 3, device)
    parts = [
        Part(*bank(3, 11), lengths=lengths, grid=grid),
        Part(*bank(7, 16)),
        Part(*bank(7, tokens), causal=True),
    ]
    return draw(7, tokens, kv * rep, dim), parts


def with_gradients(path, q, parts, weight=None):
    out = path(q, parts, q.shape[3] ** -0.5)
    if weight is None:
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    leaves = [q]
    for part in parts:
        leaves += [part.keys, part.values]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def with_standins(monkeypatch, best):
    """From here on attention takes the stand-ins, as a GPU with this best kernel would; returns the
    names of the kernels used.
    """
    used = []

    def kernel(q, bias):
        chosen = flash.FLASH if best == "flash" and bias is None else flash.EFFICIENT
        used.append(chosen.name)
        return chosen

    def packed(q):
        used.append("packed")
        return best == "flash" and q.shape[-1] % 8 == 0

    monkeypatch.setattr(flash, "aten", STANDINS)
    monkeypatch.setattr(attention, "kernel", kernel)
    monkeypatch.setattr(attention, "takes_packed", packed)
    return used


@pytest.mark.parametrize("best", ["flash", "efficient"])
@pytest.mark.parametrize("kv, rep, dim, tokens", SHAPES)
def test_gpu_kernels_are_called_as_they_are_made(monkeypatch, best, kv, rep, dim, tokens):
    used = with_standins(monkeypatch, best)
    q, parts = build(kv, rep, dim, tokens)
    truths = with_gradients(attend_plain, q, parts)
    for found, truth in zip(with_gradients(attend, q, parts), truths, strict=True):
        worst = (found - truth).abs().max()
        assert worst < 2e-6, f"worst {worst}"  # the plain path scores in fp32
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


@pytest.mark.parametrize("best", ["flash", "efficient"])
@pytest.mark.parametrize("shape", SMALL_MODELS)
@pytest.mark.parametrize("fan", [1, 2])
def test_rows_side_by_side_give_gpu_kernels_what_they_assume(monkeypatch, best, shape, fan):
    """Image, question and answer as one row, or answers behind rows of image and question."""
    model, engine = engine_of(shape)
    engine.joins = False
    ids, hidden, grads = played(model, engine, fan)
    verdicts = engine.verdict_logits(engine.encode(images(SIZES)), ROWS, True)
    used = with_standins(monkeypatch, best)
    engine.chains = True
    found_ids, found_hidden, found_grads = played(model, engine, fan)
    assert torch.equal(found_ids, ids)
    assert (found_hidden - hidden).abs().max() <= 1e-5 * hidden.abs().max()
    for found, truth in zip(found_grads, grads, strict=True):
        assert (found - truth).abs().max() <= 1e-5 * max(truth.abs().max(), 1e-3)
    found = engine.verdict_logits(engine.encode(images(SIZES)), ROWS, True)
    assert (found - verdicts).abs().max() <= 1e-5 * verdicts.abs().max()
    assert "packed" in used and best in used


def played(model, engine, fan=2):
    """Greedy ids, scored hidden states and the adapters' gradients of `fan` answers to each of four
    questions.
    """
    features = engine.encode(images(SIZES))
    prompts = engine.prompt(engine.prefill(features, True), [0, 1, 2, 3], ROWS)
    seeds = list(range(4 * fan))
    answers = engine.generate(prompts, [fan] * 4, 4, seeds, temperature=0.0)
    owner = owners([fan] * 4)
    hidden = engine.score(features, Answered(ROWS, answers, owner), True)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    found = torch.autograd.grad(
        (hidden * weight).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return answers.ids, hidden.detach(), found


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
    make = partial(torch.empty, dtype=dtype, device="meta")
    q = make(2, 3, queries, dim)
    k = make(2, 3, keys, dim)
    bias = None if kernel is flash.FLASH or causal else make(2, keys)
    inputs = flash.Inputs(q, k, k, bias, causal, 0.3)
    out, lse = kernel.forward(inputs)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = kernel.backward(q, inputs, flash.Result(out, lse))
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    assert all(g.dtype == dtype for g in grads)


T = "Tensor"
B = "bool"
OPTIONAL = "Optional[Tensor]"
SCALE = "Optional[float]"
FLASH_BACKWARD = [T] * 8 + ["int", "int", "float", B, T, T, SCALE]
EFFICIENT_BACKWARD = [T] * 9 + ["float", "List[bool]", B, SCALE]
ARGUMENTS = {
    "_scaled_dot_product_flash_attention": [T, T, T, "float", B, B, SCALE],
    "_scaled_dot_product_flash_attention_backward": FLASH_BACKWARD,
    "_scaled_dot_product_efficient_attention": [T, T, T, OPTIONAL, B, "float", B, SCALE],
    "_scaled_dot_product_efficient_attention_backward": EFFICIENT_BACKWARD,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_operators_take_what_they_are_given(name):
    schema = getattr(torch.ops.aten, name).default._schema
    assert [str(argument.type) for argument in schema.arguments] == ARGUMENTS[name]
    assert schema.arguments[-1].name == "scale" and schema.arguments[-1].kwarg_only


@pytest.mark.parametrize("kernel", [flash.FLASH, flash.EFFICIENT])
def test_a_causal_rectangle_is_refused(kernel):
    q = torch.zeros(1, 1, 3, 8)
    k = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="3 queries over 4 keys"):
        kernel.forward(flash.Inputs(q, k, k, None, True, 1.0))


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
    backbone = types.SimpleNamespace(
        attend=attended, dtype=torch.float32, device=torch.device("cpu")
    )
    policy = Policy(None, None, backbone, "nano")
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

    def wide(x):
        return x.detach().float().requires_grad_()

    wide_parts = [Part(wide(p.keys), wide(p.values), p.lengths, p.grid, p.causal) for p in parts]
    truths = with_gradients(attend_plain, wide(q), wide_parts, weight.float())
    fast = with_gradients(attend, q, parts, weight)
    plain = with_gradients(attend_plain, q, parts, weight)
    for found, written_out, exact in zip(fast, plain, truths, strict=True):
        lost = (written_out.float() - exact).abs().max()
        allowed = 1.5 * lost + torch.finfo(dtype).eps * exact.abs().max()
        worst = (found.float() - exact).abs().max()
        assert worst <= allowed, f"worst {worst}, allowed {allowed}"


@pytest.mark.parametrize(
    "kv, rep, dim, tokens", [pytest.param(*shape, marks=gpu) for shape in GPU_SHAPES]
)
def test_float32_on_a_gpu_equals_the_formula(kv, rep, dim, tokens):
    q, parts = build(kv, rep, dim, tokens, torch.float32, CUDA)
    assert flash.choose(q.device, q.dtype).path == "efficient"
    truths = with_gradients(attend_plain, q, parts)
    for found, truth in zip(with_gradients(attend, q, parts), truths, strict=True):
        worst = (found - truth).abs().max() / truth.abs().max()
        assert worst <= 1e-4, f"worst {worst} of the largest"


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
