"""The update: score the sampled boxes under policy and reference, KL-regularised REINFORCE, one
optimizer step.

Owns the optimizer, the moving baseline, the adaptive KL weight, the counts of queries and the
learning-rate schedule; `state` and `load` carry them through a checkpoint. Micro-batches (the
slices of the batch) add up to the same gradient because every mean has the whole batch's
denominator. Left out: the forward passes (token_scores.py) and the formulas (loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.method import consensus, loss, rewards, toward_consensus
from vise_fast.method.evidence import Evidence, join
from vise_fast.method.experience import Played
from vise_fast.method.groups import balance
from vise_fast.method.token_scores import TokenScorer, token_mask
from vise_fast.model import quantise
from vise_fast.model.load import Policy
from vise_fast.ranks.ranks import Alone, Ranks
from vise_fast.system import checkpoint
from vise_fast.system.errors import NumericFault
from vise_fast.system.machine.staging import put
from vise_fast.system.randomness import generator

MAX_SKIPPED = 5
GAP_TOKENS = "gap_tokens"
GAP_WORST = "gap_worst"
Number = TypeVar("Number", Tensor, float)


@dataclass
class Targets:
    """Per answer (of a slice: samples, then views): its advantage and whether it is scored.
    earlier: log-probs (scored, T) before the first update on them, where several are made.
    """

    advantage: Tensor
    scored: Tensor
    earlier: Tensor | None = None

    def cut(self, sizes: list[int]) -> list[Targets]:
        """Along the slices, which have so many answers each."""
        pieces = zip(self.advantage.split(sizes), self.scored.split(sizes), strict=True)
        return [Targets(advantage, scored) for advantage, scored in pieces]

    def weighted(self, weight: Tensor) -> Targets:
        """Advantages times the weight (images,) of their image; every image has as many."""
        each = weight.repeat_interleave(len(self.advantage) // len(weight))
        return Targets(self.advantage * each.to(self.advantage.dtype), self.scored)

    def followed_by(self, more: Targets) -> Targets:
        """These answers and, behind them, others."""
        advantage = torch.cat([self.advantage, more.advantage])
        return Targets(advantage, torch.cat([self.scored, more.scored]))


@dataclass(frozen=True)
class _Remembered:
    """What a checkpoint's JSON says of a learner, as far as it is checked here."""

    numbers: dict[str, Any]
    skipped: int
    asked: dict[str, int]

    @classmethod
    def read(cls, state: Any) -> _Remembered:
        """Raises checkpoint.Corrupt for what `Learner.state` did not make."""
        try:
            weights = [state["beta"]["value"], *state["baseline"].values()]
            skipped = state["skipped"]
            sound = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
            if not sound or weights[0] < 0 or type(skipped) is not int or skipped < 0:
                raise ValueError("numbers that cannot be")
            return cls(dict(state["optimizer"]), skipped, balance.read(state))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as fault:
            raise checkpoint.Corrupt(
                f"the checkpoint's state is not a learner's ({fault}); use --resume auto to take "
                "an older one"
            ) from None


class Room(NamedTuple):
    """Bytes that an optimizer takes of torch's memory for each parameter: in a step, and at the
    first for its moments.
    """

    step: int
    made: int


# torch's works on one more copy; paged moments lie in memory that the driver manages
ROOM = {"adamw": Room(4, 8), "adamw8bit": Room(0, 3), "paged_adamw8bit": Room(0, 0)}


