"""sample: the generator's known answers, the distribution, its independence, and that nothing but
(seed, position, id) matters.
"""

import pytest
import torch
from excess import assert_close
from vise_kernels.dispatch import choose
from vise_kernels.sample import _philox, gumbel, sample, uniform_bits

PATHS = ["plain", "native", "triton"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def runs(path):
    try:
        choose("sample", torch.device("cpu"), path)
    except ValueError as obstacle:
        pytest.skip(str(obstacle))


def drawn(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    return (
        logits,
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(500, (rows,), generator=generator),
    )


def chi_square(observed, expected):
    """Sum of squares, and what it exceeds once in 100,000 (Wilson and Hilferty's approximation)."""
    freedom = observed.numel() - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    bound = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    return statistic, bound


def assert_distributed(ids, probabilities):
    observed = torch.bincount(ids, minlength=len(probabilities)).double()
    assert (observed[probabilities == 0] == 0).all()
    some = probabilities > 0
    statistic, bound = chi_square(observed[some], len(ids) * probabilities[some])
    assert statistic < bound, f"chi-square {statistic:.1f} over {bound:.1f}"


# ---- the generator -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left, right, key, answer",
    [
        (0, 0, 0, (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_known_answers_of_philox(left, right, key, answer):
    """The published vectors of Philox2x32 with 7 rounds."""
    words = _philox(torch.tensor(left), torch.tensor(right), torch.tensor(key))
    assert tuple(int(word) for word in words) == answer


def test_bits_are_even_and_rows_unlike():
    seed = torch.tensor([0, 1, 2, -1, 2**62, 1])
    bits = uniform_bits(seed, torch.tensor([0, 0, 0, 0, 0, 1]), 50_000)
    assert bits.min() >= 0 and bits.max() < 2**32
    ones = torch.stack([(bits >> place & 1).double().mean(1) for place in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 50_000**0.5
    correlation = torch.corrcoef(bits.double()) - torch.eye(6)
    assert correlation.abs().max() < 5 / 50_000**0.5
    shifted = torch.corrcoef(torch.cat([bits[:, 1:], bits[:, :-1]]).double())[:6, 6:]
    assert shifted.abs().max() < 5 / 50_000**0.5


def test_gumbel_is_precise_where_it_decides():
    bits = torch.cat(
        [torch.arange(1000), torch.logspace(0, 32, 20_001, base=2).long().clamp(max=2**32 - 1)]
    )
    u = (bits.double() + 0.5) / 2**32
    truth = -torch.log(-torch.log1p(-u.clamp(max=1 - 2**-24)))
    assert torch.isfinite(gumbel(bits)).all()
    upper = u < 0.9  # the maximum of a vocabulary lies here
    assert_close(gumbel(bits)[upper], truth[upper], absolute=2e-6, relative=3e-7, what="upper tail")
    assert_close(gumbel(bits), truth, absolute=0.4, what="all")
    assert (gumbel(torch.arange(2**32 - 2000, 2**32)) < -2).all()


# ---- the distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies(vary, temperature):
    logits, _, _ = drawn(1, 23)
    count = torch.arange(40_000)
    seed, position = (count, 7) if vary == "seed" else (torch.full_like(count, 12345), count)
    ids, _ = sample(
        logits.expand(40_000, -1),
        temperature=temperature,
        seed=seed,
        position=position,
        path="plain",
    )
    assert_distributed(ids, (logits[0].double() / temperature).softmax(-1))


def test_frequencies_without_the_banned():
    logits, _, _ = drawn(1, 23)
    banned = torch.arange(23) % 3 == 1
    count = torch.arange(40_000)
    ids, _ = sample(
        logits.expand(40_000, -1),
        temperature=1.0,
        banned=banned,
        seed=count,
        position=0,
        path="plain",
    )
    assert_distributed(ids, logits[0].double().masked_fill(banned, -torch.inf).softmax(-1))


def test_frequencies_over_a_large_vocabulary():
    """Which sixteenth of 20,011 ids is drawn; the ids are grouped by rank, so that the shares
    differ.
    """
    logits, _, _ = drawn(1, 20_011)
    group = logits[0].argsort().argsort() * 16 // 20_011
    shares = torch.zeros(16, dtype=torch.float64).index_add(
        0, group, logits[0].double().softmax(-1)
    )
    ids = torch.cat(
        [
            sample(logits.expand(40, -1), temperature=1.0, seed=part, position=3, path="plain")[0]
            for part in torch.arange(600).split(40)
        ]
    )
    counts = torch.bincount(group[ids], minlength=16).double()
    large = 600 * shares > 5
    observed, expected = (
        torch.cat([t[large], t[~large].sum()[None]]) for t in (counts, 600 * shares)
    )
    statistic, bound = chi_square(observed, expected)
    assert statistic < bound, f"chi-square {statistic:.1f} over {bound:.1f}"


@pytest.mark.parametrize(
    "other", ["next seed", "next position", "seed for position", "high word of the seed"]
)
def test_neighbouring_draws_are_independent(other):
    logits, _, _ = drawn(1, 6)
    count = torch.arange(40_000)
    zero = torch.zeros_like(count)
    pairs = {
        "next seed": ((count, zero), (count + 1, zero)),
        "next position": ((zero + 5, count), (zero + 5, count + 1)),
        "seed for position": ((count, zero), (zero, count)),
        "high word of the seed": ((count, zero), (count << 32, zero)),
    }[other]
    first, second = (
        sample(logits.expand(40_000, -1), temperature=2.0, seed=s, position=p, path="plain")[0]
        for s, p in pairs
    )
    share = (logits[0].double() / 2).softmax(-1)
    if other in ("seed for position", "high word of the seed"):
        first = first[1:]  # (0, 0) is the same draw on both sides
        second = second[1:]
    assert_distributed(first * 6 + second, torch.outer(share, share).flatten())


# ---- what a draw depends on ----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 13), (23, 131), (3, 2600)])
def test_paths_draw_the_same_ids(rows, columns, dtype, path):
    runs(path)
    logits, seed, position = drawn(rows, columns, dtype)
    temperature = torch.linspace(0, 2, rows)
    banned = torch.arange(columns) % 3 == 1
    for barred in (None, banned):
        options = {"temperature": temperature, "seed": seed, "position": position}
        options |= {"banned": barred}
        (ids, logprob), (plain_ids, plain_logprob) = (
            sample(logits, **options, path=path) for path in (path, "plain")
        )
        assert torch.equal(ids, plain_ids)
        assert_close(logprob, plain_logprob, absolute=3e-6, what="logprob")


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_native_bounds_miss_no_winner(spread):
    """Flat logits leave the choice to the noise, steep ones to the logits; either way the bound
    must not hide the best id.
    """
    runs("native")
    generator = torch.Generator().manual_seed(5)
    logits = spread * torch.randn(300, 4001, generator=generator)
    seed = torch.arange(300) * 7919
    draws = [
        sample(logits, temperature=1.0, seed=seed, position=11, path=path)[0]
        for path in ("native", "plain")
    ]
    assert torch.equal(*draws)
    assert len(draws[0].unique()) > 150


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 13), (64, 151_936), (1000, 507)])
def test_a_gpu_draws_the_same_ids(rows, columns, dtype):
    logits, seed, position = drawn(rows, columns, dtype)
    ids, logprob = sample(
        logits.cuda(), temperature=1.0, seed=seed.cuda(), position=position.cuda(), path="triton"
    )
    plain_ids, plain_logprob = sample(
        logits, temperature=1.0, seed=seed, position=position, path="plain"
    )
    assert torch.equal(ids.cpu(), plain_ids)
    assert_close(logprob.cpu(), plain_logprob, absolute=1e-5, what="logprob")


@pytest.mark.parametrize("path", PATHS)
def test_batching_and_row_order_do_not_matter(path):
    runs(path)
    logits, seed, position = drawn(12, 1300)
    whole, logprob = sample(logits, temperature=1.0, seed=seed, position=position, path=path)
    order = torch.randperm(12)
    for rows in (order, order[:5], order[:1]):
        ids, some = sample(
            logits[rows], temperature=1.0, seed=seed[rows], position=position[rows], path=path
        )
        assert torch.equal(ids, whole[rows])
        assert_close(some, logprob[rows], absolute=2e-6, what="logprob")


@pytest.mark.parametrize("path", PATHS)
def test_a_number_serves_every_row(path):
    runs(path)
    logits, seed, _ = drawn(5, 131)
    many = sample(
        logits,
        temperature=torch.full((5,), 0.8),
        seed=seed,
        position=torch.full((5,), 9),
        path=path,
    )
    one = sample(logits, temperature=0.8, seed=seed, position=9, path=path)
    assert torch.equal(many[0], one[0]) and torch.equal(many[1], one[1])


@pytest.mark.parametrize("path", PATHS)
def test_greedy_takes_the_lowest_of_the_largest(path):
    runs(path)
    logits, seed, position = drawn(4, 3000)
    logits[0, [2900, 17, 1500]] = 50.0
    logits[1] = 0
    banned = torch.zeros(3000, dtype=torch.bool)
    banned[0] = True
    ids, logprob = sample(
        logits, temperature=0.0, banned=banned, seed=seed, position=position, path=path
    )
    assert ids[:2].tolist() == [17, 1] and torch.equal(ids[2:], logits[2:, 1:].argmax(-1) + 1)
    truth = (
        logits.masked_fill(banned, -torch.inf)
        .double()
        .log_softmax(-1)
        .gather(1, ids[:, None])[:, 0]
    )
    assert_close(logprob, truth, absolute=3e-6, what="logprob")


@pytest.mark.parametrize("path", PATHS)
def test_the_log_prob_is_that_of_temperature_one(path):
    runs(path)
    logits, seed, position = drawn(9, 131)
    banned = torch.arange(131) < 40
    ids, logprob = sample(
        logits,
        temperature=torch.linspace(0, 3, 9),
        banned=banned,
        seed=seed,
        position=position,
        path=path,
    )
    truth = (
        logits.double()
        .masked_fill(banned, -torch.inf)
        .log_softmax(-1)
        .gather(1, ids[:, None])[:, 0]
    )
    assert logprob.dtype == torch.float32 and ids.dtype == torch.int64
    assert_close(logprob, truth, absolute=3e-6, what="logprob")


@pytest.mark.parametrize("path", PATHS)
def test_the_only_candidate_is_drawn(path):
    runs(path)
    rows = 300 if path == "plain" else 10
    logits, seed, position = drawn(rows, 40)
    banned = torch.arange(40) != 33
    ids, logprob = sample(
        logits, temperature=1.0, banned=banned, seed=seed, position=position, path=path
    )
    assert (ids == 33).all() and (logprob == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_row_of_nan_still_gives_an_id(path):
    runs(path)
    logits, seed, position = drawn(3, 131)
    logits[1] = torch.nan
    ids, logprob = sample(logits, temperature=1.0, seed=seed, position=position, path=path)
    assert 0 <= ids[1] < 131 and logprob[1].isnan() and torch.isfinite(logprob[[0, 2]]).all()


@pytest.mark.parametrize("path", PATHS)
def test_strided_logits_and_no_rows(path):
    runs(path)
    logits, seed, position = drawn(6, 131)
    expected = sample(
        logits[::2, ::2].contiguous(),
        temperature=1.0,
        seed=seed[::2],
        position=position[::2],
        path=path,
    )
    actual = sample(
        logits[::2, ::2], temperature=1.0, seed=seed[::2], position=position[::2], path=path
    )
    assert torch.equal(actual[0], expected[0])
    none = sample(logits[:0], temperature=1.0, seed=seed[:0], position=position[:0], path=path)
    assert none[0].shape == none[1].shape == (0,)


def test_what_does_not_fit_is_refused():
    logits, seed, position = drawn(5, 33)
    good = {"temperature": 1.0, "seed": seed, "position": position}
    for change in (
        {"seed": seed[:3]},
        {"seed": seed.int()},
        {"position": position[:3]},
        {"temperature": torch.ones(3)},
        {"banned": torch.zeros(5, dtype=torch.bool)},
        {"banned": torch.zeros(33)},
    ):
        with pytest.raises(ValueError, match="sample"):
            sample(logits, **{**good, **change})
    for bad in (logits[0], logits.long(), logits[:, :0]):
        with pytest.raises(ValueError, match="sample"):
            sample(bad, **good)
    with pytest.raises(ValueError, match="cuda"):
        sample(logits, **good, path="cuda")


def test_the_op_is_registered_as_torch_wants_it_and_traces_whole():
    runs("triton")
    logits, seed, position = drawn(5, 33)
    torch.library.opcheck(
        torch.ops.vise_kernels.sample.default, (logits, torch.ones(5), None, seed, position)
    )

    def draw(z):
        return sample(z, temperature=1.0, seed=seed, position=4, path="triton")

    traced = torch.compile(lambda z: draw(2 * z), fullgraph=True, backend="aot_eager")(logits)
    assert torch.equal(traced[0], draw(2 * logits)[0])
