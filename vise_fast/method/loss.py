"""Advantages, KL estimators, REINFORCE; the moving baseline and the adaptive KL weight as tiny
states.

Pure functions of tensors: rows N = images * G in group-major order, T completion positions (EOS
included, padding masked). Log-probs and KL are means over a completion's tokens, then over samples;
the number of samples is given (`denominator`), so that a batch cut into micro-batches adds up to
the same loss. Left out: which rows are scored (learner.py) and how (token_scores.py), what they
earned (rewards.py).

Run: `pytest tests/method/test_loss.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vise_fast.system.errors import NumericFault

AdvantageKind = Literal["rloo", "ema", "grpo", "dr_grpo"]
KLKind = Literal["exact", "k2", "k3", "k1_loss", "k1_reward"]

SAME = 1e-9
"""Rewards of a group that differ by less are equal (a neutral value is a mean and rounds)."""
STD_FLOOR = 1e-6


@dataclass
class Baseline:
    """Exponential moving average of the mean reward. Starts at the first batch's mean."""

    momentum: float = 0.9
    value: float | None = None

    def update(self, mean_reward: float) -> None:
        """One call per step, after the advantages were taken.

        Raises NumericFault when the mean is not finite.
        """
        if not math.isfinite(mean_reward):
            raise NumericFault(
                f"the mean reward is {mean_reward}; a baseline cannot follow it; look at the last "
                "samples"
            )
        if self.value is None:
            self.value = mean_reward
        else:
            self.value = self.momentum * self.value + (1 - self.momentum) * mean_reward

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {} if self.value is None else {"value": self.value}

    def load(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self.value = state.get("value")


@dataclass
class Beta:
    """Adaptive KL weight: times (1 + eta) when the batch's mean KL is above tau, times (1 - eta)
    otherwise, clamped.
    """

    value: float = 1e-3
    tau: float = 0.02
    eta: float = 0.1
    minimum: float = 1e-3
    maximum: float = 1e2

    def update(self, kl: float) -> None:
        """kl: mean over the batch in nat per token. Raises NumericFault when it is not finite."""
        if not math.isfinite(kl):
            raise NumericFault(
                f"the KL is {kl}; the policy's log-probs are not finite; lower the learning rate"
            )
        factor = 1 + self.eta if kl > self.tau else 1 - self.eta
        self.value = min(max(self.value * factor, self.minimum), self.maximum)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"value": self.value}

    def load(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self.value = state["value"]


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's unmasked positions, 0 for a row without any. (N, T), (N, T) bool ->
    (N,).

    Masked positions are replaced, not multiplied: a NaN there stays out of value and gradient.
    """
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp_min(1)


def k1_penalised(
    rewards: Tensor, logprob: Tensor, reference_logprob: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """`k1_reward`: rewards (N,) minus beta times the mean log-ratio of the sampled tokens, without
    gradient. Before advantages.
    """
    ratio = logprob.detach().float() - reference_logprob.detach().float()
    return rewards - beta * token_mean(ratio, mask).to(rewards)


def _group_advantages(rewards: Tensor, carries: Tensor, kind: AdvantageKind) -> Tensor:
    """(groups, G) x2 -> (groups, G): against the group's carrying rows only.

    A lone row has nothing to compare with: 0.
    """
    count = carries.sum(1, keepdim=True).to(rewards.dtype)
    centred = rewards - (rewards * carries).sum(1, keepdim=True) / count.clamp_min(1)
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":  # r_i - mean of the others = (r_i - mean of all) n / (n - 1)
        return centred * count / (count - 1).clamp_min(1)
    if kind == "grpo":
        std = ((centred**2 * carries).sum(1, keepdim=True) / count.clamp_min(1)).sqrt()
        return centred / (std + STD_FLOOR)
    raise ValueError(f"advantage {kind!r}; known: rloo, ema, grpo, dr_grpo")


def _spread(rewards: Tensor, carries: Tensor) -> Tensor:
    """Largest minus smallest reward of each group's carrying rows; (groups, 1).

    Not positive when there are none.
    """
    highest = rewards.masked_fill(~carries, -math.inf).amax(1, keepdim=True)
    return highest - rewards.masked_fill(~carries, math.inf).amin(1, keepdim=True)


def advantages(
    rewards: Tensor,
    carries: Tensor,
    group_size: int,
    kind: AdvantageKind,
    baseline: Baseline | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """How much better each sample did than expected. rewards (N,), carries (N,) bool -> advantage
    (N,), metrics.

    rloo: minus the mean of the group's other carrying samples. dr_grpo: minus the group's mean.
    grpo: that over the group's population standard deviation. ema: minus the moving baseline as it
    stood before this step (call `baseline.update(metrics["reward_mean"])` after the step; before
    the first one the batch's own mean stands in). Rows that do not carry get 0 and enter no mean.
    For the group kinds, groups whose carrying rewards are all equal get exactly 0 and are counted
    in `zero_variance` (share of groups with any).
    """
    carries = carries.view(-1, group_size)
    values = rewards.double().view(-1, group_size).masked_fill(~carries, 0)
    mean = float(values.sum() / carries.sum().clamp_min(1))
    flat = _spread(values, carries) <= SAME
    if kind == "ema":
        result = values - _expected(baseline, mean)
    else:
        result = _group_advantages(values, carries, kind).masked_fill(flat, 0)
    result = result.masked_fill(~carries, 0).reshape(-1)
    alive = carries.any(1, keepdim=True)
    metrics = {
        "reward_mean": mean,
        "zero_variance": float((flat & alive).sum() / alive.sum().clamp_min(1)),
        "advantage_rms": float((result**2).mean().sqrt()),
    }
    return result.float(), metrics


def _expected(baseline: Baseline | None, mean: float) -> float:
    """The moving baseline; before its first step, the batch's own mean."""
    return mean if baseline is None or baseline.value is None else baseline.value


def _kl_tokens(kind: KLKind, logprob: Tensor, reference: Tensor, exact: Tensor | None) -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens sampled by the policy; (N, T)."""
    if kind == "exact":
        if exact is None:
            raise ValueError("kl: exact needs the exact KL of every position")
        return exact.float()
    ratio = logprob - reference
    if kind == "k2":
        return ratio**2 / 2
    if kind == "k3":
        return torch.expm1(-ratio) + ratio
    if kind in ("k1_loss", "k1_reward"):
        return ratio
    raise ValueError(f"kl {kind!r}; known: exact, k2, k3, k1_loss, k1_reward")


@dataclass(frozen=True)
class ScoredTokens:
    """What is known of the sampled tokens, (N, T) each; rows are answers, `mask` is False on
    padding.

    logprob with gradient; reference without; kl: the exact KL of each position, with gradient (None
    where it was not computed; `exact` needs it). earlier: the log-probs before the first update on
    these answers, without gradient; None: this is the first.
    """

    logprob: Tensor
    reference: Tensor
    kl: Tensor | None
    mask: Tensor
    earlier: Tensor | None = None


def clipped(logprob: Tensor, earlier: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's surrogate per token (N, T) to maximise: min(r A, clip(r, 1 - clip, 1 + clip) A) with r
    = exp(logprob - earlier) and A the row's advantage (N,) (arXiv 1707.06347, equation 7).
    """
    ratio = (logprob - earlier).exp()
    weight = advantage[:, None]
    return torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight)


def reinforce(
    tokens: ScoredTokens,
    advantage: Tensor,
    beta: float,
    kind: KLKind,
    denominator: int,
    clip: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL-regularised REINFORCE: minus the mean of advantage times log-prob, plus beta times the KL;
    a scalar to minimise.

    advantage (N,). denominator: samples of the whole batch, rows left out included; losses and
    metrics of micro-batches then simply add up. k1_loss has zero expected gradient (the paper's;
    for parity), k1_reward acts through `k1_penalised` and adds no term here. Answers that were
    learned from before (`tokens.earlier`) count by their importance weights, clipped. Metrics are
    detached
    0-d tensors (reading them is the caller's host sync): policy_loss, kl (of this estimator),
    kl_loss.
    """
    if denominator <= 0:
        raise ValueError(f"denominator {denominator}: the whole batch has at least one sample")
    mask = tokens.mask
    # before any arithmetic: the gradient of a masked NaN would be NaN
    filled = tokens.logprob.float().masked_fill(~mask, 0)
    reference = tokens.reference.detach().float().masked_fill(~mask, 0)
    weight = advantage.detach().to(filled)
    if tokens.earlier is None:
        gained = weight * token_mean(filled, mask)
    else:
        earlier = tokens.earlier.detach().float().masked_fill(~mask, 0)
        gained = token_mean(clipped(filled, earlier, weight, clip), mask)
    policy_loss = -gained.sum() / denominator
    per_token = _kl_tokens(kind, filled, reference, tokens.kl)
    mean_kl = token_mean(per_token, mask).sum() / denominator
    kl_loss = torch.zeros_like(mean_kl) if kind == "k1_reward" else beta * mean_kl
    metrics = {
        "policy_loss": policy_loss.detach(),
        "kl": mean_kl.detach(),
        "kl_loss": kl_loss.detach(),
    }
    return policy_loss + kl_loss, metrics
