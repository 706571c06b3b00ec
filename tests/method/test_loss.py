"""Losses: advantages against a loop, KL estimators against brute force over a small vocabulary
(value and expected gradient), states.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vise_fast.config.schema import UpdateConfig
from vise_fast.method.loss import (
    Baseline,
    Beta,
    ScoredTokens,
    advantages,
    k1_penalised,
    reinforce,
    token_mean,
)
from vise_fast.system.errors import NumericFault

# ---- advantages ----------------------------------------------------------------------------------


def by_hand(rewards, carries, group, kind, base):
    """The definition, one sample at a time."""
    result = []
    for n, reward in enumerate(rewards):
        mates = [m for m in range(n // group * group, n // group * group + group) if carries[m]]
        values = [rewards[m] for m in mates]
        if not carries[n]:
            result.append(0.0)
        elif kind == "ema":
            result.append(reward - base)
        elif max(values) - min(values) <= 1e-9:
            result.append(0.0)
        elif kind == "rloo":
            others = [rewards[m] for m in mates if m != n]
            result.append(reward - sum(others) / len(others))
        else:
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            result.append((reward - mean) / (std + 1e-6) if kind == "grpo" else reward - mean)
    return result


ROW = st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.7, 1.0]), st.booleans())


@pytest.mark.parametrize("kind", ["rloo", "ema", "grpo", "dr_grpo"])
@given(data=st.data(), group=st.integers(1, 5), groups=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_advantages_follow_their_definition(kind, data, group, groups):
    rows = data.draw(st.lists(ROW, min_size=group * groups, max_size=group * groups))
    rewards = [reward for reward, _ in rows]
    carries = [carried for _, carried in rows]
    tensors = (torch.tensor(rewards), torch.tensor(carries))
    got, _ = advantages(*tensors, group, kind, Baseline(value=0.3))
    truth = torch.tensor(by_hand(rewards, carries, group, kind, 0.3))
    torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)


def test_rows_that_do_not_carry_enter_no_mean():
    rewards = torch.tensor([1.0, 0.0, float("nan"), 0.5])
    carries = torch.tensor([True, True, False, True])
    got, metrics = advantages(rewards, carries, 4, "rloo")
    torch.testing.assert_close(got, torch.tensor([0.75, -0.75, 0.0, 0.0]))
    assert metrics["reward_mean"] == 0.5


def test_groups_without_variance_are_counted_and_silent():
    rewards = torch.tensor([0.1 + 0.2, 0.3, 1.0, 0.0, 0.5, 0.7, 0.9, 0.9])
    carries = torch.tensor([True, True, True, True, True, False, False, False])
    for kind in ("rloo", "grpo", "dr_grpo"):
        got, metrics = advantages(rewards.double(), carries, 2, kind)
        assert got[[0, 1, 4, 5, 6, 7]].abs().max() == 0 and got[2] > 0 > got[3]
        # equal, and alone; the last group has no row that carries
        assert metrics["zero_variance"] == pytest.approx(2 / 3)


def test_nothing_carries():
    none = torch.zeros(4, dtype=torch.bool)
    for kind in ("rloo", "ema", "grpo", "dr_grpo"):
        got, metrics = advantages(torch.ones(4), none, 2, kind, Baseline(value=0.5))
        assert got.abs().max() == 0 and metrics["zero_variance"] == 0


def test_ema_starts_at_the_first_batch_and_lags_by_one_step():
    baseline = Baseline(momentum=0.9)
    both = torch.ones(2, dtype=torch.bool)
    first, metrics = advantages(torch.tensor([0.2, 0.6]), both, 1, "ema", baseline)
    torch.testing.assert_close(first, torch.tensor([-0.2, 0.2]))
    assert baseline.value is None  # pure: the caller updates
    baseline.update(metrics["reward_mean"])
    second, metrics = advantages(torch.tensor([0.6, 0.8]), both, 1, "ema", baseline)
    torch.testing.assert_close(second, torch.tensor([0.2, 0.4]))
    baseline.update(metrics["reward_mean"])
    assert baseline.value == pytest.approx(0.9 * 0.4 + 0.1 * 0.7)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="known: rloo, ema"):
        advantages(torch.ones(2), torch.ones(2, dtype=torch.bool), 2, "best")
    zero = torch.zeros(1, 1)
    tokens = ScoredTokens(zero, zero, None, torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="known: exact, k2"):
        reinforce(tokens, torch.ones(1), 0.1, "k9", 1)
    with pytest.raises(ValueError, match="exact KL"):
        reinforce(tokens, torch.ones(1), 0.1, "exact", 1)
    with pytest.raises(ValueError, match="denominator"):
        reinforce(tokens, torch.ones(1), 0.1, "k2", 0)


# ---- KL estimators -------------------------------------------------------------------------------
# A policy over five tokens whose probabilities are counts / 16: sixteen rows *are* the expectation.

COUNTS = torch.tensor([1, 2, 3, 4, 6])
TOKENS = torch.repeat_interleave(torch.arange(5), COUNTS)
REFERENCE = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2], dtype=torch.float32).log()
BETA = 0.7


def policy():
    return COUNTS.float().log().requires_grad_()


def kl(p_log, q_log):
    return (p_log.exp() * (p_log - q_log)).sum()


def gradient_of(function):
    logits = policy()
    function(logits.log_softmax(0)).backward()
    return logits.grad


def assert_gradient(found, function):
    """It is beta times the gradient of `function` at the policy."""
    torch.testing.assert_close(found, BETA * gradient_of(function), atol=1e-6, rtol=1e-5)


def estimated(kind, rewards=None):
    """(expected KL term, its expected gradient on the logits) of one estimator; advantages are zero
    unless rewards are given.
    """
    logits = policy()
    logp = logits.log_softmax(0)
    rows = logp[TOKENS][:, None]
    reference = REFERENCE[TOKENS][:, None]
    exact = kl(logp, REFERENCE).expand(16, 1)
    advantage = torch.zeros(16) if rewards is None else rewards
    tokens = ScoredTokens(rows, reference, exact, torch.ones(16, 1, dtype=torch.bool))
    loss, metrics = reinforce(tokens, advantage, BETA, kind, 16)
    loss.backward()
    return metrics, logits.grad


TRUE_KL = kl((COUNTS / 16).log(), REFERENCE)


@pytest.mark.parametrize("kind", ["exact", "k3", "k1_loss", "k1_reward"])
def test_unbiased_estimators_have_the_true_kl_as_mean(kind):
    torch.testing.assert_close(estimated(kind)[0]["kl"], TRUE_KL, atol=1e-6, rtol=1e-5)


def test_k2_is_biased_in_value():
    expected = ((COUNTS / 16) * ((COUNTS / 16).log() - REFERENCE) ** 2 / 2).sum()
    torch.testing.assert_close(estimated("k2")[0]["kl"], expected, atol=1e-6, rtol=1e-5)
    assert abs(expected - TRUE_KL) > 0.01


@pytest.mark.parametrize("kind", ["exact", "k2"])
def test_gradient_of_the_reverse_kl(kind):
    assert_gradient(estimated(kind)[1], lambda p: kl(p, REFERENCE))


def test_k3_as_a_loss_follows_the_forward_kl():
    assert_gradient(estimated("k3")[1], lambda p: kl(REFERENCE, p))


def test_k1_as_a_loss_has_no_expected_gradient():
    metrics, gradient = estimated("k1_loss")
    assert metrics["kl_loss"] == pytest.approx(BETA * TRUE_KL.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.zeros(5), atol=1e-6, rtol=0)
    assert gradient_of(lambda p: kl(p, REFERENCE)).abs().max() > 0.01


def test_k1_in_the_reward_follows_the_reverse_kl():
    logp = policy().log_softmax(0)[TOKENS][:, None]
    every = torch.ones(16, 1, dtype=torch.bool)
    penalised = k1_penalised(torch.zeros(16), logp, REFERENCE[TOKENS][:, None], every, BETA)
    assert not penalised.requires_grad
    metrics, gradient = estimated("k1_reward", penalised)
    assert metrics["kl_loss"] == 0
    assert_gradient(gradient, lambda p: kl(p, REFERENCE))


def test_policy_term_climbs_the_expected_reward():
    rewards = torch.tensor([0.0, 0.3, 1.0, 0.2, 0.5])
    _, gradient = estimated("k1_loss", rewards[TOKENS])
    truth = gradient_of(lambda p: -(p.exp() * rewards).sum())
    torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=1e-5)


# ---- means, masks, micro-batches -----------------------------------------------------------------


def ragged(rows=7, length=11, seed=0):
    """Completions of 0..11 tokens and their advantages; what stands behind the mask is poison."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([11, 1, 5, 0, 2, 7, 11])[:rows]
    mask = torch.arange(length)[None] < lengths[:, None]
    poison = torch.full((rows, length), float("nan"))
    logprob = torch.where(mask, -torch.rand(rows, length, generator=g), poison)
    reference = torch.where(mask, -torch.rand(rows, length, generator=g), poison)
    exact = torch.where(mask, torch.rand(rows, length, generator=g), poison)
    return ScoredTokens(logprob, reference, exact, mask), torch.randn(rows, generator=g)


