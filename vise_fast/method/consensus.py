"""The consensus of the views: the boxes found in an image's views, or their mean, and how the
digits of a sampled box would have to change to agree with them.

This is not VISE's update. VISE rewards a sampled box for agreeing with the views, and REINFORCE
learns from the samples' rewards. Here the log-probability of every digit that could have been
written moves directly: at each digit of a sampled answer all ten are compared by the agreement that
the box would have with the consensus, the rest of the answer unchanged, and their expected
agreement is raised. No label enters; the views' boxes are the reference's, so that the consensus
cannot be trained into anything. Weighted by `update.consensus` and added to REINFORCE.

    J = 1/N sum_n 1/T_n sum_j sum_d p(d | prefix_nj) IoU(box_n with digit j := d, consensus)

That is `update.consensus_by: agreement`. `likelihood` is plainer: the mean log-probability of the
consensus itself, written as an answer, its tokens weighted by what they are worth. With
`update.consensus_of: each` the views' boxes are not averaged, but what is said of them: the mean
IoU with each, the mean log-probability of each. Where they differ a box in between is then worth
what it would be worth on average, if one of them were the truth.

Left out: the forward passes (token_scores.py, toward_consensus.py) and the rest of the loss
(loss.py). Pure functions of tensors. Run: `pytest tests/method/test_consensus.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vise_fast.config.schema import Config, RewardConfig
from vise_fast.images import geometry
from vise_fast.method.evidence import Evidence
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine.staging import put
from vise_fast.text.tokens import Tokens

CHOICES = 10
COORDINATES = 4
Of = Literal["mean", "each"]
FEWEST_VIEWS = 2
"""A consensus needs so many usable views."""


@dataclass(frozen=True)
class Consensus:
    """Of each of N rows, alike within a group: box_1000 (N, M, 4) float64, of which some count (N,
    M) bool; known (N,) bool: whether it may be learned from.
    """

    box_1000: Tensor
    counts: Tensor
    known: Tensor

    @classmethod
    def single(cls, box_1000: Tensor, known: Tensor) -> Consensus:
        """One box (N, 4) for each row."""
        return cls(box_1000[:, None], known[:, None], known)

    def select(self, rows: Sequence[int] | Tensor) -> Consensus:
        """That of some rows."""
        return Consensus(self.box_1000[rows], self.counts[rows], self.known[rows])


def consensus(
    evidence: Evidence,
    projection: geometry.Projection = "ellipse",
    of: Of = "mean",
) -> Consensus:
    """The boxes found in a group's views, projected back onto the image, or their mean.

    A view counts where its answer is a box with area and the view is usable for any of the group's
    rows (it keeps enough of that box, and its query names no side under a flip). Known where at
    least two views count and the mean has area; of `each`, boxes without area on the image are then
    left out, and one may remain.
    """
    e = evidence
    found = e.view_readable & geometry.proper(e.view_box_1000)
    group = (-1, e.group_size, found.shape[1])
    usable = e.view_usable.view(group).any(1).repeat_interleave(e.group_size, 0) & found
    back = geometry.project_1000(
        e.view_box_1000,
        torch.linalg.inv(e.matrix_px),
        e.height[:, None],
        e.width[:, None],
        projection,
        clamp=False,
    )
    count = usable.sum(1)
    total = (back.double() * usable[..., None]).sum(1)
    box = geometry.clean_1000(total / count.clamp_min(1)[:, None])
    known = (count >= FEWEST_VIEWS) & geometry.proper(box)
    if of == "mean":
        return Consensus.single(box, known)
    every = geometry.clean_1000(back.double())
    counts = usable & known[:, None] & geometry.proper(every)
    return Consensus(every, counts, counts.any(1))


def target(evidence: Evidence, config: RewardConfig, of: Of = "mean") -> Consensus:
    """What the digits are moved to: the consensus; for the controls of the learning study the true
    box (`reward.name` oracle), or the consensus of the next image (shuffled), which says nothing.
    """
    if config.name == "oracle" and evidence.truth_1000 is not None:
        truth = geometry.clean_1000(evidence.truth_1000)
        return Consensus.single(truth, geometry.proper(truth))
    found = consensus(evidence, config.projection, of)
    if config.name != "shuffled":
        return found
    return found.select(torch.arange(len(found.known)).roll(-evidence.group_size))


def check(config: Config, tokens: Tokens) -> None:
    """Raises ConfigError where answers are written in a way whose digits are not understood."""
    if config.update.consensus == 0:
        return
    box = (12.0, 234.0, 567.0, 890.0)
    plain = tokens.style.space == "1000"
    if plain and config.update.consensus_by == "agreement":
        found = digits_of(tokens.written_boxes([box]), tokens.digits).box.tolist()
        plain = found == [[int(side) for side in box]]
    if not plain:
        raise ConfigError(
            f"update.consensus does not understand the digits of prompt style {tokens.style.name}; "
            "it moves those of four numbers from 0 to 1000; set prompts.ground to natural or "
            "short, or update.consensus to 0"
        )


@dataclass(frozen=True)
class Digits:
    """The digits of the boxes in some answers, D in all: `row` the answer of each, `place` where
    among the answers' packed tokens it stands, `coordinate` 0..3 (x1, y1, x2, y2), `worth` 1, 10,
    100 or 1000, `digit` 0..9; `box` (rows, 4) the coordinates as written. int64.
    """

    row: Tensor
    place: Tensor
    coordinate: Tensor
    worth: Tensor
    digit: Tensor
    box: Tensor

    def __len__(self) -> int:
        return len(self.row)


def digits_of(answers: list[list[int]], ids: list[int]) -> Digits:
    """Token ids of answers -> their digits. ids: the token of each digit 0..9.

    Only answers whose digits make exactly four numbers of at most four digits have any; the others
    carry nothing here.
    """
    digit_of = {token: digit for digit, token in enumerate(ids)}
    table: list[tuple[int, int, int, int, int]] = []
    start = 0
    for row, answer in enumerate(answers):
        runs = _runs([digit_of.get(token) for token in answer])
        if len(runs) == COORDINATES and max(len(run) for run in runs) <= COORDINATES:
            table += _entries(runs, row, start)
        start += len(answer)
    columns = torch.tensor(table, dtype=torch.int64).view(-1, 5)
    owner, place, coordinate, worth, digit = columns.unbind(1)
    boxes = torch.zeros(len(answers), COORDINATES, dtype=torch.int64)
    boxes.index_put_((owner, coordinate), digit * worth, accumulate=True)
    return Digits(owner, place, coordinate, worth, digit, boxes)


def _entries(
    runs: list[list[tuple[int, int]]], row: int, start: int
) -> list[tuple[int, int, int, int, int]]:
    """The columns of `Digits` for one answer, whose tokens begin at `start`."""
    entries = []
    for coordinate, run in enumerate(runs):
        for n, (place, digit) in enumerate(run):
            worth = CHOICES ** (len(run) - 1 - n)
            entries.append((row, start + place, coordinate, worth, digit))
    return entries


def _runs(digits: list[int | None]) -> list[list[tuple[int, int]]]:
    """Digits (None: another token) -> the numbers they make, as (place, digit) each."""
    runs: list[list[tuple[int, int]]] = []
    before = None
    for place, digit in enumerate(digits):
        if digit is not None:
            if before is None:
                runs.append([])
            runs[-1].append((place, digit))
        before = digit
    return runs


def agreements(digits: Digits, target_1000: Tensor, counts: Tensor) -> Tensor:
    """(D, 10) float64: the mean IoU with those of the row's targets (rows, M, 4) that count (rows,
    M), which the box would have with each digit in place of the one that was written, all else
    unchanged; 0 where none counts.
    """
    choices = torch.arange(CHOICES)
    change = (choices[None] - digits.digit[:, None]) * digits.worth[:, None]
    moved = torch.zeros(len(digits), CHOICES, COORDINATES, dtype=torch.int64)
    column = digits.coordinate[:, None, None].expand(-1, CHOICES, 1)
    moved.scatter_(2, column, change[..., None])
    boxes = geometry.clean_1000((digits.box[digits.row][:, None] + moved).double())
    target = geometry.clean_1000(target_1000)[digits.row][:, None]
    shape = (len(digits), CHOICES, target.shape[2], COORDINATES)
    found = geometry.iou(boxes[:, :, None].expand(shape), target.expand(shape))
    weight = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    return (found * weight[digits.row][:, None]).sum(2)


def expected_agreement(
    logprob: Tensor, agreement: Tensor, row: Tensor, tokens: Tensor, denominator: int
) -> Tensor:
    """J of the file's head, a scalar to maximise. logprob (D, 10) with gradient: of each digit in
    each place; agreement (D, 10); row (D,); tokens (rows,): of each answer, T_n; denominator: N of
    the whole batch.

    Each place's agreements are taken relative to their mean under the policy: the value is 0, the
    gradient that of J (probability that leaves the digits altogether neither gains nor loses).
    """
    p = logprob.float().exp()
    weight = p.detach() / p.detach().sum(1, keepdim=True).clamp_min(1e-30)
    values = agreement.to(p)
    centred = values - (weight * values).sum(1, keepdim=True)
    share = 1 / tokens.to(p)[row]
    return ((p * centred).sum(1) * share).sum() / denominator


TOKEN_WEIGHTS = {1000: 1.0, 100: 1.0, 10: 0.4, 1: 0.1}
"""Of a digit in the likelihood, by its worth; all else weighs as the last."""


def likelihood(
    logprob: Tensor, lengths: list[int], digits: Digits, denominator: int, worth: Tensor
) -> Tensor:
    """Weighted mean log-probability of whole answers, summed by their worth (answers,) and over
    `denominator`: a scalar to maximise. logprob (tokens,) packed, with gradient; lengths: tokens of
    each answer.
    """
    weight = torch.full((sum(lengths),), TOKEN_WEIGHTS[1])
    weight[digits.place] = torch.tensor([TOKEN_WEIGHTS[unit] for unit in digits.worth.tolist()])
    total = torch.stack([piece.sum() for piece in weight.split(lengths)])
    share = weight * (worth / total).repeat_interleave(torch.tensor(lengths))
    return (put(share, logprob.device) * logprob.float()).sum() / denominator


def digit_logprobs(
    hidden: Tensor, head: Tensor, ids: Tensor, written: Tensor, logprob: Tensor
) -> Tensor:
    """Log-probs (D, 10) of all digits from those of the ones that were written: hidden (D, E), head
    (V, E), ids (10,) of the digits, written (D,) ids, logprob (D,) of these with gradient.

    log p_d = log p_w + z_d - z_w: ten rows of the head instead of all.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.to(wide)
    logits = rows @ head[ids].to(wide).T
    own = (rows * head[written].to(wide)).sum(1)
    return logprob[:, None] + logits - own[:, None]
