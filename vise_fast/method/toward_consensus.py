"""The share of the loss that moves log-probability towards the consensus of the views
(`update.consensus`): a slice's consensus, and the sampled answers' digits or the consensus written
as an answer, put through the formulas of consensus.py.

Left out: the formulas themselves, and the share (learner.py).

Run: `pytest tests/method/test_learner.py -k consensus`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vise_kernels import linear_logprob

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Answered, Engine, Rollout
from vise_fast.method import consensus
from vise_fast.method.experience import Played
from vise_fast.method.token_scores import Choices, TokenScores
from vise_fast.system.machine.staging import put


def agreed(played: Played) -> consensus.Consensus:
    """What the views of a slice agree on, as it was scored."""
    if played.agreed is None:
        raise RuntimeError("a slice learns from its consensus before it was scored")
    return played.agreed


def raised(
    engine: Engine,
    config: Config,
    played: Played,
    chosen: list[int],
    scores: TokenScores,
    samples: int,
) -> Tensor:
    """What the consensus of the views raises in this slice; a scalar to maximise. scores: of the
    `chosen` answers; samples: of the whole batch.
    """
    if scores.choices is None:
        return likelihood(engine, config, played, chosen, samples)
    return _agreement(played, chosen, scores.choices, scores.lengths, samples)


def _agreement(
    played: Played, chosen: list[int], choices: Choices, lengths: list[int], samples: int
) -> Tensor:
    """The chosen answers' expected agreement with the consensus of their views, per digit."""
    own = agreed(played).select(chosen)  # samples: the views are boxed by the reference
    digits = choices.digits
    device = choices.logprob.device
    values = consensus.agreements(digits, own.box_1000, own.counts)
    values = put(values * own.known[digits.row][:, None], device)
    row = put(digits.row, device)
    tokens = put(lengths, device)
    return consensus.expected_agreement(choices.logprob, values, row, tokens, samples)


def likelihood(
    engine: Engine, config: Config, played: Played, chosen: list[int], samples: int
) -> Tensor:
    """That of the consensus as an answer about every image with a chosen sample, at temperature 1;
    it counts as often as the image has samples, and each of its boxes the same share of it.
    """
    group = config.rollout.samples
    whole = agreed(played)
    images = sorted({n // group for n in chosen if whole.known[n]})
    if not images:
        return torch.zeros((), device=engine.device)
    own = whole.select([image * group for image in images])
    answered = _written(engine, played, images, own)
    features = played.features.select(images)
    hidden = engine.score(features, answered, True, recompute=config.train.checkpointing)
    answers = answered.answers
    head = engine.backbone.head.weight
    logprob = linear_logprob(hidden, head, answers.packed(), banned=engine.banned)
    digits = consensus.digits_of(answers.rows(), engine.tokens.digits)
    share = group / own.counts.sum(1)[answered.owner]
    return consensus.likelihood(logprob, answers.lengths, digits, samples, share)


def _written(
    engine: Engine, played: Played, images: list[int], own: consensus.Consensus
) -> Answered:
    """The questions about these images with the boxes that count as their answers."""
    tokens = engine.tokens
    owner, column = (part.tolist() for part in own.counts.nonzero(as_tuple=True))
    table = own.box_1000[owner, column].tolist()
    answers = tokens.written_boxes([(x1, y1, x2, y2) for x1, y1, x2, y2 in table])
    lengths = [len(row) for row in answers]
    padded = [row + [tokens.pad] * (max(lengths) - len(row)) for row in answers]
    ids = put(padded, engine.device)
    rollout = Rollout(ids, torch.zeros(ids.shape, device=ids.device), lengths, padded)
    rows = [played.boxes.rows[image] for image in images]
    return Answered(rows, rollout, owner)
