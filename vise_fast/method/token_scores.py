"""Log-probs of the sampled boxes' tokens under policy and reference, with gradient: what the loss
is made of.

One forward pass each, over image, question and answers as a tree (engine); what the rollout left is
gone on from: its graph of the policy's questions, the judge's prefixes. Left out: which answers are
scored (learner.py) and what their scores are worth (loss.py).

Run: `pytest tests/method/test_learner.py -k "scored or scores"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vise_kernels import linear_logprob, linear_logprob_kl

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Answered, Engine, Rollout
from vise_fast.method import consensus
from vise_fast.method.experience import Played
from vise_fast.method.roles import Boxes
from vise_fast.system.machine.staging import put


@dataclass
class Choices:
    """The digits of some answers, and the log-probs (D, 10) of what could stand in their places."""

    digits: consensus.Digits
    logprob: Tensor


@dataclass
class TokenScores:
    """Of every scored token, packed (tokens,): log-prob, reference log-prob and exact KL; tokens
    per answer. choices: where the answers' digits are moved to a consensus; gap: how far the
    log-probs lie from those they were sampled with, where that was asked for.
    """

    logprob: Tensor
    reference: Tensor
    kl: Tensor
    lengths: list[int]
    choices: Choices | None = None
    gap: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Bool (N, T)."""
        return token_mask(self.lengths, self.logprob.device)

    def table(self, packed: Tensor) -> Tensor:
        """(tokens,) as (N, T), zeros on padding; differentiable."""
        mask = self.mask
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, packed)


class TokenScorer:
    """Scores answers as the configuration says."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine = engine
        self.config = config

    def score(self, played: Played, chosen: list[int], gap: bool = False) -> TokenScores:
        """The chosen answers' tokens under policy and reference. gap: and how far from those they
        were sampled with.
        """
        engine = self.engine
        images = sorted({played.boxes.owner[n] for n in chosen})
        answered = _answered(played.boxes, chosen, images)
        features = played.features.select(images)
        if self.config.reward.preset == "as_released":
            return self._released(features, answered)
        with torch.no_grad():
            cached = _reference(played, images)
            reference = engine.score(features, answered, False, prefixes=cached)
        asked = _asked(played, images)
        recompute = self.config.train.checkpointing
        hidden = engine.score(features, answered, True, recompute=recompute, prompts=asked)
        head = engine.backbone.head.weight
        ids = answered.answers.packed()
        with engine.clock.phase("head"):
            states = self._tempered(hidden), self._tempered(reference)
            scores = linear_logprob_kl(*states, head, ids, banned=engine.banned)
        found = TokenScores(*scores, answered.answers.lengths)
        update = self.config.update
        if update.consensus > 0 and update.consensus_by == "agreement":
            found.choices = self._choices(found.logprob, states[0], answered)
        if gap:
            found.gap = self._gap(found.logprob, hidden, answered.answers)
        return found

    @torch.no_grad()
    def _gap(self, logprob: Tensor, hidden: Tensor, answers: Rollout) -> Tensor:
        """(tokens,): the distance in nat of log-probs as scored from those as sampled, both at
        temperature 1. Both are there already, but where `update.tempered` scores at another
        temperature: the head is read once more then.
        """
        if self.config.update.tempered and self.config.rollout.temperature != 1:
            head = self.engine.backbone.head.weight
            logprob = linear_logprob(hidden, head, answers.packed(), banned=self.engine.banned)
        return (logprob.float() - answers.packed_logprob()).abs()

    def _choices(self, logprob: Tensor, hidden: Tensor, answered: Answered) -> Choices:
        """Of these answers, from the log-probs (tokens,) of theirs and hidden (tokens, E)."""
        ids = self.engine.tokens.digits
        digits = consensus.digits_of(answered.answers.rows(), ids)
        device = hidden.device
        place = put(digits.place, device)
        head = self.engine.backbone.head.weight
        written = answered.answers.packed()[place]
        states = hidden[place]
        found = consensus.digit_logprobs(states, head, put(ids, device), written, logprob[place])
        return Choices(digits, found)

    def _tempered(self, hidden: Tensor) -> Tensor:
        """Hidden states whose logits are those that the answers were sampled by, where
        `update.tempered`: divided by the temperature; else as they are.
        """
        temperature = self.config.rollout.temperature
        return hidden / temperature if self.config.update.tempered else hidden

    def _released(self, features: Any, answered: Answered) -> TokenScores:
        """The same over the released code's span."""
        with torch.no_grad():
            reference = self.engine.score_released(features, answered, False)
        span = self.engine.score_released(features, answered, True)
        head = self.engine.backbone.head.weight
        states = self._tempered(span.hidden), self._tempered(reference.hidden)
        scores = linear_logprob_kl(*states, head, span.ids)
        return TokenScores(*scores, span.lengths)


def _answered(boxes: Boxes, chosen: list[int], images: list[int]) -> Answered:
    """The chosen answers, with their questions about these images."""
    place = {image: i for i, image in enumerate(images)}
    owner = [place[boxes.owner[n]] for n in chosen]
    return Answered([boxes.rows[i] for i in images], boxes.answers.select(chosen), owner)


def _reference(played: Played, images: list[int]) -> Any:
    """The judge's prefixes of these images, where it left them; None: they are computed again."""
    if played.reference is None or images[-1] >= len(played.reference):
        return None
    return played.reference.select(images)


def _asked(played: Played, images: list[int]) -> Any:
    """The questions about these images with their graph, where the rollout kept them and most of
    them are scored.
    """
    asked = played.boxes.asked
    if asked is None or 2 * len(images) < len(asked):
        return None
    return asked.select(images)


def token_mask(lengths: list[int], device: torch.device) -> Tensor:
    """Bool (N, T): True on the first lengths[n] positions of row n."""
    steps = torch.arange(max(lengths), device=device)
    return steps < put(lengths, device)[:, None]
