"""attention: the native path against fp64 on ugly shapes; shared, ragged and causal banks; strides;
what it refuses.
"""

import itertools

import pytest
import torch
from excess import assert_close
from vise_kernels import attention
from vise_kernels.attention import Bank
from vise_kernels.dispatch import native

NATIVE = pytest.mark.skipif(
    native() is None, reason="the native module was not built (python -m vise_kernels.build)"
)
# rows, tokens, heads, key heads, dim, [(entries, tokens)] of the banks before the causal one
SHAPES = {
    "one query": (1, 1, 1, 1, 16, []),
    "a prefix": (3, 7, 4, 2, 32, [(2, 21)]),
    "prefix and question": (5, 9, 6, 6, 64, [(2, 21), (3, 40)]),
    "one key head": (2, 13, 10, 1, 48, [(1, 3)]),
    "blocks of keys": (2, 200, 2, 1, 16, [(1, 97), (2, 193)]),
    "wide": (2, 5, 16, 8, 128, [(2, 300)]),
    "a lane over": (1, 33, 1, 1, 16, [(1, 95)]),
}


def made(shape, ragged=False):
    rows, tokens, heads, kv, dim, banks = SHAPES[shape]
    rng = torch.Generator().manual_seed(rows * 100 + dim)

    def draw(*size):
        return torch.randn(*size, generator=rng)

    def whole(high, size):
        return torch.randint(1, high + 1, size, generator=rng)

    made = []
    for m, s in banks:
        keys = draw(m, kv, s, dim)
        values = draw(m, kv, s, dim)
        owner = whole(m, (rows,)) - 1
        made.append(Bank(keys, values, owner, whole(s, (m,)) if ragged else None))
    own = [draw(rows, tokens, kv, dim).transpose(1, 2) for _ in range(2)]
    return draw(rows, tokens, heads, dim), [*made, Bank(*own)]


