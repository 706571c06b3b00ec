"""What an engine takes and gives: prefixes, prompts, sampled answers, counters; and the `Engine`
protocol, which the fast, the graphed and the stock engine fulfil.

Rows are answers. A *fan* says how many answers each question gets; an *owner* list says, per row,
which question (or prefix) it belongs to. Ids in, ids out: what is asked and how answers are read is
not an engine's business.

Shapes: N answers, T tokens of the longest, R questions, E text width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vise_fast.model.tree import Segment
from vise_fast.system.machine.clock import Clock
from vise_fast.system.machine.staging import put
from vise_fast.text.tokens import Tokens

Held = Any
"""What an engine keeps of images, prefixes or prompts: only this engine looks inside; others may
take `len` and `select(rows)`.
"""


def owners(fan: Sequence[int]) -> list[int]:
    """The question of each answer: [2, 0, 1] -> [0, 0, 2]."""
    rows: list[int] = []
    for question, count in enumerate(fan):
        rows += [question] * count
    return rows


@dataclass
class Counters:
    """Work done since the last `take`: what is done twice shows here, on any machine."""

    images_encoded: int = 0
    prefixes: int = 0
    forwards: int = 0
    decode_steps: int = 0
    verdicts: int = 0
    tokens_decoded: int = 0
    host_reads: int = 0
    spread_sum: float = 0.0
    spread_of: int = 0
    """Standard deviations of verdicts over their wordings, where there are several."""

    def spread(self, total: float, verdicts: int) -> None:
        """Notes how far the wordings of so many verdicts lay apart, in all."""
        self.spread_sum += total
        self.spread_of += verdicts

    def take(self) -> dict[str, Any]:
        """All counts, which begin anew; `verdict_spread` where verdicts had several wordings."""
        values: dict[str, Any] = asdict(self)
        for name in values:
            setattr(self, name, 0)
        total = values.pop("spread_sum")
        count = values.pop("spread_of")
        return values | ({"verdict_spread": total / count} if count else {})


@dataclass
class Prefixes:
    """Image prefixes under one adapter state: their keys and values and the rope position that
    comes next, per image. They carry the graph of their forward pass where `prefill` was asked for
    it.
    """

    segment: Segment
    following: list[int]
    adapters: bool

    def __len__(self) -> int:
        return len(self.following)

    def select(self, images: list[int]) -> Prefixes:
        """The prefixes of some images, in that order."""
        if images == list(range(len(self))):
            return self
        following = [self.following[i] for i in images]
        return Prefixes(self.segment.select(images), following, self.adapters)

    def detach(self) -> Prefixes:
        """The same without their graph."""
        return Prefixes(self.segment.detach(), self.following, self.adapters)

    def stack(self, below: Prefixes) -> Prefixes:
        """A copy of these and, after them, of others of the same adapter state; without graphs."""
        segment = self.segment.stack(below.segment)
        return Prefixes(segment, self.following + below.following, self.adapters)


@dataclass
class Prompts:
    """Questions forked from prefixes: owner[r] is the prefix of row r; last (R, E) the hidden state
    that predicts the first token. With a graph where their prefixes have one.
    """

    prefixes: Prefixes
    owner: list[int]
    segment: Segment
    following: list[int]
    last: Tensor

    def __len__(self) -> int:
        return len(self.following)

    def select(self, rows: list[int]) -> Prompts:
        """The questions in some rows, each of an image of its own, in that order."""
        if rows == list(range(len(self))):
            return self
        prefixes = self.prefixes.select([self.owner[r] for r in rows])
        following = [self.following[r] for r in rows]
        segment = self.segment.select(rows)
        last = self.last[put(rows, self.last.device)]
        return Prompts(prefixes, list(range(len(rows))), segment, following, last)

    def over(self, prefixes: Prefixes) -> Prompts:
        """The same questions without their graph; `prefixes` begin with the ones they were asked
        on.
        """
        return Prompts(
            prefixes, self.owner, self.segment.detach(), self.following, self.last.detach()
        )

    def stack(self, below: Prompts) -> Prompts:
        """These questions and, after them, others over the same prefixes; without graphs."""
        last = torch.cat([self.last, below.last])
        segment = self.segment.stack(below.segment)
        following = self.following + below.following
        return Prompts(self.prefixes, self.owner + below.owner, segment, following, last)


@dataclass
class Rollout:
    """Sampled answers: ids (N, T) padded, logprob (N, T) at temperature 1, whatever they were
    sampled at, lengths including the end token.

    home: the padded ids as lists, where they came to the host together with the lengths.
    """

    ids: Tensor
    logprob: Tensor
    lengths: list[int]
    home: list[list[int]] | None = None

    def mask(self) -> Tensor:
        """fp32 (N, T): 1 on sampled tokens."""
        steps = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (steps < put(self.lengths, self.ids.device)[:, None]).float()

    def rows(self) -> list[list[int]]:
        """The sampled ids of each answer."""
        padded = self.ids.tolist() if self.home is None else self.home
        return [row[:n] for row, n in zip(padded, self.lengths, strict=True)]

    def packed(self) -> Tensor:
        """The sampled ids (sum of lengths,), row by row; no host sync."""
        return self.ids.flatten()[self._places()]

    def packed_logprob(self) -> Tensor:
        """Their log-probs (sum of lengths,) at temperature 1, as they were sampled."""
        return self.logprob.flatten()[self._places()]

    def _places(self) -> Tensor:
        """Where the sampled ones lie among all."""
        width = self.ids.shape[1]
        places: list[int] = []
        for row, length in enumerate(self.lengths):
            places += range(row * width, row * width + length)
        return put(places, self.ids.device)

    def select(self, rows: list[int]) -> Rollout:
        """Some answers, in that order."""
        home = None if self.home is None else [self.home[r] for r in rows]
        index = put(rows, self.ids.device)
        lengths = [self.lengths[r] for r in rows]
        return Rollout(self.ids[index], self.logprob[index], lengths, home)


@dataclass(frozen=True)
class Answered:
    """Questions with their answers, to be scored: rows[i] are the ids of the question about image
    i, answer n belongs to question owner[n].
    """

    rows: list[list[int]]
    answers: Rollout
    owner: list[int]

    @property
    def one_each(self) -> bool:
        """Every question has one answer, in the order of the questions."""
        return self.owner == list(range(len(self.rows)))


class ReleasedSpan(NamedTuple):
    """What the released code scores (preset `as_released`): hidden states (tokens, E), the ids
    (tokens,) they are scored on, packed, and tokens per answer. Image tokens are among them.
    """

    hidden: Tensor
    ids: Tensor
    lengths: list[int]


class Engine(Protocol):
    """Generation and scoring with one model; stateless between calls but for its counters."""

    backbone: Any
    tokens: Tokens
    counters: Counters
    clock: Clock
    banned: Tensor
    """bool (V,): ids that are never sampled"""
    keeps_keys: bool
    """Prefixes hold keys and values with their graph: the update can go on from the rollout's
    forward pass."""
    measures_attention: bool
    """The share of attention on the image can be measured (attention_meter.py)."""
    interrupted: Callable[[], None]
    """called between steps of a long answer; may raise"""

    @property
    def device(self) -> torch.device:
        """Where ids and features are."""

    def gains_by_sharing(self, sizes: Sequence[tuple[int, int]]) -> bool:
        """Whether an update on images of these (height, width) is quicker when it goes on from the
        rollout's forward pass.
        """

    def forget(self) -> None:
        """Drop what is kept between calls, when memory runs out."""

    def home(self, values: Tensor) -> Tensor:
        """Values on the CPU: a host sync, counted."""

    def sizes(self, prefixes: Held) -> list[tuple[int, int] | None]:
        """(height, width) in pixels of each image as the model sees it; None where that is not
        kept.
        """

    def encode(self, images: list[Tensor]) -> Held:
        """uint8 (H, W, 3) images on the model's grid; no adapters inside."""

    def prefill(self, features: Held, adapters: bool, *, graph: bool = False) -> Held:
        """One prefix per image. graph: with gradients, for `prompt` and `score`."""

    def prompt(self, prefixes: Held, owner: list[int], rows: list[list[int]]) -> Held:
        """Fork prefixes: question ids rows[r] continue prefix owner[r]."""

    def generate(
        self,
        prompts: Held,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """fan[r] answers to prompt r, at most `limit` tokens each; a seed per answer; temperature 0
        is greedy.
        """

    def verdict_logits(self, features: Held, rows: list[list[int]], adapters: bool) -> Tensor:
        """Next-token logits (R, V) of one opened question per image."""

    def forked_verdict_logits(
        self, prefixes: Held, owner: list[int], rows: list[list[int]]
    ) -> Tensor:
        """The same for images whose prefix is at hand."""

    def score(
        self,
        features: Held,
        answered: Answered,
        adapters: bool,
        *,
        prefixes: Held | None = None,
        recompute: bool = False,
        prompts: Held | None = None,
    ) -> Tensor:
        """Hidden states (sum of lengths, E) that predict each sampled token, packed row by row."""

    def score_released(self, features: Held, answered: Answered, adapters: bool) -> ReleasedSpan:
        """The released code's span: everything after the prompt's length before image tokens were
        expanded.
        """