KINDS = ["exact", "k2", "k3", "k1_loss", "k1_reward"]


@pytest.mark.parametrize("kind", KINDS)
def test_means_over_tokens_then_samples(kind):
    tokens, advantage = ragged()
    loss, metrics = reinforce(tokens, advantage, 0.3, kind, 9)
    policy_loss = 0.0
    mean_kl = 0.0
    for n in range(7):
        places = [t for t in range(11) if tokens.mask[n, t]]
        for t in places:
            score = tokens.logprob[n, t].item()
            policy_loss -= advantage[n].item() * score / len(places) / 9
            mean_kl += estimate(kind, tokens, n, t) / len(places) / 9
    assert metrics["policy_loss"].item() == pytest.approx(policy_loss, abs=1e-6)
    assert metrics["kl"].item() == pytest.approx(mean_kl, abs=1e-6)
    total = policy_loss + (0 if kind == "k1_reward" else 0.3 * mean_kl)
    assert loss.item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.9])
def test_answers_learned_from_before_count_by_clipped_importance_weights(clip):
    """Value and gradient, token by token, for advantages of both signs, ratios beyond both ends."""
    tokens, advantage = ragged()
    torch.manual_seed(5)
    earlier = tokens.logprob + torch.randn(tokens.logprob.shape) * 0.3
    leaf = tokens.logprob.clone().requires_grad_()
    again = replace(tokens, logprob=leaf, earlier=earlier)
    loss, metrics = reinforce(again, advantage, 0.0, "exact", 7, clip)
    loss.backward()
    wanted = 0.0
    slopes = torch.zeros_like(tokens.logprob)
    kinds = set()
    for n in range(7):
        places = tokens.mask[n].nonzero()[:, 0].tolist()
        for t in places:
            ratio = math.exp(tokens.logprob[n, t].item() - earlier[n, t].item())
            a = advantage[n].item()
            held = min(max(ratio, 1 - clip), 1 + clip)
            free = ratio * a <= held * a
            kinds.add((free, a > 0))
            wanted -= min(ratio * a, held * a) / len(places) / 7
            slopes[n, t] = -ratio * a / len(places) / 7 if free else 0
    assert loss.item() == pytest.approx(wanted, abs=1e-6) == metrics["policy_loss"].item()
    torch.testing.assert_close(leaf.grad, slopes, atol=1e-6, rtol=1e-4)
    assert len(kinds) == 4 or clip == 0.9