def all_equal(found, wanted):
    return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def truth(q, banks, scale, causal):
    """Query by query in fp64."""
    repeat = q.shape[2] // banks[0].keys.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.zeros(q.shape[:3], dtype=torch.float64)
    for n, t, h in itertools.product(*map(range, q.shape[:3])):
        keys = []
        values = []
        for index, (k, v, owner, length) in enumerate(banks):
            entry = n if owner is None else owner[n]
            seen = k.shape[2] if length is None else length[entry]
            seen = min(seen, t + 1) if causal and index + 1 == len(banks) else seen
            keys.append(k[entry, h // repeat, :seen].double())
            values.append(v[entry, h // repeat, :seen].double())
        score = torch.cat(keys) @ q[n, t, h].double() * scale
        out[n, t, h] = score.softmax(0) @ torch.cat(values)
        lse[n, t, h] = score.logsumexp(0)
    return out, lse


@NATIVE
@pytest.mark.parametrize("path", ["plain", "native"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_softmax_over_all_banks(shape, causal, ragged, path):
    q, banks = made(shape, ragged)
    found = attention(q, banks, scale=0.2, causal=causal, path=path)
    wanted = truth(q, banks, 0.2, causal)
    for part, true, what in zip(found, wanted, ("output", "log-sum-exp"), strict=True):
        assert part.dtype == torch.float32
        assert_close(part, true, absolute=3e-6, relative=2e-6, what=what)


@NATIVE
def test_large_scores_stay_finite_and_small_weights_vanish():
    q, banks = made("blocks of keys")
    found = attention(300 * q, banks, scale=1.0, causal=True, path="native")
    for part, true in zip(found, truth(300 * q, banks, 1.0, True), strict=True):
        assert_close(part, true, absolute=2e-3, relative=1e-5)


@NATIVE
def test_what_lies_beyond_a_length_is_never_seen_and_the_future_weighs_nothing():
    q, banks = made("prefix and question", ragged=True)
    before = attention(q, banks, scale=0.2, causal=True, path="native")
    for keys, values, _, length in banks[:-1]:
        for entry, seen in enumerate(length):
            keys[entry, :, seen:] = torch.nan
            values[entry, :, seen:] = torch.nan
    assert all_equal(attention(q, banks, scale=0.2, causal=True, path="native"), before)
    banks[-1].keys[:, :, 5:] = 1e4
    banks[-1].values[:, :, 5:] = 1e4
    after = attention(q, banks, scale=0.2, causal=True, path="native")
    for part, old in zip(after, before, strict=True):
        assert torch.allclose(part[:, :5], old[:, :5], atol=1e-6)


@NATIVE
def test_a_query_that_sees_nothing_is_zero():
    q, (bank, *_) = made("a prefix")
    bank = bank._replace(length=torch.tensor([0, 3]), owner=torch.tensor([1, 0, 1]))
    for path in ("plain", "native"):
        out, lse = attention(q, [bank], scale=1.0, causal=False, path=path)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and (out[0] != 0).any()


@NATIVE
def test_a_length_beyond_the_bank_means_all_of_it():
    q, (bank, *_) = made("a prefix")
    for path in ("plain", "native"):
        long, whole = (
            attention(q, [bank._replace(length=length)], scale=0.2, causal=False, path=path)
            for length in (torch.tensor([99, 99]), None)
        )
        assert all_equal(long, whole)


@pytest.mark.parametrize("path", ["plain", "native"])
def test_nan_is_not_hidden(path):
    if path == "native" and native() is None:
        pytest.skip("the native module was not built (python -m vise_kernels.build)")
    q, banks = made("a prefix")
    q[1, 2] = torch.nan
    out, _ = attention(q, banks, scale=0.2, causal=True, path=path)
    assert out[1, 2].isnan().all() and out[0].isfinite().all() and out[1, 3].isfinite().all()


@NATIVE
def test_threads_and_strides_change_nothing():
    threads = torch.get_num_threads()
    q, banks = made("prefix and question")
    try:
        torch.set_num_threads(1)
        alone = attention(q, banks, scale=0.2, causal=True)
        torch.set_num_threads(3)
        lying = [
            bank._replace(
                keys=bank.keys.transpose(2, 3).contiguous().transpose(2, 3),
                values=bank.values.flip(0).flip(0),
            )
            for bank in banks
        ]
        for call in ((q, banks), (q.transpose(1, 2).contiguous().transpose(1, 2), lying)):
            assert all_equal(alone, attention(*call, scale=0.2, causal=True))
    finally:
        torch.set_num_threads(threads)


def test_other_types_and_gradients_take_the_plain_path():
    q, banks = made("a prefix")
    half = [Bank(bank.keys.double(), bank.values.double(), bank.owner) for bank in banks]
    assert attention(q.double(), half, scale=0.2, causal=True)[0].dtype == torch.float64
    q.requires_grad_()
    attention(q, banks, scale=0.2, causal=True)[0].sum().backward()
    assert q.grad.abs().sum() > 0
    some = [Bank(k[..., :10], v[..., :10], owner) for k, v, owner, _ in banks]
    narrow = attention(q[..., :10].detach(), some, scale=0.2, causal=True)
    assert narrow[0].shape[-1] == 10


@NATIVE
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda q, b: (q.double(), b), "float32"),
        (lambda q, b: (q.requires_grad_(), b), "gradients"),
        (lambda q, b: (q[:2], b), "owner"),
        (lambda q, b: (q, []), "at least one"),
        (lambda q, b: (q, [b[0]._replace(owner=b[0].owner + 2)]), "entry"),
        (lambda q, b: (q[:, :, :3], b), "do not fit"),
        (lambda q, b: (q, [b[0]._replace(owner=b[0].owner.int())]), "owner"),
        (
            lambda q, b: (q[..., :8], [Bank(k[..., :8], v[..., :8], o) for k, v, o, _ in b]),
            "multiples",
        ),
    ],
)
def test_what_it_cannot_take_is_refused(spoil, words):
    q, banks = spoil(*made("a prefix"))
    with pytest.raises(ValueError, match=words):
        attention(q, banks, scale=0.2, causal=True, path="native")