class Learner:
    """Turns played slices into one optimizer step on the LoRA masters. `optimizer`: made from the
    configuration unless given; `ranks`: those that play the batch's other images, if there are any.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: Config,
        optimizer: Any = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Alone()
        self.policy = policy
        self.engine = engine
        self.config = config
        self.scorer = TokenScorer(engine, config)
        self.parameters = policy.parameters()
        self.optimizer = optimizer or make_optimizer(list(self.parameters.values()), config)
        update = config.update
        self.baseline = loss.Baseline(update.ema_momentum)
        self.beta = loss.Beta(update.beta, update.tau, update.eta, update.beta_min, update.beta_max)
        self.balance = balance.Balance(config.data.balance)
        self.skipped = 0
        self.moving = False
        """The adapter, or what steers it, is being changed: a step that fails now cannot be done
        again, nor saved.
        """

    def learn(self, slices: list[Played], step: int) -> dict[str, float]:
        """One update from the whole batch, of which `slices` are this rank's. Raises NumericFault
        after several non-finite gradients in a row.
        """
        scores = self._score(slices, step)
        unique = {"unique_queries": _unique_queries(slices, self.ranks)}
        asked = self._asked(slices)
        targets, metrics = self._targets(slices, scores, asked)
        samples = len(scores.reward)
        scored = self.ranks.total("scored", sum(int(target.scored.sum()) for target in targets))
        with self.engine.clock.phase("update"):
            sums = self._gradient(slices, targets, samples)
            totals = self._totals(sums) if scored else {"grad_norm": 0.0}
        # The loss divides by all samples; the KL that steers beta is the mean over the answers that
        # were scored.
        metrics["kl"] = totals.pop("kl", 0.0) * samples / max(scored, 1)
        metrics |= _gap(totals)
        metrics |= totals | {"scored": scored / samples, "beta": self.beta.value}
        metrics["lr"] = self._set_lr(step)
        if scored:
            with self.engine.clock.phase("optimizer"):
                self._apply(metrics["grad_norm"])
            if math.isfinite(metrics["grad_norm"]):
                self.beta.update(metrics["kl"])
                self._again(slices, targets, samples)
        if scores.carries.any():
            self.baseline.update(metrics["reward_mean"])
        self.balance.add(asked)
        self.moving = False
        self.ranks.step_done()
        return scores.metrics | metrics | unique

    def _again(self, slices: list[Played], targets: list[Targets], samples: int) -> None:
        """The further updates on the same answers (`update.reuse`)."""
        for _ in range(1, self.config.update.reuse):
            self.moving = True  # the step has begun: it cannot be done again from here
            self.ranks.step_done()  # and exchanges anew
            with self.engine.clock.phase("update"):
                totals = self._totals(self._gradient(slices, targets, samples))
            with self.engine.clock.phase("optimizer"):
                self._apply(totals["grad_norm"])

    def _score(self, slices: list[Played], step: int) -> rewards.Scores:
        """The rewards of the whole batch; each slice keeps its own."""
        own = join([played.evidence for played in slices])
        evidence = join(self.ranks.gather("evidence", own))
        rng = generator(self.config.train.seed, step, "reward")
        scores = rewards.score(evidence, self.config.reward, rng)
        samples = self.config.rollout.samples
        pieces = self._own(scores.reward, samples).split(_sizes(slices, samples))
        for played, part in zip(slices, pieces, strict=True):
            played.rewards = part
        if self.config.update.consensus > 0:
            self._agree(slices, evidence)
        return scores

    def _agree(self, slices: list[Played], evidence: Evidence) -> None:
        """The consensus of the whole batch, each slice's kept with it: its controls look at other
        images.
        """
        whole = consensus.target(evidence, self.config.reward, self.config.update.consensus_of)
        samples = self.config.rollout.samples
        rows = self._own(torch.arange(len(whole.known)), samples)
        for played, part in zip(slices, rows.split(_sizes(slices, samples)), strict=True):
            played.agreed = whole.select(part)

    def _own(self, rows: Tensor, per_image: int) -> Tensor:
        """Of the rows of a whole batch, which has so many per image, this rank's."""
        part = self.ranks.part(len(rows) // per_image)
        return rows[part.start * per_image : part.stop * per_image]

    # ---- who learns how much -------------------------------------------------------------------

    def _targets(
        self, slices: list[Played], scores: rewards.Scores, asked: Sequence[str | None] = ()
    ) -> tuple[list[Targets], dict[str, float]]:
        """Advantages of all samples, and of the views where they are trained too; this rank's, cut
        along the slices. asked: the batch's queries, where they are weighed against each other.
        """
        rollout = self.config.rollout
        kind = self.config.update.advantage
        reward = self._learned_from(slices, scores.reward)
        advantage, metrics = loss.advantages(
            reward, scores.carries, rollout.samples, kind, self.baseline
        )
        agreed = torch.cat(self.ranks.gather("agreed", self._agreed(slices)))
        scored = scores.carries & (self._alive(advantage) | agreed)
        samples = Targets(advantage, scored)
        views = self._view_targets(scores)
        if asked:
            weight = self.balance.weights(asked)
            samples = samples.weighted(weight)
            views = views.weighted(weight)
            metrics |= balance.figures(weight)
        own = self._cut(samples, slices, rollout.samples)
        behind = self._cut(views, slices, rollout.views)
        pairs = zip(own, behind, strict=True)
        return [first.followed_by(more) for first, more in pairs], metrics

    def _asked(self, slices: list[Played]) -> list[str | None]:
        """The batch's queries, None where one could not be read; none where none is counted."""
        if self.balance.strength == 0:
            return []
        own: list[str | None] = []
        for played in slices:
            pairs = zip(played.queries.texts, played.queries.readable, strict=True)
            own += [text if readable else None for text, readable in pairs]
        return list(chain.from_iterable(self.ranks.gather("asked", own)))

    def _cut(self, whole: Targets, slices: list[Played], per_image: int) -> list[Targets]:
        """A batch's targets as those of this rank's slices."""
        advantage = self._own(whole.advantage, per_image)
        scored = self._own(whole.scored, per_image)
        return Targets(advantage, scored).cut(_sizes(slices, per_image))

    def _alive(self, advantage: Tensor) -> Tensor:
        """(N,) bool. A group whose rewards are all equal teaches nothing and carries no gradient:
        its answers are not scored. Against a moving baseline they teach.
        """
        if self.config.update.advantage == "ema":
            return torch.ones_like(advantage, dtype=torch.bool)
        group = self.config.rollout.samples
        alive = advantage.view(-1, group).abs().amax(1) > 0
        return alive.repeat_interleave(group)

    def _agreed(self, slices: list[Played]) -> Tensor:
        """(N,) bool: answers that learn from the consensus of their views."""
        if self.config.update.consensus == 0:
            return torch.zeros(sum(_sizes(slices, self.config.rollout.samples)), dtype=torch.bool)
        return torch.cat([toward_consensus.agreed(played).known for played in slices])

    def _learned_from(self, slices: list[Played], reward: Tensor) -> Tensor:
        """The rewards (N,), minus the KL where `update.kl` puts it there."""
        if self.config.update.kl != "k1_reward":
            return reward
        samples = self.config.rollout.samples
        pieces = self._own(reward, samples).split(_sizes(slices, samples))
        pairs = zip(slices, pieces, strict=True)
        own = torch.cat([self._penalised(played, piece) for played, piece in pairs])
        return torch.cat(self.ranks.gather("penalised", own))

    def _view_targets(self, scores: rewards.Scores) -> Targets:
        """The views' own answers, image-major: mean agreement with the image's samples, against the
        image's other views.
        """
        many = self.config.rollout.views
        shape = (-1, self.config.rollout.samples, many)
        carries = scores.view_carries.view(shape)
        if not self.config.update.views_too:
            count = len(carries) * many
            return Targets(torch.zeros(count), torch.zeros(count, dtype=torch.bool))
        total = (scores.view_reward.view(shape) * carries).sum(1)
        reward = total / carries.sum(1).clamp_min(1)
        known = carries.any(1).flatten()
        advantage, _ = loss.advantages(reward.flatten(), known, many, "rloo")
        return Targets(advantage, known & (advantage != 0))

    def _penalised(self, played: Played, reward: Tensor) -> Tensor:
        """`k1_reward`: rewards minus beta times the log-ratio to the reference of each sample."""
        with torch.no_grad():
            scores = self.scorer.score(played, list(range(len(reward))))
        logprob = self.engine.home(scores.table(scores.logprob))
        reference = self.engine.home(scores.table(scores.reference))
        mask = token_mask(scores.lengths, logprob.device)
        return loss.k1_penalised(reward, logprob, reference, mask, self.beta.value)

    # ---- gradients -----------------------------------------------------------------------------

    def _gradient(
        self, slices: list[Played], targets: list[Targets], samples: int
    ) -> list[dict[str, Tensor]]:
        """Backwards through every slice that has scored answers; their shares of the figures."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = []
        for played, target in zip(slices, targets, strict=True):
            if target.scored.any():
                sums.append(self._backward(played, target, samples))
        return sums

    def _backward(self, played: Played, target: Targets, samples: int) -> dict[str, Tensor]:
        """Adds one slice's gradient; returns its share of the batch's figures (0-d tensors)."""
        chosen = target.scored.nonzero()[:, 0].tolist()
        scores = self.scorer.score(played, chosen, gap=target.earlier is None)
        tokens = loss.ScoredTokens(
            scores.table(scores.logprob),
            scores.table(scores.reference),
            scores.table(scores.kl),
            scores.mask,
            target.earlier,
        )
        if self.config.update.reuse > 1 and target.earlier is None:
            target.earlier = tokens.logprob.detach()
        share = self.config.update.consensus
        advantage = put(target.advantage[chosen] * (1 - share), tokens.mask.device)
        kind = self.config.update.kl
        clip = self.config.update.clip
        value, figures = loss.reinforce(tokens, advantage, self.beta.value, kind, samples, clip)
        if share > 0:
            value = value - share * toward_consensus.raised(
                self.engine, self.config, played, chosen, scores, samples
            )
        if scores.gap is not None:
            figures |= {"gap": scores.gap.sum(), GAP_TOKENS: tokens.mask.sum()}
            figures[GAP_WORST] = scores.gap.max()
        del scores, tokens  # the graph keeps what it needs of them
        with self.engine.clock.phase("backward"):
            value.backward()
        played.boxes.asked = None  # its graph is spent
        return figures

    def _totals(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of the whole batch and the gradient norm before clipping, which happens here; the
        update's one host sync.
        """
        self.ranks.add_gradients(self.parameters.values())
        norm = self._clip()
        totals = _joined(sums)
        values = torch.stack([value.float() for value in [*totals.values(), norm]])
        *home, length = self.engine.home(values).tolist()
        own = dict(zip(totals, home, strict=True))
        return _joined(self.ranks.gather("figures", own)) | {"grad_norm": length}

    def _clip(self) -> Tensor:
        """Scale the gradients to at most `train.clip` together; their norm before, 0-d."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.train.clip)

    # ---- the step ------------------------------------------------------------------------------

    def _apply(self, norm: float) -> None:
        """Step by the clipped gradient; one that is not finite changes nothing."""
        if not math.isfinite(norm):
            self._skip()
            return
        self.skipped = 0
        self._make_room()
        self.moving = True
        self.optimizer.step()
        self.forget()  # no gradients in memory during the next rollout
        self.policy.backbone.refresh()
        self.moving = False

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped >= MAX_SKIPPED:
            raise NumericFault(
                f"the gradient was not finite {self.skipped} times in a row; the run has diverged; "
                "lower train.lr or use float32"
            )

    def _make_room(self) -> None:
        """Runs out of memory here, where nothing has changed yet, rather than halfway through."""
        made = any(self.optimizer.state.get(p) for p in self.parameters.values())
        each = ROOM[self.config.optim.name]
        size = sum(p.numel() for p in self.parameters.values()) * (
            each.step + (not made) * each.made
        )
        torch.empty(size, dtype=torch.uint8, device=self.policy.device)

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _set_lr(self, step: int) -> float:
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    # ---- checkpoints ---------------------------------------------------------------------------

    def state(self) -> tuple[checkpoint.Tensors, dict]:
        """(tensors, json) of everything the next step depends on beside step number and
        configuration.
        """
        moments, numbers = checkpoint.moments(self.optimizer, self.parameters)
        adapter = {name: p.detach() for name, p in self.parameters.items()}
        own = {
            "optimizer": numbers,
            "beta": self.beta.state(),
            "baseline": self.baseline.state(),
            "skipped": self.skipped,
            **self.balance.state(),
        }
        return {"adapter": adapter, "optimizer": moments}, own

    def load(self, tensors: checkpoint.Tensors, state: dict) -> None:
        """The inverse of `state`. Raises checkpoint.Corrupt where the tensors belong to another
        model or are not finite, and where `state` gave something else; nothing has changed then.
        """
        adapter = tensors.get("adapter", {})
        moments = tensors.get("optimizer", {})
        known = _Remembered.read(state)
        self._check_adapter(adapter)
        checkpoint.restore_moments(self.optimizer, self.parameters, moments, known.numbers)
        self._load_adapter(adapter)
        self.beta.load(state["beta"])
        self.baseline.load(state["baseline"])
        self.balance.load(known.asked)
        self.skipped = known.skipped
        self.policy.backbone.refresh()

    def _check_adapter(self, stored: dict[str, Tensor]) -> None:
        here = {name: p.shape for name, p in self.parameters.items()}
        if here != {name: tensor.shape for name, tensor in stored.items()}:
            raise checkpoint.Corrupt(
                "the checkpoint's adapter has other tensors than this run's; resume with the "
                "configuration that wrote it"
            )
        for name, tensor in stored.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise checkpoint.Corrupt(
                    f"the checkpoint's adapter is not finite in {name}; use --resume auto to take "
                    "an older one"
                )

    def take_adapter(self, adapter: dict[str, Tensor]) -> None:
        """Another adapter of the same shapes in place of this one; moments and weights of the
        update stay.
        """
        self._load_adapter(adapter)
        self.policy.backbone.refresh()

    @torch.no_grad()
    def _load_adapter(self, stored: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(stored[name])


def _joined(parts: Sequence[dict[str, Number]]) -> dict[str, Number]:
    """Figures of slices, or of ranks, added up in their order, of the worst the worst; a part may
    lack some.
    """
    found: dict[str, Number] = {}
    for part in parts:
        for name, value in part.items():
            if name not in found:
                found[name] = value
            elif name == GAP_WORST:
                found[name] = _worse(found[name], value)
            else:
                found[name] = found[name] + value
    return found


def _worse(one: Number, other: Number) -> Number:
    """The larger; no host sync."""
    if isinstance(one, Tensor):
        return torch.maximum(one, other)
    return max(one, other)


def _gap(totals: dict[str, float]) -> dict[str, float]:
    """`logprob_gap` and its worst token, taken out of `totals`; nothing where it was not looked
    at.
    """
    if GAP_TOKENS not in totals:
        return {}
    mean = totals.pop("gap") / totals.pop(GAP_TOKENS)
    return {"logprob_gap": mean, "logprob_gap_worst": totals.pop(GAP_WORST)}


def _sizes(slices: list[Played], per_image: int) -> list[int]:
    """Answers of each slice, which has so many per image."""
    return [len(played.images) * per_image for played in slices]


def _unique_queries(slices: list[Played], ranks: Ranks) -> float:
    """Share of different queries among the batch's."""
    own: list[str] = []
    for played in slices:
        own += played.queries.texts
    queries = list(chain.from_iterable(ranks.gather("queries", own)))
    return len(set(queries)) / len(queries)


def make_optimizer(parameters: list[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW over the LoRA masters; the 8-bit kinds come from bitsandbytes."""
    settings: dict[str, Any] = {
        "lr": config.train.lr,
        "betas": config.optim.betas,
        "eps": config.optim.eps,
        "weight_decay": config.train.weight_decay,
    }
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