def test_the_first_time_importance_weights_change_nothing():
    tokens, advantage = ragged()
    gradients = []
    for earlier in (None, tokens.logprob.clone()):
        leaf = tokens.logprob.clone().requires_grad_()
        again = replace(tokens, logprob=leaf, earlier=earlier)
        reinforce(again, advantage, 0.3, "exact", 7)[0].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def estimate(kind, tokens, n, t):
    """One token's estimate of the KL, by definition."""
    ratio = (tokens.logprob[n, t] - tokens.reference[n, t]).item()
    known = {
        "exact": tokens.kl[n, t].item(),
        "k2": ratio * ratio / 2,
        "k3": math.exp(-ratio) - 1 + ratio,
    }
    return known.get(kind, ratio)


def rows_of(tokens, rows):
    """Some rows of every table."""
    logprob = tokens.logprob[rows]
    return ScoredTokens(logprob, tokens.reference[rows], tokens.kl[rows], tokens.mask[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_micro_batches_and_left_out_rows_add_up(kind, cut):
    tokens, advantage = ragged()

    def gradient(slices, keep):
        leaf = tokens.logprob.clone().requires_grad_()
        whole = replace(tokens, logprob=leaf)
        total = 0.0
        for part in slices:
            rows = torch.arange(7)[part][keep[part]]
            if len(rows):
                loss, _ = reinforce(rows_of(whole, rows), advantage[rows], 0.3, kind, 7)
                loss.backward()
                total += loss.item()
        return leaf.grad, total

    everyone = torch.ones(7, dtype=torch.bool)
    whole = gradient([slice(0, 7)], everyone)
    parts = gradient([slice(0, cut), slice(cut, 7)], everyone)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-7, rtol=1e-5)
    assert parts[1] == pytest.approx(whole[1], abs=1e-6)
    some = torch.tensor([True, False, True, True, False, True, True])
    fewer = gradient([slice(0, cut), slice(cut, 7)], some)
    # leaving rows out changes no other row
    torch.testing.assert_close(fewer[0][some], whole[0][some], atol=1e-7, rtol=1e-5)
    assert fewer[0][~some].abs().sum() == 0


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_poison_behind_the_mask_stays_there(kind, again):
    tokens, advantage = ragged()
    mask = tokens.mask
    leaf = tokens.logprob.clone().requires_grad_()
    exact = tokens.kl.clone().requires_grad_()
    poisoned = replace(tokens, logprob=leaf, kl=exact)
    if again:
        poisoned = replace(poisoned, earlier=tokens.logprob)
    loss, _ = reinforce(poisoned, advantage, 0.3, kind, 7)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[~mask].abs().sum() == 0
    if kind == "exact":
        assert exact.grad.isfinite().all() and exact.grad[~mask].abs().sum() == 0
    penalised = k1_penalised(torch.zeros(7), tokens.logprob, tokens.reference, mask, 0.3)
    assert penalised.isfinite().all()


def test_token_mean_of_nothing_is_zero():
    values = torch.tensor([[1.0, 3.0], [5.0, float("nan")], [float("nan"), float("nan")]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert token_mean(values, mask).tolist() == [2, 5, 0]


def test_half_precision_log_probs_are_computed_in_float32():
    tokens, advantage = ragged()
    tables = (tokens.logprob, tokens.reference, tokens.kl)
    half = ScoredTokens(*(table.bfloat16() for table in tables), tokens.mask)
    loss, _ = reinforce(half, advantage, 0.3, "exact", 7)
    assert loss.dtype == torch.float32


def test_the_reference_never_receives_gradient():
    tokens, advantage = ragged()
    leaf = tokens.logprob.clone().requires_grad_()
    other = tokens.reference.clone().requires_grad_()
    loss, _ = reinforce(replace(tokens, logprob=leaf, reference=other), advantage, 0.3, "k2", 7)
    loss.backward()
    assert other.grad is None and leaf.grad is not None


# ---- states --------------------------------------------------------------------------------------


def test_defaults_are_the_configurations():
    update = UpdateConfig()
    assert Baseline() == Baseline(momentum=update.ema_momentum)
    assert Beta() == Beta(update.beta, update.tau, update.eta, update.beta_min, update.beta_max)


def test_beta_follows_the_batch_kl():
    beta = Beta(value=1.0, tau=0.02, eta=0.1, minimum=1e-3, maximum=1.2)
    beta.update(0.03)
    assert beta.value == pytest.approx(1.1)
    beta.update(0.02)  # at the target: down
    assert beta.value == pytest.approx(0.99)
    for _ in range(5):
        beta.update(1.0)
    assert beta.value == 1.2
    for _ in range(200):
        beta.update(0.0)
    assert beta.value == 1e-3


def test_the_papers_floor_is_reached_after_66_quiet_steps():
    beta = Beta(value=1e-3, minimum=1e-6)
    steps = 0
    while beta.value > 1e-6:
        beta.update(0.0)
        steps += 1
    assert steps == 66


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_refuse_non_finite_numbers(value):
    beta = Beta()
    baseline = Baseline(value=0.5)
    with pytest.raises(NumericFault):
        beta.update(value)
    with pytest.raises(NumericFault):
        baseline.update(value)
    assert beta.value == 1e-3 and baseline.value == 0.5


def test_states_survive_json():
    baseline = Baseline()
    beta = Beta()
    fresh = Baseline(value=7.0)
    fresh.load(json.loads(json.dumps(baseline.state())))
    assert fresh.value is None
    baseline.update(1 / 3)
    beta.update(1.0)
    again = Baseline()
    beta_again = Beta()
    again.load(json.loads(json.dumps(baseline.state())))
    beta_again.load(json.loads(json.dumps(beta.state())))
    assert (again.value, beta_again.value) == (baseline.value, beta.value)
