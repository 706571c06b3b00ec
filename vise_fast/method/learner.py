"""The update: score the sampled boxes under policy and reference, KL-regularised REINFORCE, one optimizer step.

Owns the optimizer, the moving baseline, the adaptive KL weight and the learning-rate schedule; `state` and `load` carry them through a
checkpoint. Micro-batches (the slices of the batch) add up to the same gradient because every mean has the whole batch's denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from vise_kernels import linear_logprob_kl

from vise_fast.config.schema import Config
from vise_fast.engine.fast import Engine
from vise_fast.method import loss, rewards
from vise_fast.method.experience import Played, join
from vise_fast.model import quantise
from vise_fast.model.load import Policy
from vise_fast.system import checkpoint
from vise_fast.system.errors import NumericFault
from vise_fast.system.randomness import generator

MAX_SKIPPED = 5


@dataclass
class Targets:
    """Per answer of a slice (samples, then views): its advantage and whether it is scored at all."""

    advantage: Tensor
    scored: Tensor


class Learner:
    """Turns played slices into one optimizer step on the LoRA masters."""

    def __init__(self, policy: Policy, engine: Engine, config: Config) -> None:
        self.policy = policy
        self.engine = engine
        self.config = config
        self.parameters = policy.parameters()
        self.optimizer = make_optimizer(list(self.parameters.values()), config)
        update = config.update
        self.baseline = loss.Baseline(update.ema_momentum)
        self.beta = loss.Beta(update.beta, update.tau, update.eta, update.beta_min, update.beta_max)
        self.skipped = 0
        self.moving = False
        """The adapter is being changed: a step that fails now cannot be done again."""

    def learn(self, slices: list[Played], step: int) -> dict[str, float]:
        """One update from the whole batch. Raises NumericFault after several non-finite gradients in a row."""
        evidence = join(slices)
        scores = rewards.score(
            evidence, self.config.reward, generator(self.config.train.seed, step, "reward")
        )
        for played, part in zip(
            slices,
            scores.reward.split([len(p.images) * self.config.rollout.samples for p in slices]),
            strict=True,
        ):
            played.rewards = part
        targets, metrics = self._targets(slices, evidence, scores)
        self.optimizer.zero_grad(set_to_none=True)
        samples = len(scores.reward)
        scored = max(sum(int(t.scored.sum()) for t in targets), 1)
        with self.engine.clock.phase("update"):
            sums = [
                self._backward(played, target, samples)
                for played, target in zip(slices, targets, strict=True)
                if target.scored.any()
            ]
            totals = self._totals(sums)
        # The loss divides by all samples; the KL that steers beta is the mean over the answers that
        # were scored.
        metrics["kl"] = totals.pop("kl", 0.0) * samples / scored
        metrics |= totals | {
            "scored": scored / samples,
            "beta": self.beta.value,
            "lr": self._set_lr(step),
        }
        if sums:
            with self.engine.clock.phase("optimizer"):
                self._apply(metrics["grad_norm"])
        if sums and math.isfinite(metrics["grad_norm"]):
            self.beta.update(metrics["kl"])
        if scores.carries.any():
            self.baseline.update(metrics["reward_mean"])
        queries = [query for played in slices for query in played.queries.texts]
        return scores.metrics | metrics | {"unique_queries": len(set(queries)) / len(queries)}

    def _targets(
        self, slices: list[Played], evidence: rewards.Evidence, scores: rewards.Scores
    ) -> tuple[list[Targets], dict[str, float]]:
        """Advantages of all samples, and of the views where they are trained too, cut along the slices."""
        update = self.config.update
        group = self.config.rollout.samples
        many = self.config.rollout.views
        reward = scores.reward
        if update.kl == "k1_reward":
            reward = torch.cat(
                [
                    self._penalised(played, r)
                    for played, r in zip(
                        slices, reward.split([len(p.images) * group for p in slices]), strict=True
                    )
                ]
            )
        advantage, metrics = loss.advantages(
            reward, scores.carries, group, update.advantage, self.baseline
        )
        # A group whose rewards are all equal teaches nothing and carries no gradient (METHOD
        # section 6): not scored.
        alive = (
            advantage.view(-1, group).abs().amax(1) > 0
            if update.advantage != "ema"
            else torch.ones(len(advantage) // group, dtype=torch.bool)
        )
        scored = scores.carries & alive.repeat_interleave(group)
        view_advantage, view_scored = self._view_targets(scores, group, many)
        targets = []
        image = 0
        for played in slices:
            rows = slice(image * group, (image + len(played.images)) * group)
            extra = slice(image * many, (image + len(played.images)) * many)
            targets.append(
                Targets(
                    torch.cat([advantage[rows], view_advantage[extra]]),
                    torch.cat([scored[rows], view_scored[extra]]),
                )
            )
            image += len(played.images)
        return targets, metrics

    def _view_targets(self, scores: rewards.Scores, group: int, many: int) -> tuple[Tensor, Tensor]:
        """The views' own answers: mean agreement with the image's samples, against the image's other views."""
        carries = scores.view_carries.view(-1, group, many)
        if not self.config.update.views_too:
            return torch.zeros(len(carries) * many), torch.zeros(
                len(carries) * many, dtype=torch.bool
            )
        reward = (scores.view_reward.view(-1, group, many) * carries).sum(1) / carries.sum(
            1
        ).clamp_min(1)
        known = carries.any(1).flatten()
        advantage, _ = loss.advantages(reward.flatten(), known, many, "rloo")
        return advantage, known & (advantage != 0)

    def _penalised(self, played: Played, reward: Tensor) -> Tensor:
        """`k1_reward`: rewards minus beta times the log-ratio to the reference of each sample."""
        with torch.no_grad():
            logprob, reference, _, lengths = self._logprobs(played, list(range(len(reward))))
        mask = token_mask(lengths, logprob.device)
        tables = (
            torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x).cpu()
            for x in (logprob, reference)
        )
        return loss.k1_penalised(reward, *tables, mask.cpu(), self.beta.value)

    def _logprobs(
        self, played: Played, chosen: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Log-prob, reference log-prob and exact KL of every scored token of the chosen answers, packed (tokens,), and tokens per answer."""
        engine = self.engine
        boxes = played.boxes
        images = sorted({boxes.owner[n] for n in chosen})
        owner = [images.index(boxes.owner[n]) for n in chosen]
        args = (
            played.features.select(images),
            [boxes.rows[i] for i in images],
            boxes.answers.select(chosen),
            owner,
        )
        head = engine.backbone.head.weight
        if self.config.reward.preset == "as_released":
            with torch.no_grad():
                reference, ids, lengths = engine.score_released(*args, False)
            hidden, *_ = engine.score_released(*args, True)
            return *linear_logprob_kl(hidden, reference, head, ids), lengths
        with torch.no_grad():
            cached = (
                played.reference.select(images)
                if played.reference is not None and images[-1] < len(played.reference)
                else None
            )
            reference = engine.score(*args, False, prefixes=cached)
        shared = (
            {}
            if boxes.asked is None or 2 * len(images) < len(boxes.asked)
            else {"prompts": boxes.asked.select(images)}
        )
        hidden = engine.score(*args, True, recompute=self.config.train.checkpointing, **shared)
        return *linear_logprob_kl(
            hidden, reference, head, args[2].packed(), banned=engine.banned
        ), args[2].lengths

    def _backward(self, played: Played, target: Targets, samples: int) -> dict[str, Tensor]:
        """Adds one slice's gradient; returns its share of the batch's figures (0-d tensors)."""
        chosen = target.scored.nonzero()[:, 0].tolist()
        *packed, lengths = self._logprobs(played, chosen)
        mask = token_mask(lengths, packed[0].device)
        logprob, reference, kl = (
            torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x) for x in packed
        )
        advantage = target.advantage[chosen].to(mask.device)
        value, figures = loss.reinforce(
            logprob, mask, advantage, kl, reference, self.beta.value, self.config.update.kl, samples
        )
        value.backward()
        played.boxes.asked = None  # its graph is spent
        return figures

    def _totals(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of the whole batch and the gradient norm before clipping, which happens here; the update's one host sync."""
        if not sums:
            return {"grad_norm": 0.0}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.train.clip)
        totals = {name: sum(s[name] for s in sums) for name in sums[0]} | {"grad_norm": norm}
        self.engine.counters.host_reads += 1
        return dict(
            zip(
                totals,
                torch.stack([value.float() for value in totals.values()]).tolist(),
                strict=True,
            )
        )

    def _apply(self, norm: float) -> None:
        """Step by the clipped gradient; one that is not finite changes nothing."""
        if not math.isfinite(norm):
            self.skipped += 1
            if self.skipped >= MAX_SKIPPED:
                raise NumericFault(
                    f"the gradient was not finite {self.skipped} times in a row; the run has "
                    "diverged; lower train.lr or use float32"
                )
            return
        self.skipped = 0
        self._make_room()
        self.moving = True
        self.optimizer.step()
        self.forget()  # no gradients in memory during the next rollout
        self.policy.backbone.refresh()
        self.moving = False

    def _make_room(self) -> None:
        """Runs out of memory here, where nothing has changed yet, rather than halfway through: moments not made yet and one more copy of all masters."""
        made = any(self.optimizer.state.get(p) for p in self.parameters.values())
        size = sum(p.numel() for p in self.parameters.values()) * (4 if made else 12)
        torch.empty(size, dtype=torch.uint8, device=self.policy.device)

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _set_lr(self, step: int) -> float:
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def state(self) -> tuple[checkpoint.Tensors, dict]:
        """(tensors, json) of everything the next step depends on beside step number and configuration."""
        moments, numbers = checkpoint.moments(self.optimizer, self.parameters)
        tensors = {
            "adapter": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": moments,
        }
        return tensors, {
            "optimizer": numbers,
            "beta": self.beta.state(),
            "baseline": self.baseline.state(),
            "skipped": self.skipped,
        }

    def load(self, tensors: checkpoint.Tensors, state: dict) -> None:
        """The inverse of `state`. Raises checkpoint.Corrupt where the tensors belong to another model."""
        stored = tensors.get("adapter", {})
        if {n: p.shape for n, p in self.parameters.items()} != {
            n: t.shape for n, t in stored.items()
        }:
            raise checkpoint.Corrupt(
                "the checkpoint's adapter has other tensors than this run's; resume with the "
                "configuration that wrote it"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(stored[name])
        checkpoint.restore_moments(
            self.optimizer, self.parameters, tensors.get("optimizer", {}), state["optimizer"]
        )
        self.beta.load(state["beta"]), self.baseline.load(state["baseline"])
        self.skipped = state["skipped"]
        self.policy.backbone.refresh()


def token_mask(lengths: list[int], device: torch.device) -> Tensor:
    """Bool (N, T): True on the first lengths[n] positions of row n."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def make_optimizer(parameters: list[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW over the LoRA masters; the 8-bit kinds come from bitsandbytes."""
    settings = dict(
        lr=config.train.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.train.weight_decay,
    )
    if config.optim.name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    library = quantise.bitsandbytes()
    kinds = {"adamw8bit": library.optim.AdamW8bit, "paged_adamw8bit": library.optim.PagedAdamW8bit}
    return kinds[config.optim.name](parameters, **settings)


def learning_rate(step: int, config: Config) -> float:
    """The rate of update `step` (0-based): linear warm-up, then constant or a cosine to zero."""
    train = config.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup) / max(train.steps - train.warmup, 1)
    return train.lr * (1 + math.cos(math.pi * progress)) / 2
